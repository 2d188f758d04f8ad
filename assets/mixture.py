"""What the storyteller reads: stories as they come, and chats made of them by rules. Packed whole into blocks.

Boundary: documents of token ids in, blocks out; knows the chat template, and nothing of models.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from modification.conversion.data import encode_rows, pack_whole
from modification.measure.retrieval import conversation, cut

Ids = list[int]
Messages = list[dict[str, str]]
Kind = Callable[[random.Random, list[Ids], Any, int], Ids]

CONTEXT = 2048
ROOM = 220  # tokens that facts, questions and answers may take beside their story
GO_ON = (
    "And then?", "Continue.", "Go on.", "What happened next?", "Tell me more.", "Keep going.", "Please go on.",
    "And then what happened?", "Continue the story.", "What happens next?",
)
_SENTENCE = re.compile(r"(?<=[.!?\"])\s+")


def facts(rng: random.Random, documents: list[Ids], tokenizer: Any, block: int) -> Ids:
    """A chat about facts hidden in one to three stories, as many short as long ones; all of it is learnt.

    Whatever the block, it may fill the context; what is longer than the block loses its questions.
    """
    return list(tokenizer.apply_chat_template(_facts(rng, documents, tokenizer, CONTEXT))["input_ids"])


def answers(rng: random.Random, documents: list[Ids], tokenizer: Any, block: int) -> Ids:
    """The same, within the block, and the answers alone to be learnt: learnt as text, facts turn up in stories too."""
    row = {"messages": _facts(rng, documents, tokenizer, block)}
    return next(encode_rows(iter([("facts", row)]), tokenizer, responses=True))


def continued(rng: random.Random, documents: list[Ids], tokenizer: Any, block: int) -> Ids:
    """A story told in two answers; in between the user asks for more."""
    ends = list[int]()
    while not ends:
        prompt, story = _turns(rng.choice(documents), tokenizer)
        ends = [found.start() for found in _SENTENCE.finditer(story)]
    at = ends[int(len(ends) * rng.uniform(0.25, 0.75))]
    messages = [("user", prompt), ("assistant", story[:at]), ("user", rng.choice(GO_ON)), ("assistant", story[at:])]
    return _chat(messages, tokenizer)


def two_stories(rng: random.Random, documents: list[Ids], tokenizer: Any, block: int) -> Ids:
    """One story and then another, each asked for; short ones, so that both fit into a block."""
    told = sorted(rng.sample(documents, min(60, len(documents))), key=len)
    fitting = [ids for ids in told if len(ids) < 0.48 * block]
    chosen = [_turns(ids, tokenizer) for ids in (rng.sample(fitting, 2) if len(fitting) > 1 else told[:2])]
    return _chat([turn for prompt, story in chosen for turn in (("user", prompt), ("assistant", story))], tokenizer)


SECOND_READING: dict[Kind, float] = {facts: 0.12}
THIRD_READING: dict[Kind, float] = {answers: 0.15, continued: 0.2, two_stories: 0.1}


def mixed_blocks(
    rng: random.Random, documents: list[Ids], tokenizer: Any, tokens: int, block: int,
    kinds: dict[Kind, float], fill: bool = True,
) -> npt.NDArray[np.int32]:
    """Documents in another order, shares of made ones among them, whole in blocks [N, 2, block]: see ``pack_whole``.

    With ``fill``, what is left of a block takes the start of another document.
    """
    mixed = list[Ids]()
    order = iter(rng.sample(documents, len(documents)))
    while tokens > 0:
        drawn = rng.random()
        for kind, share in kinds.items():
            if drawn < share:
                one = kind(rng, documents, tokenizer, block)
                break
            drawn -= share
        else:
            one = next(order)
        mixed.append(one)
        tokens -= len(one)
    starts = (rng.choice(documents) for _ in itertools.count()) if fill else None
    packed = pack_whole(mixed, block, tokenizer.pad_token_id, starts)
    np.random.default_rng(1).shuffle(packed)
    return packed


def _facts(rng: random.Random, documents: list[Ids], tokenizer: Any, block: int) -> Messages:
    length = int(math.exp(rng.uniform(math.log(48), math.log(block - ROOM))))
    picked = rng.sample(documents, 3)
    text = tokenizer.decode([token for ids in picked for token in ids], skip_special_tokens=True)
    return conversation(rng, cut(text, length, tokenizer))


def _turns(ids: Ids, tokenizer: Any) -> tuple[str, str]:
    """Prompt and response of a document."""
    at = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    return tokenizer.decode(ids[:at], skip_special_tokens=True), tokenizer.decode(ids[at:], skip_special_tokens=True)


def _chat(turns: list[tuple[str, str]], tokenizer: Any) -> Ids:
    messages = [{"role": role, "content": content} for role, content in turns]
    return list(tokenizer.apply_chat_template(messages)["input_ids"])
