"""Memory for entries of keys, values or columns, and copies of them: what a growing buffer moves into and out of.

On a CPU it is copied by address, and a tensor over it is made when somebody asks: a decode step that finds a buffer
full would pay some 50 µs for each of torch's operations, all of them with cold caches.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAPPED = 1 << 20  # bytes from which a CPU room is mapped


class Room:
    """Memory for places [*lead, n, *tail]; what it holds at first means nothing.

    Large ones on a CPU are mapped: what lives as long as a cache would otherwise lie scattered between short-lived
    tensors, and keep malloc from using their room again. For small ones that takes longer than it is worth: a page's
    first use costs up to 5 µs.

    Args:
        lead: dimensions before the places.
        places: how many, n.
        tail: dimensions of a place.

    Attributes:
        at: its address.
    """

    def __init__(
        self, lead: tuple[int, ...], places: int, tail: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lead, self.places, self.tail, self.dtype, self.device = lead, places, tail, dtype, device
        self._place_bytes, self._repeats = math.prod(tail) * dtype.itemsize, math.prod(lead)
        self.nbytes = self._repeats * places * self._place_bytes
        self._memory: Any = None
        self._tensor: Tensor | None = None
        if device.type == "cpu" and self.nbytes:
            self._memory = _mapping(self.nbytes) if self.nbytes >= MAPPED else bytearray(self.nbytes)
            self.at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        else:
            with torch.inference_mode(False):  # so that the model's forward may go on with what an executor filled
                self._tensor = torch.empty((*lead, places, *tail), dtype=dtype, device=device)
            self.at = self._tensor.data_ptr()

    @classmethod
    def holding(cls, tensor: Tensor, axis: int) -> Room:
        """A room with a copy of a tensor, whose places lie along ``axis``."""
        shape = tuple(tensor.shape)
        room = cls(shape[:axis], shape[axis], shape[axis + 1 :], tensor.dtype, tensor.device)
        room.tensor.copy_(tensor)
        return room

    @property
    def tensor(self) -> Tensor:
        """All of it, [*lead, n, *tail]."""
        if self._tensor is None:
            with torch.inference_mode(False):
                flat = torch.frombuffer(self._memory, dtype=self.dtype)
                self._tensor = flat.view(*self.lead, self.places, *self.tail)
        return self._tensor

    def take_rows(self, rows: Tensor) -> Room:
        """A room with the leading dimension's ``rows`` alone, and as many places."""
        room = Room((len(rows), *self.lead[1:]), self.places, self.tail, self.dtype, self.device)
        torch.index_select(self.tensor, 0, rows.to(self.device), out=room.tensor)
        return room

    def take(self, other: Room, first: int, count: int) -> None:
        """Copy ``count`` of another room's places, from its ``first`` on, to the beginning of this one."""
        if self.device.type != "cpu" or other.device.type != "cpu" or other.tracked:
            axis = len(self.lead)
            self.tensor.narrow(axis, 0, count).copy_(other.tensor.narrow(axis, first, count))
            return
        size = self._place_bytes
        for at in range(self._repeats):
            source = other.at + (at * other.places + first) * size
            ctypes.memmove(self.at + at * self.places * size, source, count * size)

    @property
    def tracked(self) -> bool:
        """Whether torch notes gradients of what was written."""
        return self._tensor is not None and self._tensor.requires_grad

    def __reduce__(self) -> tuple[Callable[..., Room], tuple[Tensor, int]]:
        """Copies and pickles are of what it holds."""
        return Room.holding, (self.tensor.detach(), len(self.lead))


def _mapping(size: int) -> mmap.mmap:
    """Memory of this process alone, where the system knows the difference."""
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
