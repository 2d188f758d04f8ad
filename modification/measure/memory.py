"""Peak memory of a stretch of work: CUDA's allocator, or the process's high-water mark above idle on Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_KIB = 1024


class Peak:
    """A context; ``bytes`` holds the most memory in use inside it, above what was in use at its start.

    Attributes:
        bytes: measured; None where the system can't tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._idle = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._idle = torch.cuda.memory_allocated(self.device)
        else:
            _trim()
            self._idle = _reset_high_water() or 0
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._idle
        elif self._idle and (high := _read("VmHWM")) is not None:
            self.bytes = max(0, high - self._idle)


def _reset_high_water() -> int | None:
    """Set the high-water mark back to what is resident now, in bytes; None if the system has no such thing."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _read("VmRSS")


def _read(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:")), None)


def _trim() -> None:
    """Give freed memory back to the system, so that it isn't counted as in use (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
