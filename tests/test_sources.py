"""Text from anywhere: Parquet, responses alone, mixes, the Hub's data sets, and what the parent writes itself."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from builders import dense_model, tiny_tokenizer

from modification.conversion import sources
from modification.conversion.data import Blocks, read_documents
from modification.conversion.sources import Reading, documents, read_text, sampled

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "AB"},
                     {"role": "user", "content": "R"}, {"role": "assistant", "content": "C"}]}


def learnt(written, tokenizer):
    """What of a document is to be learnt, and all of it."""
    scored, everything = [t for t in written if t >= 0], [t if t >= 0 else -1 - t for t in written]
    return tokenizer.decode(scored), tokenizer.decode(everything)


@pytest.fixture
def chatty():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_only_responses_are_learnt(tmp_path, chatty):
    """Every assistant turn and its end; the rest is read but not learnt, with and without a template."""
    path = write(tmp_path / "a.jsonl", [CHAT, {"prompt": "Ask", "response": "Tell"}, {"text": "plain"}])
    found = [learnt(written, chatty) for written in read_documents(path, chatty, responses=True)]
    assert found[0] == ("AB;C;", "[user]Q;[assistant]AB;[user]R;[assistant]C;")
    assert found[1] == ("Tell;", "[user]Ask;[assistant]Tell;")
    assert found[2] == ("<s>plain</s>", "<s>plain</s>")
    plain = tiny_tokenizer()
    found = [learnt(written, plain) for written in read_documents(path, plain, responses=True)]
    assert found[1] == ("Tell</s>", "<s>Ask??Tell</s>")


def test_what_is_not_to_be_learnt_is_no_label():
    item = Blocks(np.array([[5, -8, 3, -1]], np.int32))[0]
    assert item["input_ids"].tolist() == [5, 7, 3, 0]
    assert item["labels"].tolist() == [5, -100, 3, -100]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: its chat template does not write"):
        list(read_documents(path, tokenizer, responses=True))


def test_parquet_rows_are_read_in_the_three_forms(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = {"text": ["One.", None], "prompt": [None, "Ask"], "response": [None, "Tell"], "split": ["train", "val"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    found = [tokenizer.decode(ids) for ids in read_documents(tmp_path / "rows.parquet", tokenizer)]
    assert found == ["<s>One.</s>", "<s>Ask??Tell</s>"]
    assert len(list(read_documents(tmp_path / "rows.parquet", tokenizer, "val"))) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"PAR1" * 40])
def test_a_damaged_parquet_file_is_a_sentence(content, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged or no Parquet file"):
        list(read_documents(tmp_path / "rows.parquet", tiny_tokenizer()))


def test_sources_are_mixed_by_their_shares(tmp_path):
    """Blocks know their source; each source has its part held out; the mix is shuffled."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 4000)
    reading = Reading((f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"), (3.0, 1.0), held_out=4)
    text = read_text(reading, tiny_tokenizer(), None, 800, 10)
    a, b = (tiny_tokenizer()(letter)["input_ids"][-1] for letter in "ab")
    assert text.sources.tolist() == [int((block == b).any()) for block in text.blocks]
    assert (text.sources == 0).mean() == pytest.approx(0.75, abs=0.03)
    assert text.blocks.size == pytest.approx(800, abs=20)
    assert len(text.held_out) == 4
    assert {a, b} <= set(text.held_out.flatten().tolist())
    assert 0 < text.sources[: len(text.sources) // 2].sum() < text.sources.sum()
    again = read_text(reading, tiny_tokenizer(), None, 800, 10)
    assert np.array_equal(again.blocks, text.blocks)


def test_held_out_text_may_come_from_elsewhere(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 4000)
    reading = Reading((f"{tmp_path}/a.txt",), held_out=4, held_out_source=f"{tmp_path}/b.txt")
    text = read_text(reading, tiny_tokenizer(), None, 800, 10)
    b = tiny_tokenizer()("b")["input_ids"][-1]
    assert (text.held_out[1:] == b).all()
    assert not (text.blocks == b).any()
    assert text.sources is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ()}, "no text"), ({"sources": ("a",), "shares": (1.0, 2.0)}, "2 shares for 1 sources"),
        ({"sources": ("a",), "shares": (0.0,)}, "must be above 0"), ({"sources": ("a",), "held_out": 0}, "held out 0"),
    ],
)
def test_a_reading_out_of_bounds_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Reading(**values)


def test_a_source_that_is_too_short_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 100)
    with pytest.raises(ValueError, match=r"short\.txt holds \d+ tokens: with 8 blocks of 10 held out"):
        read_text(Reading((f"{tmp_path}/short.txt",), held_out=8), tiny_tokenizer(), None, 800, 10)


def test_the_parent_writes_its_own_text():
    """From its start token, up to its end, the same for a seed, until there is enough."""
    model, tokenizer = dense_model("llama"), tiny_tokenizer()
    found = list(sampled(model, tokenizer, 500, seed=3, length=40))
    assert sum(map(len, found)) >= 500
    assert all(row[0] == 95 and len(row) <= 40 for row in found)
    assert all(96 not in row[1:-1] for row in found)
    state = torch.random.get_rng_state()
    again = list(documents("self", tokenizer, model, Reading(("self",)), 500, 3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [row[:10] for row in again[:4]] != [row[:10] for row in sampled(model, tokenizer, 100, seed=4)][:4]


def test_hub_data_sets_are_streamed_by_name(monkeypatch):
    """Rows in the usual forms; names by pattern; what the Hub says when it fails becomes a sentence."""
    import datasets

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "One."}, {"prompt": "Ask", "response": "Tell"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = tiny_tokenizer()
    found = list(documents("hub:owner/name:small", tokenizer, None, Reading(("x",), split="validation"), 100))
    assert [tokenizer.decode(ids) for ids in found] == ["<s>One.</s>", "<s>Ask??Tell</s>"]
    assert asked == [("owner/name", "small", "validation", True)]
    with pytest.raises(ValueError, match="expected hub:owner/name"):
        list(documents("hub:../etc", tokenizer, None, Reading(("x",)), 100))

    def away(*args, **kwargs):
        raise ConnectionError("the Hub is away")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(ValueError, match=r"hub:owner/name could not be read: the Hub is away"):
        list(documents("hub:owner/name", tokenizer, None, Reading(("x",)), 100))
    assert sources.SELF == "self"
