"""Growing storage of keys and values: what one row, or one batch of equal rows, holds in one layer.

Boundary: knows lengths, growth and bytes; knows neither models nor decisions. Entries grow along one axis in
steps of a sixteenth, so that copying stays linear and spare room small. Entries at the front can be dropped,
which is how sliding windows stay bounded.
"""

from __future__ import annotations

import math
import mmap
from collections import deque

import torch
from torch import Tensor

SPARE = 16  # a full buffer grows by one part in this many
_COLUMN_BYTES = 4
MAPPED = 1 << 12  # bytes from which a CPU buffer is mapped


class Buffer:
    """Keys and values [..., H, n, D] of one row or batch; ``start`` to ``end`` of the room is in use."""

    def __init__(self) -> None:
        self.start = self.end = self.capacity = self.leading = 0
        self.entry_bytes = 0  # of the keys and values at one place, over all leading dimensions
        self.place_bytes = 0  # that a place takes, in use or not
        self.dtype: torch.dtype | None = None
        self._addresses: tuple[int, int, int | None] = (0, 0, None)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        """Entries stored."""
        return self.end - self.start

    @property
    def keys(self) -> Tensor:
        """Stored keys [..., H, length, D], a view."""
        assert self._keys is not None
        return self._keys[..., self.start : self.end, :]

    @property
    def values(self) -> Tensor:
        """Stored values [..., H, length, D], a view."""
        assert self._values is not None
        return self._values[..., self.start : self.end, :]

    @property
    def addresses(self) -> tuple[int, int, int | None]:
        """Where the buffers of keys, values and columns (None: no columns) lie; valid until the next growth."""
        return self._addresses

    def reserve(self, count: int, like: Tensor) -> None:
        """Make room for ``count`` more entries; the first ones are shaped like keys [..., H, any, D]."""
        if self._keys is not None and self.end + count <= self.capacity:
            return
        length = self.length
        needed = length + count
        self._resize(needed + needed // SPARE, like if self._keys is None else self._keys)

    def make_place(self, like: Tensor) -> None:
        """Room for one more entry, shaped like keys [H, any, D], for kernels that write by address.

        Raises:
            ValueError: keys of another type are stored: such an entry would be written amid others.
        """
        if self.end == self.capacity:
            self.reserve(1, self._shaped(like))
        if self.dtype != like.dtype:
            raise ValueError("the cache holds keys of another type than the model's: start from model.new_cache()")

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [..., H, n, D]."""
        count = keys.shape[-2]
        self.reserve(count, keys)
        assert self._keys is not None
        assert self._values is not None
        self._keys[..., self.end : self.end + count, :] = keys
        self._values[..., self.end : self.end + count, :] = values
        self.end += count

    def drop(self, count: int) -> None:
        """Forget the first ``count`` entries; their room is freed once it is more than the spare share."""
        self.start += count
        if self._keys is not None and self.start * SPARE > self.capacity:
            self._resize(self.length + self.length // SPARE, self._keys)

    def keep(self, where: Tensor | slice) -> None:
        """Keep the entries at ``where`` along n, and no more room than they need."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self.keys[..., where, :].clone(), self.values[..., where, :].clone()
            self.start, self.end = 0, self._keys.shape[-2]
            self._measure()

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
            self._measure()

    def nbytes(self) -> tuple[int, int]:
        """Bytes stored and bytes allocated."""
        return (self.end - self.start) * self.entry_bytes, self.capacity * self.place_bytes

    def _resize(self, capacity: int, like: Tensor) -> None:
        length = self.length
        shape = (*like.shape[:-2], capacity, like.shape[-1])
        # Room for both before either moves: memory that runs out leaves things as they were. Mapped room takes none
        # until it is written, so that only one old buffer more is alive meanwhile.
        rooms = [_room(shape, like.dtype, like.device) for _ in range(2)]
        for name, fresh in zip(("_keys", "_values"), rooms, strict=True):
            old: Tensor | None = getattr(self, name)
            if old is not None:
                fresh[..., :length, :] = old[..., self.start : self.end, :]
            setattr(self, name, fresh)
        self.start, self.end = 0, length
        self._measure()

    def _measure(self) -> None:
        assert self._keys is not None
        assert self._values is not None
        self.capacity, self.leading = self._keys.shape[-2], self._keys.shape[0]
        self.entry_bytes = (self._keys.nbytes + self._values.nbytes) // max(1, self.capacity)
        self.place_bytes = self.entry_bytes
        self._addresses, self.dtype = (self._keys.data_ptr(), self._values.data_ptr(), None), self._keys.dtype

    def _shaped(self, like: Tensor) -> Tensor:
        return like[None]


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor. On a CPU all but the smallest are mapped: what lives as long as a cache would otherwise lie
    scattered between short-lived tensors, and keep malloc from using their room again."""
    size = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(False):  # so that the model's forward may go on with a cache that an executor filled
        if device.type != "cpu" or size < MAPPED:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.frombuffer(_mapping(size), dtype=dtype).view(shape)


def _mapping(size: int) -> mmap.mmap:
    """Memory of this process alone, where the system knows the difference."""
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class Row(Buffer):
    """One row's entries [H, n, D] with their columns [n], in order of storing, which is that of columns."""

    def __init__(self) -> None:
        super().__init__()
        self._columns = torch.empty(0, dtype=torch.int32)
        self._dropped = 0  # entries at the front, ever
        self._marks: deque[tuple[int, int]] = deque()  # a column, and how many entries there ever were below it

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """Add entries [H, n, D] that belong to ``columns`` [n]."""
        self.append(keys, values)
        self._columns[self.end - len(columns) : self.end] = columns

    @property
    def columns(self) -> Tensor:
        """Columns of the stored entries, [n] int32."""
        return self._columns[self.start : self.end]

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
        elif self.length and int(self._columns[self.start]) < column:
            self.drop(int((self.columns < column).sum()))

    def drop(self, count: int) -> None:
        self._dropped += count
        super().drop(count)

    def keep(self, where: Tensor | slice) -> None:
        kept = self.columns[where].clone()
        super().keep(where)
        self._set_columns(kept)

    def copy(self) -> Row:
        other = Row()
        if self.length:
            other.add(self.keys, self.values, self.columns)
        other._dropped, other._marks = self._dropped, self._marks.copy()
        return other

    def _unmark(self, end: int) -> None:
        while self._marks and self._marks[-1][0] > end:
            self._marks.pop()

    def _resize(self, capacity: int, like: Tensor) -> None:
        fresh = _room((capacity,), torch.int32, like.device)
        fresh[: self.length] = self.columns
        super()._resize(capacity, like)
        self._set_columns(fresh)

    def _measure(self) -> None:
        super()._measure()
        self.place_bytes += _COLUMN_BYTES

    def _shaped(self, like: Tensor) -> Tensor:
        return like

    def _set_columns(self, columns: Tensor) -> None:
        self._columns = columns
        self._addresses = (*self._addresses[:2], columns.data_ptr())
