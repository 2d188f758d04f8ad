"""RaggedCache: keys and values of routed tokens only, with their own length per layer and row.

Owns lengths, places, growth and bytes. An entry knows its column, the place of its token in the
padded sequence; masks are built from columns, so entries need not be complete or in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

NOWHERE = 2**31 - 1  # the column of a padding entry: later than every query


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Sizes of a cache, in bytes.

    Attributes:
        stored: keys and values held.
        allocated: what the buffers take, room to grow and column numbers included.
        dense: what the dense parent would store for the same tokens.
    """

    stored: int
    allocated: int
    dense: int


class Buffer:
    """Keys and values [..., H, n, D] of one row or batch, growing in steps along n."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [..., H, n, D]."""
        end = self.length + keys.shape[-2]
        if self._keys is None or end > self._keys.shape[-2]:
            self._keys = _grown(self._keys, keys, self.length, end)
            self._values = _grown(self._values, values, self.length, end)
        assert self._values is not None
        self._keys[..., self.length : end, :] = keys
        self._values[..., self.length : end, :] = values
        self.length = end

    @property
    def keys(self) -> Tensor:
        """Stored keys [..., H, length, D], a view."""
        assert self._keys is not None
        return self._keys[..., : self.length, :]

    @property
    def values(self) -> Tensor:
        """Stored values [..., H, length, D], a view."""
        assert self._values is not None
        return self._values[..., : self.length, :]

    def keep(self, where: Tensor | slice) -> None:
        """Keep the entries at ``where`` along n, and no more room than they need."""
        if self._keys is not None:
            self._keys = self.keys[..., where, :].clone()
            self._values = self.values[..., where, :].clone()
            self.length = self._keys.shape[-2]

    def copy(self) -> Buffer:
        """An independent copy."""
        other = Buffer()
        if self._keys is not None:
            other.append(self.keys, self.values)
        return other

    def take_rows(self, rows: Tensor) -> None:
        """Replace the leading batch dimension by its ``rows``."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows.to(self._keys.device))
            self._values = self._values.index_select(0, rows.to(self._values.device))

    def nbytes(self) -> tuple[int, int]:
        """Bytes stored and bytes allocated."""
        if self._keys is None or self._values is None:
            return 0, 0
        return self.keys.nbytes + self.values.nbytes, self._keys.nbytes + self._values.nbytes


class Row(Buffer):
    """One row's entries [H, n, D] with their columns [n]."""

    def __init__(self) -> None:
        super().__init__()
        self._columns: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """Add entries [H, n, D] that belong to ``columns`` [n]."""
        start = self.length
        self.append(keys, values)
        assert self._keys is not None
        capacity = self._keys.shape[-2]
        if self._columns is None or len(self._columns) < capacity:
            fresh = torch.empty(capacity, dtype=torch.int32, device=columns.device)
            if self._columns is not None:
                fresh[:start] = self._columns[:start]
            self._columns = fresh
        self._columns[start : self.length] = columns

    @property
    def columns(self) -> Tensor:
        """Columns of the stored entries, [n]."""
        return torch.empty(0, dtype=torch.int32) if self._columns is None else self._columns[: self.length]

    def crop(self, end: int) -> None:
        """Drop entries of columns from ``end`` on."""
        if self.length:
            where = (self.columns < end).nonzero().squeeze(1)
            self._columns = self.columns[where].clone()
            self.keep(where)

    def copy(self) -> Row:
        other = Row()
        if self.length:
            other.add(self.keys, self.values, self.columns)
        return other

    def nbytes(self) -> tuple[int, int]:
        stored, allocated = super().nbytes()
        return stored, allocated + (0 if self._columns is None else self._columns.nbytes)


class _Layer(CacheLayerMixin):
    """What dense and ragged layers share: ``seen`` columns, which is the length the model sees."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_rows()).repeat_interleave(repeats))

    def batch_rows(self) -> int:
        """Rows of the batch that is stored; 0 while nothing is."""
        raise NotImplementedError

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the batch by its rows at ``indices``."""
        raise NotImplementedError


class GrowingLayer(_Layer):
    """A dense layer's cache [B, H, T, D] that grows in steps instead of by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.buffer.append(key_states, value_states)
        self.seen = self.buffer.length
        return self.buffer.keys, self.buffer.values

    def batch_rows(self) -> int:
        return self.buffer.keys.shape[0] if self.buffer.length else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffer.take_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if end := _crop_end(tokens_to_remove, self.seen):
            self.buffer.keep(slice(0, end))
            self.seen = end
        elif tokens_to_remove:
            self.reset()

    def reset(self) -> None:
        self.buffer, self.seen = Buffer(), 0

    def nbytes(self) -> tuple[int, int]:
        return self.buffer.nbytes()


class RaggedLayer(_Layer):
    """A MoD layer's cache: one :class:`Row` per batch row, holding the tokens routed there."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def open(self, batch: int, rows: Sequence[int], columns: Tensor, stored: Tensor | None) -> Slots:
        """A window for one attention call over ``rows``.

        Args:
            batch: rows of the whole batch.
            rows: the R rows that take part.
            columns: columns of the call's new tokens, [R, N].
            stored: which new tokens to store, [R, N]; None for all.
        """
        if not self.rows:
            self.rows = [Row() for _ in range(batch)]
            self.is_initialized = True
        if batch != len(self.rows):
            raise ValueError(f"the cache holds a batch of {len(self.rows)}, not of {batch}")
        return Slots([self.rows[row] for row in rows], columns, stored)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a ragged layer is written through open(); call the model, not its base model")

    def lengths(self) -> list[int]:
        """Entries stored per row."""
        return [row.length for row in self.rows]

    def batch_rows(self) -> int:
        return len(self.rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.rows:
            return
        chosen = indices.tolist()
        # A row chosen twice must grow in two places.
        self.rows = [self.rows[i] if chosen.index(i) == at else self.rows[i].copy() for at, i in enumerate(chosen)]

    def crop(self, tokens_to_remove: int) -> None:
        self.seen = _crop_end(tokens_to_remove, self.seen)
        for row in self.rows:
            row.crop(self.seen)

    def reset(self) -> None:
        self.rows, self.seen = [], 0

    def nbytes(self) -> tuple[int, int]:
        sizes = [row.nbytes() for row in self.rows]
        return sum(stored for stored, _ in sizes), sum(allocated for _, allocated in sizes)


class Slots:
    """What a MoD layer hands to its attention as the cache: stores new entries, returns all keys.

    Attributes:
        past: keys that were stored before, padding included; ``update`` returns them and the N new ones.
    """

    def __init__(self, rows: list[Row], columns: Tensor, stored: Tensor | None) -> None:
        self._rows, self._columns, self._stored = rows, columns, stored
        self._whole = len(rows) == 1 and stored is None
        self.past = max(row.length for row in rows)

    def key_columns(self) -> Tensor:
        """Columns of the keys that ``update`` will return, [R, past + N]; ask before it."""
        if not self.past:
            return self._columns
        return torch.cat([_stack_columns(self._rows, self.past, self._columns), self._columns], dim=1)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store [R, H, N, D] and return the keys and values to attend over, [R, H, K, D]."""
        if self._whole:
            row = self._rows[0]
            row.add(keys[0], values[0], self._columns[0])
            return row.keys[None], row.values[None]
        if self.past:
            all_keys = torch.cat([_stack([r.keys if r.length else None for r in self._rows], self.past, keys), keys], 2)
            all_values = torch.cat(
                [_stack([r.values if r.length else None for r in self._rows], self.past, values), values], 2
            )
        else:
            all_keys, all_values = keys, values
        for at, row in enumerate(self._rows):
            where = slice(None) if self._stored is None else self._stored[at]
            row.add(keys[at][:, where], values[at][:, where], self._columns[at][where])
        return all_keys, all_values


class RaggedCache(Cache):
    """A cache for one MoD model: ragged MoD layers, growing dense layers.

    Args:
        mod_layers: which layers are MoD layers.
        entry_bytes: bytes of one token's keys and values in one layer.
        windows: sliding-window length of each layer, None where attention is full.
    """

    def __init__(self, windows: Sequence[int | None], mod_layers: Iterable[int], entry_bytes: int) -> None:
        routed = set(mod_layers)
        layers = [RaggedLayer() if index in routed else GrowingLayer() for index in range(len(windows))]
        super().__init__(layers=list(layers))
        self.mod_layers = tuple(sorted(routed))
        self.entry_bytes = entry_bytes
        self.windows = tuple(windows)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new columns in the MoD layers, whether or not they were stored there."""
        for index in self.mod_layers:
            self.layers[index].seen += tokens

    def lengths(self) -> dict[int, list[int]]:
        """Entries stored per MoD layer and row."""
        return {index: self.layers[index].lengths() for index in self.mod_layers}

    def nbytes(self) -> KVBytes:
        """Bytes stored, allocated, and what the dense parent would store."""
        sizes = [layer.nbytes() for layer in self.layers]
        rows = max(1, *(layer.batch_rows() for layer in self.layers))
        seen = self.layers[0].seen
        # The stock cache of a sliding-window layer keeps the last window - 1 tokens.
        tokens = sum(seen if window is None else min(seen, window - 1) for window in self.windows)
        dense = rows * tokens * self.entry_bytes
        return KVBytes(sum(stored for stored, _ in sizes), sum(allocated for _, allocated in sizes), dense)


def _grown(old: Tensor | None, like: Tensor, length: int, needed: int) -> Tensor:
    """A larger buffer with ``old``'s first entries; a sixteenth of spare room keeps copying linear."""
    capacity = needed if old is None else needed + needed // 16
    fresh = like.new_empty((*like.shape[:-2], capacity, like.shape[-1]))
    if old is not None:
        fresh[..., :length, :] = old[..., :length, :]
    return fresh


def _stack(parts: list[Tensor | None], length: int, like: Tensor) -> Tensor:
    """Rows' entries [H, n, D] padded with zeros to [R, H, length, D]."""
    out = like.new_zeros((len(parts), like.shape[1], length, like.shape[3]))
    for at, part in enumerate(parts):
        if part is not None:
            out[at, :, : part.shape[1]] = part
    return out


def _stack_columns(rows: list[Row], length: int, like: Tensor) -> Tensor:
    out = like.new_full((len(rows), length), NOWHERE)
    for at, row in enumerate(rows):
        out[at, : row.length] = row.columns.to(like.device)
    return out


def _crop_end(tokens_to_remove: int, seen: int) -> int:
    """The new length; the stock contract takes tokens to remove as a negative number."""
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
    return max(0, seen + tokens_to_remove)
