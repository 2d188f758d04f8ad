"""Retrieval over distance: facts planted in a story, asked for at its end. Makes examples and counts right answers.

A fact is a sentence that nothing else in the text gives away: a made-up name or a random number of some thing. To
answer, a model must look back to it. Boundary: text and tokens; the model comes in through :func:`accuracy` alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modification.generate import generate

_THINGS = (
    "the old boat", "the grey owl", "the clockmaker's cat", "the little lighthouse", "the blue door",
    "the lost dragon", "the baker's horse", "the silver bell", "the wooden bridge", "the quiet robot",
    "the market clown", "the king's tower", "the travelling circus", "the red kite", "the sleeping giant",
    "the snow fox", "the music box", "the forest train",
)
_STARTS = ("Ba", "Do", "El", "Fi", "Gra", "Ha", "Jo", "Ka", "Lu", "Mo", "Ni", "Or", "Pe", "Ru", "Sa", "Ta", "Vi", "Zo")
_ENDS = ("bran", "della", "fin", "gus", "kin", "lina", "mar", "nette", "pello", "rick", "sey", "ton", "via", "wen")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to remember: the sentence that tells it, the question, the full answer and its decisive word."""

    sentence: str
    question: str
    answer: str
    word: str


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts about ``count`` unlike things, names and numbers alike."""
    if not 1 <= count <= len(_THINGS):
        raise ValueError(f"count={count}: must be from 1 to {len(_THINGS)} facts")
    return [_fact(rng, thing) for thing in rng.sample(_THINGS, count)]


def _fact(rng: random.Random, thing: str) -> Fact:
    kind, word = ("secret name", rng.choice(_STARTS) + rng.choice(_ENDS))
    if rng.random() < 0.5:
        kind, word = ("secret number", str(rng.randint(100, 999)))
    told = f"he {kind} of {thing} is"
    return Fact(f"T{told} {word}.", f"What is t{told.removesuffix(' is')}?", f"T{told} {word}.", word)


def plant(story: str, facts: Sequence[Fact], places: Sequence[float]) -> str:
    """The story with each fact's sentence put in at a place from 0 (start) to 1 (end), between two sentences."""
    story = story.strip() + " "
    starts = [0, *(found.end() for found in _SENTENCE.finditer(story))]
    chosen = [starts[round(place * (len(starts) - 1))] for place in places]
    for at, fact in sorted(zip(chosen, facts, strict=True), key=lambda pair: -pair[0]):
        story = f"{story[:at]}{fact.sentence} {story[at:]}"
    return story.strip()


def conversation(rng: random.Random, story: str, most: int = 4) -> list[dict[str, str]]:
    """A chat that trains the skill: a story with up to ``most`` facts in it, then a question and answer for each."""
    facts = draw_facts(rng, rng.randint(1, most))
    text = plant(story, facts, [rng.random() for _ in facts])
    asked = rng.sample(facts, len(facts))
    messages: list[dict[str, str]] = []
    for at, fact in enumerate(asked):
        question = f"{text}\n\n{fact.question}" if at == 0 else fact.question
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]
    return messages


def cut(text: str, tokens: int, tokenizer: Any) -> str:
    """The first ``tokens`` tokens of a text, ended at a sentence where one ends there."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    part: str = tokenizer.decode(ids)
    ends = [found.start() for found in _SENTENCE.finditer(part)]
    return part[: ends[-1]] if ends else part


def accuracy(
    model: Any, tokenizer: Any, story: Callable[[int], str], distance: int, p: float, trials: int = 40, seed: int = 0
) -> float:
    """Share of planted facts that greedy decoding gives back, from ``distance`` tokens away.

    Args:
        model: a MoD model.
        story: text for a trial's number, at least ``distance`` tokens long.
        distance: tokens between fact and question, about.
        p: threshold.
        trials: questions asked; the standard error is sqrt(a (1 - a) / trials).
    """
    rng, right = random.Random(seed), 0
    for trial in range(trials):
        fact = draw_facts(rng, 1)[0]
        text = plant(cut(story(trial), distance, tokenizer), [fact], [0.0])
        messages = [{"role": "user", "content": f"{text}\n\n{fact.question}"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        made = [step.token for step in generate(model, ids, p=p, max_new_tokens=_NEW_TOKENS) if not step.prefill]
        right += fact.word in tokenizer.decode(made)
    return right / trials
