"""Growing storage of keys and values: what one row, or one batch of equal rows, holds in one layer.

Boundary: knows lengths, growth and bytes; knows neither models nor decisions. Entries grow along one axis in
steps of a sixteenth, so that copying stays linear and spare room small. Entries at the front can be dropped,
which is how sliding windows stay bounded.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

import torch
from torch import Tensor

from modification.room import Room

SPARE = 16  # a full buffer grows by one part in this many
_COLUMN_BYTES = 4
KINDS = {torch.float32: 1, torch.bfloat16: 2}  # as kernels.cpp counts them; 0: nothing is stored yet
_OTHER = 3


class Buffer(ctypes.Structure):
    """Keys and values [..., H, n, D] of one row or batch; ``start`` to ``end`` of the room is in use.

    Its fields are ``Place`` in kernels.cpp, which writes entries there and moves ``end`` on: a step need not tell
    where each layer's are.

    Attributes:
        keys_at, values_at, columns_at: where the rooms lie (0: there are no columns); valid until the next growth.
        capacity: entries that there is room for.
        kind: the entries' type, where kernels can write them.
    """

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("keys_at", "values_at", "columns_at")),
        *((name, ctypes.c_int64) for name in ("capacity", "start", "end", "kind")),
    )
    keys_at: int
    values_at: int
    columns_at: int
    capacity: int
    start: int
    end: int
    kind: int

    def __init__(self) -> None:
        super().__init__()
        self.leading = 0
        self.entry_bytes = 0  # of the keys and values at one place, over all leading dimensions
        self.place_bytes = 0  # that a place takes, in use or not
        self._keys: Room | None = None
        self._values: Room | None = None

    def __setstate__(self, attributes: dict[str, Any], fields: bytes) -> None:
        """Of a copy or a pickle: its rooms lie elsewhere."""
        super().__setstate__(attributes, fields)  # type: ignore[misc]
        if self._keys is not None:
            self._measure()

    @property
    def length(self) -> int:
        """Entries stored."""
        return self.end - self.start

    @property
    def keys(self) -> Tensor:
        """Stored keys [..., H, length, D], a view."""
        assert self._keys is not None
        return self._keys.tensor[..., self.start : self.end, :]

    @property
    def values(self) -> Tensor:
        """Stored values [..., H, length, D], a view."""
        assert self._values is not None
        return self._values.tensor[..., self.start : self.end, :]

    def reserve(self, count: int, like: Tensor) -> None:
        """Make room for ``count`` more entries; the first ones are shaped like keys [..., H, any, D]."""
        if self._keys is not None and self.end + count <= self.capacity:
            return
        needed = self.length + count
        self._resize(needed + needed // SPARE, like)

    def make_place(self, like: Tensor) -> None:
        """Room for one more entry, shaped like keys [H, any, D], for kernels that write by address.

        Raises:
            ValueError: keys of another type are stored: such an entry would be written amid others.
        """
        if self.end >= self.capacity:
            self.reserve(1, self._shaped(like))
        if self._keys is None or (self._keys.dtype, self._keys.device.type) != (like.dtype, like.device.type):
            raise ValueError(
                "the cache holds keys of another type than the model's, or on another device: start from "
                "model.new_cache()"
            )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [..., H, n, D]."""
        count = keys.shape[-2]
        self.reserve(count, keys)
        assert self._keys is not None
        assert self._values is not None
        self._keys.tensor[..., self.end : self.end + count, :] = keys
        self._values.tensor[..., self.end : self.end + count, :] = values
        self.end += count

    def drop(self, count: int) -> None:
        """Forget the first ``count`` entries; their room is freed once it is more than the spare share."""
        self.start += count
        if self._keys is not None and self.start * SPARE > self.capacity:
            self._resize(self.length + self.length // SPARE)

    def keep(self, where: Tensor | slice) -> None:
        """Keep the entries at ``where`` along n, and no more room than they need."""
        if self._keys is not None:
            self._set(self.keys[..., where, :], self.values[..., where, :])

    def copy(self) -> Buffer:
        """An independent copy."""
        other = Buffer()
        if self._keys is not None:
            other.append(self.keys, self.values)
        return other

    def take_rows(self, rows: Tensor) -> None:
        """Replace the leading batch dimension by its ``rows``."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.take_rows(rows)
            self._values = self._values.take_rows(rows)
            self._measure()

    def nbytes(self) -> tuple[int, int]:
        """Bytes stored and bytes allocated."""
        return (self.end - self.start) * self.entry_bytes, self.capacity * self.place_bytes

    def _resize(self, capacity: int, like: Tensor | None = None) -> None:
        """Move to a room of another size; the first one's entries are shaped like keys [..., H, any, D]."""
        lead: tuple[int, ...]
        tail: tuple[int, ...]
        if self._keys is not None:
            lead, tail, kind = self._keys.lead, self._keys.tail, (self._keys.dtype, self._keys.device)
        else:
            assert like is not None
            lead, tail, kind = like.shape[:-2], like.shape[-1:], (like.dtype, like.device)
        # Room for both before either moves: memory that runs out leaves things as they were. Mapped room takes none
        # until it is written, so that only one old buffer more is alive meanwhile.
        keys, values = Room(lead, capacity, tail, *kind), Room(lead, capacity, tail, *kind)
        if self._keys is not None:
            keys.take(self._keys, self.start, self.length)
        self._keys = keys
        if self._values is not None:
            values.take(self._values, self.start, self.length)
        self._values = values
        self.start, self.end = 0, self.length
        self._measure()

    def _set(self, keys: Tensor, values: Tensor) -> None:
        """Hold these entries [..., H, n, D] instead."""
        axis = keys.dim() - 2
        self._keys, self._values = Room.holding(keys, axis), Room.holding(values, axis)
        self.start, self.end = 0, keys.shape[axis]
        self._measure()

    def _measure(self) -> None:
        assert self._keys is not None
        assert self._values is not None
        self.capacity, self.leading = self._keys.places, self._keys.lead[0]
        self.entry_bytes = (self._keys.nbytes + self._values.nbytes) // max(1, self.capacity)
        self.place_bytes = self.entry_bytes
        self.keys_at, self.values_at = self._keys.at, self._values.at
        self.kind = KINDS.get(self._keys.dtype, _OTHER) if self._keys.device.type == "cpu" else _OTHER

    def _shaped(self, like: Tensor) -> Tensor:
        return like[None]


class Row(Buffer):
    """One row's entries [H, n, D] with their columns [n], in order of storing, which is that of columns."""

    def __init__(self) -> None:
        super().__init__()
        self._columns = Room((), 0, (), torch.int32, torch.device("cpu"))
        self._dropped = 0  # entries at the front, ever
        self._marks: deque[tuple[int, int]] = deque()  # a column, and how many entries there ever were below it

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """Add entries [H, n, D] that belong to ``columns`` [n]."""
        self.append(keys, values)
        self._columns.tensor[self.end - len(columns) : self.end] = columns

    @property
    def columns(self) -> Tensor:
        """Columns of the stored entries, [n] int32."""
        return self._columns.tensor[self.start : self.end]

    @property
    def on_host(self) -> bool:
        """Whether columns can be read without waiting for a device."""
        return self._columns.device.type == "cpu"

    def crop(self, end: int) -> None:
        """Drop entries of columns from ``end`` on."""
        self._unmark(end)
        if self.length:
            self.keep((self.columns < end).nonzero().squeeze(1))

    def settle(self, end: int) -> None:
        """The same, their room kept."""
        self._unmark(end)
        self.end -= int((self.columns >= end).sum())

    def mark(self, column: int) -> None:
        """Note that all entries so far are of columns below this one, for ``drop_before`` to know on a device."""
        if not self.on_host:
            self._marks.append((column, self._dropped + self.length))

    def drop_before(self, column: int) -> None:
        """Drop the leading entries of columns below ``column``: on a device those known to be, without a look."""
        if not self.on_host:
            below = self._dropped
            while self._marks and self._marks[0][0] <= column:
                below = self._marks.popleft()[1]
            self.drop(below - self._dropped)
        elif self.length and self._first_column() < column:
            self.drop(int((self.columns < column).sum()))

    def _first_column(self) -> int:
        """The first entry's, read where it lies: it is looked at in every step, which has no time for torch."""
        return ctypes.c_int32.from_address(self.columns_at + _COLUMN_BYTES * self.start).value

    def drop(self, count: int) -> None:
        self._dropped += count
        super().drop(count)

    def keep(self, where: Tensor | slice) -> None:
        self._columns = Room.holding(self.columns[where], 0)
        super().keep(where)

    def copy(self) -> Row:
        other = Row()
        if self.length:
            other.add(self.keys, self.values, self.columns)
        other._dropped, other._marks = self._dropped, self._marks.copy()
        return other

    def _unmark(self, end: int) -> None:
        while self._marks and self._marks[-1][0] > end:
            self._marks.pop()

    def _resize(self, capacity: int, like: Tensor | None = None) -> None:
        device = like.device if self._keys is None and like is not None else self._columns.device
        fresh = Room((), capacity, (), torch.int32, device)
        if self.length:
            fresh.take(self._columns, self.start, self.length)
        # Not before keys and values have moved: until then it is these that stand beside them.
        super()._resize(capacity, like)
        self._columns, self.columns_at = fresh, fresh.at

    def _measure(self) -> None:
        super()._measure()
        self.place_bytes += _COLUMN_BYTES
        self.columns_at = self._columns.at

    def _shaped(self, like: Tensor) -> Tensor:
        return like
