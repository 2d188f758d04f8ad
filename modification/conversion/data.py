"""Text -> documents of token ids -> packed blocks.

Boundary: knows tokenizers and files, nothing of models. A token that is read but not learnt (a prompt's, where
only responses are) is written as -1 - id in documents and blocks.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

SEPARATOR = "<|endoftext|>"
_PIECE, _LONGEST = 1 << 20, 200_000_000  # characters that are read at once, and of a document at most
_OPEN_ROWS = 64  # blocks that are still being filled
_Item = TypeVar("_Item")
_Ids = TypeVar("_Ids", np.int32, np.int64)
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(
    path: str | Path, tokenizer: Any, split: str | None = None, responses: bool = False
) -> Iterator[list[int]]:
    """Yield each document of a file as token ids, with its start and end marked.

    ``.txt`` holds documents separated by ``<|endoftext|>``; ``.jsonl`` holds one object a line, ``.parquet`` one a
    row: ``text``, or ``prompt`` and ``response``, or ``messages`` (the last two go through the chat template).
    ``.xz`` and ``.gz`` on top of the first two are unpacked. With ``split``, only rows whose ``split`` field equals
    it are read; with ``responses``, only what the assistant says is to be learnt.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: another file type, or a row without the fields above.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}")
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".txt":
        rows: Iterator[tuple[str, Any]] = _text_rows(path)
    elif kind == ".jsonl":
        rows = _json_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise ValueError(f"cannot read {path.name}: expected .txt or .jsonl, optionally with .xz or .gz, or .parquet")
    yield from encode_rows(_undamaged(path, rows), tokenizer, split, responses)


def encode_rows(
    rows: Iterator[tuple[str, Any]], tokenizer: Any, split: str | None = None, responses: bool = False
) -> Iterator[list[int]]:
    """Documents of rows in the forms of ``read_documents``; each row comes with the place to blame for it."""
    for batch in _batches(_kept(rows, tokenizer, split, responses), 256):
        texts = [row for row in batch if isinstance(row, tuple)]
        found = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"] if texts else []
        encoded = iter(found)
        for row in batch:
            if isinstance(row, list):
                yield row
            else:
                ids = next(encoded)
                yield ids if row[1] else _frame(ids, tokenizer)


def pack(documents: Iterable[list[int]], block: int, max_tokens: int | None = None) -> npt.NDArray[np.int32]:
    """Join documents end to end and cut them into blocks: int32 [N, block].

    Stops once ``max_tokens`` tokens are packed; a last, partial block is dropped.
    """
    if block < 1:
        raise ValueError(f"block={block}: must be 1 token or more")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"tokens={max_tokens}: must be 1 or more")
    blocks: list[npt.NDArray[np.int32]] = []
    wanted = None if max_tokens is None else max(1, max_tokens // block)
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        while len(buffer) >= block:
            blocks.append(np.asarray(buffer[:block], dtype=np.int32))
            buffer = buffer[block:]
            if wanted is not None and len(blocks) >= wanted:
                return np.stack(blocks)
    if not blocks:
        raise ValueError(f"the text holds fewer than {block} tokens: give more text or a shorter block")
    return np.stack(blocks)


def pack_whole(
    documents: Iterable[list[int]], block: int, padding: int = 0, fillers: Iterator[list[int]] | None = None
) -> npt.NDArray[np.int32]:
    """Lay whole documents side by side in blocks, none cut unless longer than a block: int32 [N, 2, block].

    The first plane holds token ids, the second each token's place in its own document, counted from 0; transformers
    keeps documents apart by such position ids where there is no cache. What is left of a block is filled with the
    start of one of the ``fillers`` (endless), if given; or else is ``padding``, a document of its own whose places run
    on from ``block``, so that it can be told apart.
    """
    rows: list[tuple[list[int], list[int]]] = []
    open_rows: list[int] = []
    for ids in (document[:block] for document in documents):
        fits = [row for row in open_rows if len(rows[row][0]) + len(ids) <= block]
        row = max(fits, key=lambda at: len(rows[at][0]), default=len(rows))  # the fullest that has room
        if row == len(rows):
            rows.append(([], []))
            open_rows = [*open_rows, row][-_OPEN_ROWS:]
        rows[row][0].extend(ids)
        rows[row][1].extend(range(len(ids)))
    if not rows:
        raise ValueError("no documents to pack: give more text")
    packed = np.empty((len(rows), 2, block), np.int32)
    for at, (ids, places) in enumerate(rows):
        filler = next(fillers)[: block - len(ids)] if fillers is not None else []
        ids, places = ids + filler, places + list(range(len(filler)))
        spare = block - len(ids)
        packed[at] = [ids + [padding] * spare, places + list(range(block, block + spare))]
    return packed


class Documents(Dataset[dict[str, torch.Tensor]]):
    """Blocks of whole documents as a training set: no document sees another, none predicts another's start."""

    def __init__(self, packed: npt.NDArray[np.int32]) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        written, places = torch.from_numpy(self.packed[index].astype(np.int64))
        ids = torch.where(written < 0, -1 - written, written)
        scored = (places > 0) & (places < len(ids)) & (written >= 0)
        # Padding keeps places of its own beyond the last document, which a rotary embedding must still reach.
        return {"input_ids": ids, "position_ids": places % len(ids), "labels": ids.masked_fill(~scored, -100)}


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Packed blocks [N, T] as a training set: every token is also a label, unless it is written as not to be learnt.

    Args:
        sources: which source each block is from, [N]; with several sources, items say so.
    """

    def __init__(self, blocks: npt.NDArray[np.int32], sources: npt.NDArray[np.int64] | None = None) -> None:
        self.blocks, self.sources = blocks, sources

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        written = self.blocks[index].astype(np.int64)
        labels = torch.from_numpy(np.where(written < 0, -100, written))
        item = {"input_ids": torch.from_numpy(token_ids(written)), "labels": labels}
        if self.sources is not None:
            item["source"] = torch.tensor(self.sources[index])
        return item


def token_ids(written: npt.NDArray[_Ids]) -> npt.NDArray[_Ids]:
    """Token ids of blocks, those not to be learnt included; any shape."""
    return np.where(written < 0, -1 - written, written)


@dataclass(frozen=True, slots=True)
class Text:
    """What a run reads.

    Attributes:
        blocks: training text, [N, T] token ids; or whole documents side by side, [N, 2, T], see ``pack_whole``.
        held_out: text for the report, [N, T].
        names: the sources' names.
        sources: which source each block is from, [N]; None with one source.
        reweight: move the sources' weights in the loss towards those where the model lags behind its parent.
    """

    blocks: npt.NDArray[np.int32]
    held_out: npt.NDArray[np.int32]
    names: tuple[str, ...] = ()
    sources: npt.NDArray[np.int64] | None = None
    reweight: bool = False

    def dataset(self) -> Dataset[dict[str, torch.Tensor]]:
        """The training text as Trainer takes it."""
        return Blocks(self.blocks, self.sources) if self.blocks.ndim == 2 else Documents(self.blocks)

    def first(self, tokens: int) -> npt.NDArray[np.int32]:
        """The ids of the first blocks of training text, at least one, so many tokens at most: [N, T]."""
        found = self.blocks[: max(1, tokens // self.blocks.shape[-1])]
        return token_ids(found if found.ndim == 2 else found[:, 0])


def _open(path: Path) -> TextIO:
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        return path.open(encoding="utf-8")
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8")


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, text in enumerate(_separated(file), 1):
            if text.strip():
                yield f"{path.name}, document {number}", {"text": text.strip()}


def _separated(file: TextIO) -> Iterator[str]:
    """What stands between separators, read piece by piece: an unpacked file may be far larger than it looks."""
    rest = ""
    while piece := file.read(_PIECE):
        *whole, rest = (rest + piece).split(SEPARATOR)
        yield from whole
        if len(rest) > _LONGEST:
            raise ValueError(f"a document of more than {_LONGEST:,} characters: separate documents by {SEPARATOR}")
    yield rest


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path.name}, line {number}"
                try:
                    yield place, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path.name}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    filled = {name: value for name, value in row.items() if value is not None}
                    yield f"{path.name}, row {number}", filled
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is damaged or no Parquet file: {error}") from error


def _kept(
    rows: Iterator[tuple[str, Any]], tokenizer: Any, split: str | None, responses: bool
) -> Iterator[tuple[str, bool] | list[int]]:
    """Each row of the split as text and whether the chat template has framed it, or, for responses, as token ids."""
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            if split is not None and row.get("split") != split:
                continue
            turns = _turns(row)
            if turns is None:
                yield _text(row, "text"), False
            elif responses:
                yield _answers(turns, tokenizer)
            else:
                yield _rendered(turns, tokenizer)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _turns(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """A row's chat messages; None if it is plain text."""
    if "text" in row:
        return None
    if "prompt" in row and "response" in row:
        turns = [("user", _text(row, "prompt")), ("assistant", _text(row, "response"))]
    elif isinstance(row.get("messages"), list) and row["messages"]:
        turns = [(_text(message, "role"), _text(message, "content")) for message in row["messages"]]
    else:
        raise ValueError(f"expected 'text', or 'prompt' and 'response', or 'messages'; found {sorted(row)}")
    return [{"role": role, "content": content.strip()} for role, content in turns]


def _rendered(turns: list[dict[str, str]], tokenizer: Any) -> tuple[str, bool]:
    if not tokenizer.chat_template:
        return "\n\n".join(turn["content"] for turn in turns), False
    return str(tokenizer.apply_chat_template(turns, tokenize=False)), True


def _answers(turns: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, all but the assistant's turns written as not to be learnt."""
    written: list[int] = []
    before = ""
    for at, turn in enumerate(turns):
        whole, framed = _rendered(turns[: at + 1], tokenizer)
        opening = before
        if turn["role"] == "assistant" and framed:
            opening = str(tokenizer.apply_chat_template(turns[:at], tokenize=False, add_generation_prompt=True))
        elif turn["role"] == "assistant" and at:
            opening = before + "\n\n"
        if not whole.startswith(opening) or not opening.startswith(before):
            raise ValueError("its chat template does not write a conversation turn by turn: train on all of it")
        learnt = turn["role"] == "assistant"
        written += [-1 - token for token in _encode(opening[len(before) :], tokenizer)]
        written += [token if learnt else -1 - token for token in _encode(whole[len(opening) :], tokenizer)]
        before = whole
    if tokenizer.chat_template:
        return written
    framed_ids = _frame(written, tokenizer)
    return framed_ids if tokenizer.bos_token_id is None else [-1 - framed_ids[0], *framed_ids[1:]]


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _text(row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be text, not {type(value).__name__}")
    return value


def _undamaged(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from rows
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is damaged or not text: {error}") from error


def _frame(ids: list[int], tokenizer: Any) -> list[int]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*start, *ids, *end]


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
