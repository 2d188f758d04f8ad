"""Text on disk -> packed blocks of token ids.

Reads plain text and JSON lines, compressed or not. Boundary: knows tokenizers
and files, nothing of models.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

SEPARATOR = "<|endoftext|>"
_OPEN_ROWS = 64  # blocks that are still being filled
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(path: str | Path, tokenizer: Any, split: str | None = None) -> Iterator[list[int]]:
    """Yield each document of a file as token ids, with its start and end marked.

    ``.txt`` holds documents separated by ``<|endoftext|>``; ``.jsonl`` holds one
    object a line: ``text``, or ``prompt`` and ``response``, or ``messages`` (the last
    two go through the chat template). ``.xz`` and ``.gz`` on top are unpacked.
    With ``split``, only JSON lines whose ``split`` field equals it are read.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: another file type, or a line without the fields above.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}")
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".txt":
        texts = _text_documents(path)
    elif kind == ".jsonl":
        texts = _json_documents(path, tokenizer, split)
    else:
        raise ValueError(f"cannot read {path.name}: expected .txt or .jsonl, optionally with .xz or .gz")
    for batch in _batches(_undamaged(path, texts), 256):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"]
        for ids, (_, framed) in zip(encoded, batch, strict=True):
            yield ids if framed else _frame(ids, tokenizer)


def pack(documents: Iterable[list[int]], block: int, max_tokens: int | None = None) -> npt.NDArray[np.int32]:
    """Join documents end to end and cut them into blocks: int32 [N, block].

    Stops once ``max_tokens`` tokens are packed; a last, partial block is dropped.
    """
    if block < 1:
        raise ValueError(f"block={block}: must be 1 token or more")
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


def pack_whole(documents: Iterable[list[int]], block: int, padding: int = 0) -> npt.NDArray[np.int32]:
    """Lay whole documents side by side in blocks, none cut unless longer than a block: int32 [N, 2, block].

    The first plane holds token ids, the second each token's place in its own document, counted from 0; transformers
    keeps documents apart by such position ids where there is no cache. What is left of a block is ``padding``, a
    document of its own whose places run on from ``block``, so that it can be told apart.
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
        ids, places = torch.from_numpy(self.packed[index].astype(np.int64))
        scored = (places > 0) & (places < len(ids))
        # Padding keeps places of its own beyond the last document, which a rotary embedding must still reach.
        return {"input_ids": ids, "position_ids": places % len(ids), "labels": ids.masked_fill(~scored, -100)}


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Packed blocks as a training set: every token is also a label."""

    def __init__(self, blocks: npt.NDArray[np.int32]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def _open(path: Path) -> TextIO:
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        return path.open(encoding="utf-8")
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8")


def _text_documents(path: Path) -> Iterator[tuple[str, bool]]:
    with _open(path) as file:
        for text in file.read().split(SEPARATOR):
            if text.strip():
                yield text.strip(), False


def _json_documents(path: Path, tokenizer: Any, split: str | None) -> Iterator[tuple[str, bool]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                if split is None or row.get("split") == split:
                    yield _render(row, tokenizer)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error


def _render(row: dict[str, Any], tokenizer: Any) -> tuple[str, bool]:
    """The text of one JSON row, and whether the chat template has framed it."""
    if "text" in row:
        return _text(row, "text"), False
    if "prompt" in row and "response" in row:
        turns = [("user", _text(row, "prompt")), ("assistant", _text(row, "response"))]
    elif isinstance(row.get("messages"), list) and row["messages"]:
        turns = [(_text(message, "role"), _text(message, "content")) for message in row["messages"]]
    else:
        raise ValueError(f"expected 'text', or 'prompt' and 'response', or 'messages'; found {sorted(row)}")
    if not tokenizer.chat_template:
        return "\n\n".join(content.strip() for _, content in turns), False
    messages = [{"role": role, "content": content.strip()} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False)), True


def _text(row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be text, not {type(value).__name__}")
    return value


def _undamaged(path: Path, texts: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    try:
        yield from texts
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is damaged or not text: {error}") from error


def _frame(ids: list[int], tokenizer: Any) -> list[int]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*start, *ids, *end]


def _batches(items: Iterator[tuple[str, bool]], size: int) -> Iterator[list[tuple[str, bool]]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
