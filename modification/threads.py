"""Threads that OpenMP will not give."""

from __future__ import annotations

import os

import torch


def most_threads() -> int | None:
    """Threads that OpenMP's settings leave for certain; None if they set no bound."""
    if os.environ.get("OMP_DYNAMIC", "").lower() in ("true", "1"):
        return 1
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    return max(1, int(limit)) if limit.isdigit() else None


def heed_limits() -> None:
    """Ask for no more threads than there will be: torch's products by oneDNN leave undone, without a word, what those
    that are missing should have done."""
    most = most_threads()
    if most is not None and torch.get_num_threads() > most:
        torch.set_num_threads(most)
