"""Facts planted in text: where they stand, and how right answers are counted."""

from __future__ import annotations

import random

import pytest
from builders import mod_model, tiny_tokenizer

from modification.measure import retrieval
from modification.measure.retrieval import accuracy, conversation, cut, draw_facts, plant


def chat_tokenizer():
    """The tiny tokenizer with the plainest of chat templates."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


STORY = "The fox ran home. It was late! Was it cold? Nobody knew.\n\nThe end came."


def test_facts_are_about_unlike_things_and_answer_their_question():
    """The answer holds the word, the question does not."""
    facts = draw_facts(random.Random(3), 12)
    assert len({fact.question for fact in facts}) == 12
    for fact in facts:
        assert fact.word in fact.answer
        assert fact.word not in fact.question
        assert fact.sentence.endswith(f"is {fact.word}.")


@pytest.mark.parametrize("count", [0, 99])
def test_a_number_of_facts_out_of_bounds_is_refused(count):
    """The bound is named."""
    with pytest.raises(ValueError, match="from 1 to 18 facts"):
        draw_facts(random.Random(0), count)


def test_facts_are_planted_between_sentences_and_nothing_is_lost():
    """At the start, at the end, anywhere: without them the story is as it was."""
    facts = draw_facts(random.Random(1), 3)
    text = plant(STORY, facts, [0.0, 0.5, 1.0])
    assert text.startswith(facts[0].sentence)
    assert text.endswith(facts[2].sentence)
    for fact in facts:
        text = text.replace(f"{fact.sentence} ", "").replace(f" {fact.sentence}", "")
    assert text == STORY


def test_a_conversation_asks_for_what_it_told():
    """Story and first question in one message, then an answer to each question."""
    messages = conversation(random.Random(5), STORY)
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    for answer in messages[1::2]:
        assert answer["content"] in messages[0]["content"]


def test_a_text_is_cut_at_a_sentence():
    """Within the tokens allowed."""
    assert cut("One two. Three four. Five", 20, chat_tokenizer()) == "One two."


@pytest.mark.parametrize(("word", "share"), [("", 1.0), ("never said", 0.0)])
def test_an_answer_counts_if_the_word_is_in_it(word, share, monkeypatch):
    """An empty word is in every answer, an impossible one in none."""
    fact = retrieval.Fact("It is so.", "Is it?", "It is.", word)
    monkeypatch.setattr(retrieval, "draw_facts", lambda rng, count: [fact])
    model = mod_model("llama")
    assert accuracy(model, chat_tokenizer(), lambda trial: STORY, 20, 0.5, trials=3) == share
