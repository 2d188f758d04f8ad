"""Where text comes from: files, data sets of the Hub, or the parent itself; mixed by shares, a part held out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modification.conversion.data import Text, encode_rows, pack, read_documents, token_ids

SELF = "self"
_HUB = re.compile(r"hub:([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w.-]+))?")
_HELD_OUT = 128  # blocks, at most, unless asked for more
_TOGETHER = 16  # texts that the parent writes at a time


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read for a run, and how.

    Attributes:
        sources: files; ``hub:owner/name`` or ``hub:owner/name:config`` for a data set; or ``self``, text that the
            parent samples.
        shares: of the training tokens, one for each source; None: alike.
        split: only rows whose ``split`` field is this; of a data set, its split.
        responses: learn what the assistant says alone.
        held_out: blocks kept for the report; None: an eighth, at most 128.
        held_out_source, held_out_split: another source for them, and its split. Held-out loss is over all tokens.
        reweight: see ``Text``.
    """

    sources: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    split: str | None = None
    responses: bool = False
    held_out: int | None = None
    held_out_source: str | None = None
    held_out_split: str | None = None
    reweight: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no text: name at least one source")
        if self.shares is not None:
            if len(self.shares) != len(self.sources):
                raise ValueError(f"{len(self.shares)} shares for {len(self.sources)} sources: give one for each")
            if not all(share > 0 for share in self.shares):
                raise ValueError(f"shares {list(self.shares)}: each must be above 0")
        if self.held_out_source in self.sources and self.held_out_split == self.split:
            raise ValueError(f"{self.held_out_source} is training text too: hold out another source, or another split")
        if self.reweight and len(self.sources) < 2:
            raise ValueError("reweighting moves weights between sources: name two or more")
        plain = [source for source in self.sources if ".txt" in Path(source).suffixes]
        if self.responses and plain:
            raise ValueError(f"{plain[0]} is plain text: it has no responses to learn alone; leave --responses out")
        if self.held_out is not None and self.held_out < 1:
            raise ValueError(f"held out {self.held_out}: must be 1 block or more")


def read_text(reading: Reading, tokenizer: Any, model: Any, tokens: int, block: int, seed: int = 0) -> Text:
    """Training and held-out text for ``tokens`` training tokens, mixed and shuffled.

    Args:
        model: the parent, for ``self``.

    Raises:
        FileNotFoundError, ValueError: a source that isn't there, can't be read, or is too short.
    """
    shares = np.array(reading.shares or [1.0] * len(reading.sources))
    shares = shares / shares.sum()
    apart = reading.held_out or _HELD_OUT
    blocks, held_out, sources = [], [], []
    for at, (source, share) in enumerate(zip(reading.sources, shares, strict=True)):
        wanted = int(tokens * share) + (0 if reading.held_out_source else int(np.ceil(apart * share)) * block)
        own = pack(documents(source, tokenizer, model, reading, wanted, seed), block, wanted)
        count = 0 if reading.held_out_source else _count_apart(own, reading.held_out, share, source)
        held_out.append(own[:count])
        blocks.append(own[count:])
        sources.append(np.full(len(own) - count, at))
    if reading.held_out_source:
        other = dataclasses.replace(reading, split=reading.held_out_split, held_out_source=None, reweight=False)
        found = documents(reading.held_out_source, tokenizer, model, other, apart * block, seed + 1)
        held_out = [pack(found, block, apart * block)]
    order = np.random.default_rng(seed).permutation(sum(map(len, blocks)))
    return Text(
        np.concatenate(blocks)[order], token_ids(np.concatenate(held_out)), tuple(map(_shown, reading.sources)),
        np.concatenate(sources)[order] if len(blocks) > 1 else None, reading.reweight,
    )


def documents(
    source: str, tokenizer: Any, model: Any, reading: Reading, tokens: int, seed: int = 0
) -> Iterator[list[int]]:
    """A source's documents as token ids."""
    if source == SELF:
        return sampled(model, tokenizer, tokens, seed)
    if source.startswith("hub:"):
        return encode_rows(_hub_rows(source, reading.split or "train"), tokenizer, None, reading.responses)
    return read_documents(source, tokenizer, reading.split, reading.responses)


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, tokens: int, seed: int = 0, length: int = 256) -> Iterator[list[int]]:
    """Texts that a dense model writes from its start token at temperature 1, until there are ``tokens`` of them.

    Raises:
        ValueError: the tokenizer has no token to start from.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = end if start is None else start
    if start is None:
        raise ValueError("the parent can't write text by itself: its tokenizer has neither a start nor an end token")
    made, context = 0, getattr(model.config, "max_position_embeddings", None) or length
    length = min(length, context)
    ids = torch.full((_TOGETHER, 1), start, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while made < tokens:
            rows = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, pad_token_id=start if end is None else end,
            )
            for row in rows.tolist():
                stop = row.index(end, 1) + 1 if end is not None and end in row[1:] else len(row)
                made += stop
                yield row[:stop]


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    found = _HUB.fullmatch(source)
    if found is None:
        raise ValueError(f"{source!r}: expected hub:owner/name or hub:owner/name:config")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source}: data sets of the Hub need datasets: pip install datasets") from None
    try:
        rows = load_dataset(found[1], found[2], split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}, row {number}", dict(row)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} could not be read: {error}") from error


def _count_apart(own: npt.NDArray[np.int32], asked: int | None, share: float, source: str) -> int:
    """Blocks of one source to hold out."""
    most = max(1, int(np.ceil((asked or _HELD_OUT) * share)))
    count = most if asked else min(most, max(1, len(own) // 8))
    if len(own) < 2 * count:
        raise ValueError(
            f"{source} holds {own.size} tokens: with {count} blocks of {own.shape[1]} held out, too few are left to "
            "train on; give more text, or a smaller --held-out or --block"
        )
    return count


def _shown(source: str) -> str:
    """A source's name for reports that may be published: no folders."""
    return source if source == SELF or source.startswith("hub:") else Path(source).name
