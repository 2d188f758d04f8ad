"""RaggedCache: keys and values of routed tokens only, with their own length per layer and row.

Owns what is stored where; growth and bytes are in storage.py, what attention is handed in slots.py. An entry
knows its column, the place of its token in the padded sequence; masks are built from columns, so entries need
not be complete or in order.
Layers with a sliding window drop what has left it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from modification.slots import Slots
from modification.storage import Buffer, Row


class KVBytes(NamedTuple):
    """Sizes of a cache, in bytes.

    Attributes:
        stored: keys and values held.
        allocated: what the buffers take, room to grow and column numbers included.
        dense: what the dense parent would store for the same tokens.
    """

    stored: int
    allocated: int
    dense: int


class _Layer(CacheLayerMixin):
    """What dense and ragged layers share.

    Attributes:
        seen: columns that went by, stored or not: the length that the model sees.
        window: sliding-window length in tokens, or None.
        floor: entries of columns below this have left the window and were dropped. A margin is kept, so that
            decoding methods that guess ahead can step back.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.seen, self.floor, self.window = 0, 0, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen - self.floor + query_length, self.floor

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

    def row(self) -> Buffer:
        """The storage of a batch of one row."""
        raise NotImplementedError

    def stores(self) -> Sequence[Buffer]:
        """All storage there is."""
        raise NotImplementedError

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Store entries [H, n, D] of a batch of one row; all keys and values [H, K, D], before the window moves on."""
        raise NotImplementedError

    def row_columns(self) -> Tensor:
        """Columns of the entries of a batch of one row, [K]."""
        raise NotImplementedError

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new columns, stored or not, and drop what no later token can see."""
        self.seen += tokens
        if self.window is not None and (floor := self.seen - self.window + 1 - margin(self.window)) > self.floor:
            self._drop_before(floor)
            self.floor = floor

    def settle(self, end: int) -> None:
        """Drop the entries of columns from ``end`` on, whether or not they were counted; of a batch of one row."""
        raise NotImplementedError

    def _drop_before(self, column: int) -> None:
        raise NotImplementedError

    def cropped(self, tokens_to_remove: int) -> int:
        """The length after ``crop``, which takes tokens to remove as a negative number (the stock contract).

        Raises:
            ValueError: a positive number, or a step back to where the window's entries are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        end = max(0, self.seen + tokens_to_remove)
        if self.window is not None and self.floor > max(0, end - self.window + 1):
            raise ValueError(
                f"crop({tokens_to_remove}): the cache has {self.seen} tokens and dropped what left the sliding window "
                f"of {self.window}; it can go back by {margin(self.window)} at most. Start from an empty cache"
            )
        return end


class GrowingLayer(_Layer):
    """A dense layer's cache [B, H, T, D] that grows in steps instead of by concatenation."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(window)
        self.is_sliding = window is not None  # asked for by the stock masks
        self.buffer = Buffer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.buffer.append(key_states, value_states)
        found = self.buffer.keys, self.buffer.values
        self.advance(key_states.shape[-2])
        return found

    def row(self) -> Buffer:
        return self.buffer

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.buffer.append(keys[None], values[None])
        return self.buffer.keys[0], self.buffer.values[0]

    def row_columns(self) -> Tensor:
        return torch.arange(self.floor, self.floor + self.buffer.length, device=self.buffer.keys.device)

    def batch_rows(self) -> int:
        return self.buffer.leading if self.buffer.length else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffer.take_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if not (end := self.cropped(tokens_to_remove)):
            self.reset()
        elif end < self.seen:
            self.buffer.keep(slice(0, end - self.floor))
            self.seen = end

    def settle(self, end: int) -> None:
        self.buffer.end = min(self.buffer.end, self.buffer.start + end - self.floor)
        self.seen = end

    def reset(self) -> None:
        self.buffer, self.seen, self.floor = Buffer(), 0, 0

    def stores(self) -> Sequence[Buffer]:
        return (self.buffer,)

    def _drop_before(self, column: int) -> None:
        self.buffer.drop(column - self.floor)


class RaggedLayer(_Layer):
    """A MoD layer's cache: one :class:`Row` per batch row, holding the tokens routed there."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(window)
        self.rows: list[Row] = []

    def open(
        self, batch: int, rows: Sequence[int], columns: Tensor, stored: Tensor | None, fillers: bool = False
    ) -> Slots:
        """A window for one attention call over ``rows``.

        Args:
            batch: rows of the whole batch.
            rows: the R rows that take part.
            columns: columns of the call's new tokens, [R, N].
            stored: which new tokens to store, [R, N]; None for all.
            fillers: the others are nobody's, see :class:`Slots`.
        """
        if not self.rows:
            self.rows = [Row() for _ in range(batch)]
            self.is_initialized = True
        if batch != len(self.rows):
            raise ValueError(f"the cache holds a batch of {len(self.rows)}, not of {batch}")
        return Slots([self.rows[row] for row in rows], columns, stored, fillers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a ragged layer is written through open(); call the model, not its base model")

    def row(self) -> Row:
        if not self.rows:
            self.rows, self.is_initialized = [Row()], True
        return self.rows[0]

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        row = self.row()
        row.add(keys, values, columns)
        return row.keys, row.values

    def row_columns(self) -> Tensor:
        return self.rows[0].columns

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
        end = self.cropped(tokens_to_remove)
        if end < self.seen:
            self.seen = end
            for row in self.rows:
                row.crop(end)

    def settle(self, end: int) -> None:
        for row in self.rows:
            row.settle(end)
        self.seen = end

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        if self.window is not None:
            for row in self.rows:
                row.mark(self.seen)

    def reset(self) -> None:
        self.rows, self.seen, self.floor = [], 0, 0

    def stores(self) -> Sequence[Buffer]:
        return self.rows

    def _drop_before(self, column: int) -> None:
        for row in self.rows:
            row.drop_before(column)


class RaggedCache(Cache):
    """A cache for one MoD model: ragged MoD layers, growing dense layers.

    Args:
        mod_layers: which layers are MoD layers.
        entry_bytes: bytes of one token's keys and values in one layer.
        windows: sliding-window length of each layer, None where attention is full.

    Attributes:
        tokens: ids of the row that an executor has put in; empty when the cache was filled by the model's forward.
        owner: the model that made it.
        sizes: bytes stored and allocated by one row, where they are known; whoever writes to it behind its back forgets
            them.
    """

    def __init__(self, windows: Sequence[int | None], mod_layers: Iterable[int], entry_bytes: int) -> None:
        routed = set(mod_layers)
        layers = [(RaggedLayer if at in routed else GrowingLayer)(window) for at, window in enumerate(windows)]
        super().__init__(layers=list(layers))
        self.mod_layers = tuple(sorted(routed))
        self.entry_bytes = entry_bytes
        self.windows = tuple(windows)
        self.sizes: tuple[int, int] | None = None
        self._bounded = [window for window in windows if window is not None]
        self._full = len(windows) - len(self._bounded)
        self.tokens: list[int] = []
        self.owner: weakref.ref[Any] | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; their number is given as a negative one. All layers, or none if one can't."""
        for layer in self.layers:
            layer.cropped(tokens_to_remove)
        self.sizes = None
        super().crop(tokens_to_remove)
        self.tokens = self.tokens[: self.get_seq_length()]

    def reset(self) -> None:
        """Empty the cache and free its memory."""
        super().reset()
        self.tokens, self.sizes = [], None

    def settle(self) -> None:
        """Forget what a step that failed half-way has written beyond ``tokens``."""
        self.sizes = None
        for layer in self.layers:
            layer.settle(len(self.tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.sizes = None
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.sizes = None
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sizes = None
        super().batch_repeat_interleave(repeats)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new columns in the MoD layers, whether or not they were stored there."""
        self.sizes = None
        for index in self.mod_layers:
            self.layers[index].advance(tokens)

    def advance_all(self, tokens: int, sizes: tuple[int, int] | None = None) -> None:
        """Count ``tokens`` new columns in every layer: for callers that wrote a row themselves.

        Args:
            sizes: bytes stored and allocated now, from callers that know them.
        """
        if self._bounded:
            for layer in self.layers:
                layer.advance(tokens)
            sizes = None  # windows may just have dropped something
        else:  # nothing but the count moves, and a call for each layer is felt between two tokens
            for layer in self.layers:
                layer.seen += tokens
        self.sizes = sizes

    def lengths(self) -> dict[int, list[int]]:
        """Entries stored per MoD layer and row."""
        return {index: self.layers[index].lengths() for index in self.mod_layers}

    def nbytes(self) -> KVBytes:
        """Bytes stored, allocated, and what the dense parent would store."""
        seen, rows, known = self.layers[0].seen, 1, self.sizes
        if known is None:
            sizes = [store.nbytes() for layer in self.layers for store in layer.stores()]
            known = sum(stored for stored, _ in sizes), sum(allocated for _, allocated in sizes)
            rows = max(1, *(layer.batch_rows() for layer in self.layers))
            if rows == 1 and not self._bounded:
                self.sizes = known
        stored, allocated = known
        # The stock cache of a sliding-window layer keeps the last window - 1 tokens.
        tokens = seen * self._full + sum(min(seen, window - 1) for window in self._bounded)
        return KVBytes(stored, allocated, rows * tokens * self.entry_bytes)


def margin(window: int) -> int:
    """Entries kept beyond a sliding window."""
    return 16 + window // 16
