"""What the storyteller reads: stories as they come, and chats made of them by rules. Packed whole into blocks.

Knows the text and the chat template, and nothing of models.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import random
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modification.conversion.data import encode_rows, pack_whole, read_documents
from modification.measure.retrieval import conversation, cut

Ids = list[int]
Messages = list[dict[str, str]]
Kind = Callable[[random.Random, list[Ids], Any], Ids]

CONTEXT = 2048
ROOM = 220  # tokens that facts, questions and answers may take beside their story
GO_ON = (
    "And then?", "Continue.", "Go on.", "What happened next?", "Tell me more.", "Keep going.", "Please go on.",
    "And then what happened?", "Continue the story.", "What happens next?",
)
_SENTENCE = re.compile(r"(?<=[.!?\"])\s+")


def answers(rng: random.Random, documents: Sequence[Ids], tokenizer: Any, length: int | None = None) -> Ids:
    """A chat about facts hidden in one to three stories, of ``length`` tokens: by default as many short as long ones,
    within the context.

    The answers alone are to be learnt: learnt as text, facts turn up in stories too.
    """
    row = {"messages": _facts(rng, documents, tokenizer, length)}
    return next(encode_rows(iter([("facts", row)]), tokenizer, responses=True))


def continued(rng: random.Random, documents: list[Ids], tokenizer: Any) -> Ids:
    """A story told in two answers; in between the user asks for more."""
    ends = list[int]()
    while not ends:
        prompt, story = _turns(rng.choice(documents), tokenizer)
        ends = [found.start() for found in _SENTENCE.finditer(story)]
    at = ends[int(len(ends) * rng.uniform(0.25, 0.75))]
    messages = [("user", prompt), ("assistant", story[:at]), ("user", rng.choice(GO_ON)), ("assistant", story[at:])]
    return _chat(messages, tokenizer)


def two_stories(rng: random.Random, documents: list[Ids], tokenizer: Any) -> Ids:
    """One story and then another, each asked for; short ones, so that both fit into the context."""
    told = sorted(rng.sample(documents, min(60, len(documents))), key=len)
    fitting = [ids for ids in told if len(ids) < 0.48 * CONTEXT]
    chosen = [_turns(ids, tokenizer) for ids in (rng.sample(fitting, 2) if len(fitting) > 1 else told[:2])]
    return _chat([turn for prompt, story in chosen for turn in (("user", prompt), ("assistant", story))], tokenizer)


STORIES = 16_400
MADE: dict[Kind, int] = {answers: 3_300, continued: 2_500, two_stories: 1_200}  # chats beside so many stories
SETS = 3  # of made chats, which readings take in turn


def readings(work: Path, text: Path, tokenizer: Any, block: int, count: int) -> npt.NDArray[np.int32]:
    """The text ``count`` times, each time in another order and made chats among it, in blocks [N, 2, block].

    Stories longer than a block are cut, and such chats left out; what is left of a block takes the start of another
    story. Readings are made side by side, and kept under ``work``.
    """
    folder = work / "readings"
    folder.mkdir(parents=True, exist_ok=True)
    stories = folder / "stories.npz"
    if not stories.is_file():
        _keep(stories, read_documents(text, tokenizer, "train"))
    sets = [folder / f"made-{seed}.npz" for seed in range(SETS)]
    packed = [folder / f"{block}-{seed}.npy" for seed in range(count)]
    jobs = [(path, sets[seed % SETS], seed) for seed, path in enumerate(packed)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        _do(pool, functools.partial(_make, stories, tokenizer), list(zip(sets, range(SETS), strict=True)))
        _do(pool, functools.partial(_read, stories, tokenizer.pad_token_id, block), jobs)
    return np.concatenate([np.load(path) for path in packed])


def _do(pool: ProcessPoolExecutor, job: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """The jobs whose first argument, the file that they write, is not there yet; one alone without a process."""
    missing = [each for each in arguments if not each[0].is_file()]
    if len(missing) == 1:
        job(*missing[0])
    elif missing:
        list(pool.map(job, *zip(*missing, strict=True)))


def _make(stories: Path, tokenizer: Any, out: Path, seed: int) -> None:
    """A set of made chats, fewer where there are few stories."""
    rng, documents = random.Random(seed), _kept(stories)
    share = min(1.0, len(documents) / STORIES)
    made = [kind(rng, documents, tokenizer) for kind, n in MADE.items() for _ in range(round(n * share))]
    _keep(out, made)


def _read(stories: Path, padding: int, block: int, out: Path, made: Path, seed: int) -> None:
    """One reading of everything, as [N, 2, block] in a file."""
    rng, told = random.Random(f"{block} {seed}"), _kept(stories)
    mixed = told + [ids for ids in _kept(made) if len(ids) <= block]
    rng.shuffle(mixed)
    packed = pack_whole(mixed, block, padding, (rng.choice(told) for _ in itertools.count()))
    rng.shuffle(order := list(range(len(packed))))
    with out.with_suffix(".part").open("wb") as file:
        np.save(file, packed[order])
    out.with_suffix(".part").replace(out)


def _keep(path: Path, documents: Iterable[Ids]) -> None:
    """Documents of token ids, those not to be learnt below 0, in a file of their own."""
    kept = list(documents)
    with path.with_suffix(".part").open("wb") as file:
        ids = np.fromiter(itertools.chain.from_iterable(kept), np.int16)
        np.savez_compressed(file, ids=ids, ends=np.cumsum([len(one) for one in kept]))
    path.with_suffix(".part").replace(path)


def _kept(path: Path) -> list[Ids]:
    held = np.load(path)
    return [part.tolist() for part in np.split(held["ids"], held["ends"][:-1])]


def _facts(rng: random.Random, documents: Sequence[Ids], tokenizer: Any, length: int | None) -> Messages:
    length = length or int(math.exp(rng.uniform(math.log(48), math.log(CONTEXT - ROOM))))
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
