"""What the shipped storyteller reads: every story in each reading, whole if it fits; made chats by the rules."""

from __future__ import annotations

import json

import numpy as np
import pytest
from browsing import MODELS
from make_parent import CHAT_TEMPLATE
from mixture import CONTEXT, readings
from transformers import AutoTokenizer

BLOCK = 256
pytestmark = pytest.mark.skipif(not MODELS, reason="no MoD model is shipped in assets/")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS[0].parent)


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """Thirty stories, and two readings of them."""
    folder = tmp_path_factory.mktemp("storyteller")
    with (folder / "text.jsonl").open("w") as file:
        for at in range(30):
            told = " ".join(f"Fox {at} ran {step} miles." for step in range(5 + at % 7))
            split = "val" if at % 10 == 9 else "train"
            file.write(json.dumps({"prompt": f"Tell tale {at}.", "response": told, "split": split}) + "\n")
    readings(folder, folder / "text.jsonl", tokenizer, BLOCK, 2)
    return folder


def documents(packed):
    """The documents of packed blocks, as tuples of what is written."""
    return [
        tuple(part.tolist())
        for written, places in packed
        for part in np.split(written, np.flatnonzero(places == 0)[1:])
    ]


def test_each_reading_has_every_story_whole_and_none_that_is_held_out(work, tokenizer):
    halves = [np.load(work / "readings" / f"{BLOCK}-{seed}.npy") for seed in range(2)]
    assert not np.array_equal(*(half[: min(map(len, halves))] for half in halves))
    for half in halves:
        found = set(documents(half))
        for at in range(30):
            told = " ".join(f"Fox {at} ran {step} miles." for step in range(5 + at % 7))
            chat = [{"role": "user", "content": f"Tell tale {at}."}, {"role": "assistant", "content": told}]
            assert (tuple(tokenizer.apply_chat_template(chat)["input_ids"]) in found) == (at % 10 != 9)


def test_what_is_made_is_not_made_again(work, tokenizer):
    """And a file that is missing comes out as it was."""
    places = sorted((work / "readings").iterdir())
    before = {path: path.stat().st_mtime_ns for path in places}
    lost = work / "readings" / f"{BLOCK}-1.npy"
    held = lost.read_bytes()
    lost.unlink()
    again = readings(work, work / "text.jsonl", tokenizer, BLOCK, 2)
    assert lost.read_bytes() == held
    assert {path: path.stat().st_mtime_ns for path in places if path != lost} == {
        path: at for path, at in before.items() if path != lost
    }
    assert again.shape[1:] == (2, BLOCK)


def test_of_a_chat_about_facts_the_answers_alone_are_learnt(work, tokenizer):
    """Their other tokens are written below 0; every learnt one is part of an answer that its story gives away."""
    held = np.load(work / "readings" / "made-0.npz")
    chats = [part for part in np.split(held["ids"], held["ends"][:-1]) if (part < 0).any()]
    assert chats
    for chat in chats:
        assert len(chat) <= CONTEXT
        ids = np.where(chat < 0, -1 - chat, chat)
        learnt = np.split(ids, np.flatnonzero(np.diff(chat < 0)) + 1)[int(chat[0] < 0) :: 2]
        asked = tokenizer.decode(ids[chat < 0])
        for answer in learnt:
            word = tokenizer.decode(answer, skip_special_tokens=True).rstrip(".").split()[-1]
            assert word in asked


def test_the_template_is_the_shipped_one(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
