"""Memory: what a stretch of work takes at its peak, what a model's weights will take, and what is free."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata

from modification.errors import reason
from modification.integrity import header_of

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")  # version 2, as in containers
_KIB = 1024
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # safetensors' names; others count 4


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
            trim()
            self._idle = _reset_high_water() or 0
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._idle
        elif self._idle and (high := _read("VmHWM")) is not None:
            self.bytes = max(0, high - self._idle)


def available_bytes(device: str | None = None) -> int:
    """Memory that is free on a device, in bytes: CUDA's own figure, or what Linux calls available.

    In a container, what its own limit leaves, if that is less. Where the system can't tell, the answer is a very large
    number.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = next((int(line.split()[1]) * _KIB for line in lines if line.startswith("MemAvailable:")), 1 << 62)
    return min(free, _container_bytes())


def _container_bytes() -> int:
    """What a container's limit leaves; file pages that may be dropped count as free."""
    try:
        most, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(most.read_text()) - int(used.read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no such limit: "max", or no such file
        return 1 << 62


def weight_bytes(source: str, dtype: torch.dtype | None = None, quantization: str | None = None) -> int:
    """Bytes that a model's weights take in memory, from the headers of its files; nothing is loaded.

    Args:
        source: a model folder, or ``owner/name`` on the Hub, whose files' headers are fetched.
        dtype: the type they will be turned to; by default as stored.
        quantization: ``"4bit"`` or ``"8bit"``: matrices of the layers then take that, the rest stays.

    Raises:
        ValueError: the headers can't be read.
    """
    try:
        folder = Path(source)
        headers = _local_headers(folder) if folder.is_dir() else _hub_headers(source)
        return sum(_stored(name, *header, dtype, quantization) for name, header in headers)
    except Exception as error:  # whatever damaged files or a distant server make the readers raise
        raise ValueError(f"{source}: the weights' headers can't be read: {reason(error)}") from error


def _local_headers(folder: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in header_of(path).items():
            yield name, (tensor["dtype"], tensor["shape"])


def _hub_headers(repository: str) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    for file in get_safetensors_metadata(repository).files_metadata.values():
        for name, tensor in file.tensors.items():
            yield name, (tensor.dtype, list(tensor.shape))


def _stored(name: str, kind: str, shape: list[int], dtype: torch.dtype | None, quantization: str | None) -> int:
    count = math.prod(shape)
    quantised = quantization and len(shape) == 2 and not any(part in name for part in ("embed", "head", "router"))
    if quantised:
        return count // 2 if quantization == "4bit" else count
    return count * (dtype.itemsize if dtype is not None else _BYTES.get(kind, 4))


def trim() -> None:
    """Give whole pages of freed memory back to the system, so that they don't count as in use (glibc)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(ctypes.c_size_t(0))


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
