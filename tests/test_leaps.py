"""Rows whose places leap: what is in them, what a model sees of them, and that learning by them can be resumed."""

from __future__ import annotations

import json

import make_pair
import pytest
import torch
from browsing import MODELS
from builders import dense_model, mod_model
from leaps import LENGTH, Rows, batch_of
from mixture import CONTEXT
from reach import reach
from transformers import AutoTokenizer

from modification import load
from modification.conversion.calibrate import set_dial

needs_the_pair = pytest.mark.skipif(not MODELS, reason="no MoD model is shipped in assets/")
TOLD = "The fox ran a mile, and then it slept. The owl saw it all from the old tree. "


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS[0].parent)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Twenty-four rows of a few long stories: those that leap, and those that don't."""
    documents = [tokenizer(f"Tale {at}. " + TOLD * 40)["input_ids"] for at in range(5)]
    made = Rows(documents, tokenizer, 24)
    found = [made[at] for at in range(len(made))]
    return [row for row in found if not row["story"].any()], [row for row in found if row["story"].all()]


@needs_the_pair
def test_chats_leap_once_before_the_first_answer_and_within_the_context(rows):
    leaping, _ = rows
    assert len(leaping) == 16
    for row in leaping:
        steps, first = row["position_ids"].diff(), int(row["answer"].nonzero()[0])
        assert len(row["input_ids"]) <= LENGTH
        assert (steps != 1).sum() <= 1
        assert steps.min() == 1
        assert 0 == row["position_ids"][0] < row["position_ids"][-1] < CONTEXT
        assert row["position_ids"][first] - first == steps.max() - 1  # the leap is behind it
    assert max(row["position_ids"].diff().max() for row in leaping) > CONTEXT / 2


@needs_the_pair
def test_answers_are_what_the_story_told_and_stories_are_as_they_were(rows, tokenizer):
    leaping, stories = rows
    for row in leaping:
        text = tokenizer.decode(row["input_ids"])
        answered = tokenizer.decode(row["input_ids"][row["answer"]]).split("<|end|>")[:-1]
        assert answered
        assert all(text.count(answer) == 2 for answer in answered)  # told, and answered
    assert len(stories) == 8
    for row in stories:
        assert row["position_ids"].tolist() == list(range(LENGTH))
        assert not row["answer"].any()


@needs_the_pair
def test_rows_side_by_side_keep_what_they_are(rows):
    some = [rows[0][0], rows[1][0], rows[0][1]]
    batch = batch_of(some)
    for at, row in enumerate(some):
        real = batch["real"][at]
        assert real.sum() == len(row["input_ids"])
        assert all(torch.equal(batch[name][at][real], row[name]) for name in row)


def test_what_lies_before_a_leap_is_seen_behind_it():
    model = mod_model("llama")
    ids = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 1] += 1
    places = torch.cat([torch.arange(5), torch.arange(25, 32)])[None]
    one, two = (
        model(input_ids=each, position_ids=places, attention_mask=torch.ones_like(ids), p=0.0, use_cache=False).logits
        for each in (ids, other)
    )
    assert (one[0, -1] - two[0, -1]).abs().max() > 1e-4
    plain = model(input_ids=ids, p=0.0, use_cache=False).logits
    assert (one - plain).abs().max() > 1e-4


@needs_the_pair
def test_a_model_learns_by_them_and_a_run_goes_on_where_it_stopped(tokenizer, tmp_path, gradients):
    """Stopped after four steps and gone on, a tiny model ends with the weights of one that was not stopped."""
    documents = [tokenizer(f"Tale {at}. " + TOLD * 3)["input_ids"] for at in range(5)]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}

    def fresh():
        torch.manual_seed(0)
        model = mod_model("llama", **sizes)
        set_dial(model, tuple(at / 20 for at in range(1, 20)))
        return model

    whole = fresh()
    reach(whole, dense_model("llama", **sizes), documents, tokenizer, tmp_path / "one", 6, 4)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "checkpoint-4").rename(tmp_path / "two" / "checkpoint-4")
    resumed = fresh()
    reach(resumed, dense_model("llama", **sizes), documents, tokenizer, tmp_path / "two", 6, 4)
    before, after, again = (dict(model.named_parameters()) for model in (fresh(), whole, resumed))
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert whole.mod_config.dial == ()


@needs_the_pair
def test_what_the_last_stage_leaves_is_a_model_that_loads(tokenizer, tmp_path, monkeypatch, gradients):
    """Between the first two stages' weights at first, and moved from there."""
    monkeypatch.setattr(make_pair, "FAR_STEPS", 2)
    monkeypatch.setattr(make_pair, "DIAL_TOKENS", 1024)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    dense_model("llama", **sizes).save_pretrained(tmp_path / "parent")
    for seed, stage in enumerate(("mod", "mod-onwards")):
        mod_model("llama", seed=seed, **sizes).save_pretrained(tmp_path / stage)
        tokenizer.save_pretrained(tmp_path / stage)
    told = [{"prompt": f"Tale {at}", "response": TOLD * 8, "split": "train"} for at in range(5)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, told)))
    out = tmp_path / "mod-far"
    make_pair.look_far(tmp_path, tmp_path / "parent", tmp_path / "text.jsonl", tokenizer, out)
    model, kept = load(out)
    assert kept.chat_template == tokenizer.chat_template
    moved = [
        (later - earlier).abs().max() for earlier, later in zip(
            make_pair.blend(tmp_path / "mod", tmp_path / "mod-onwards").parameters(), model.parameters(), strict=True
        )
    ]
    assert 0 < max(moved) < 0.05
