"""A model that can't be loaded, and what libraries raise, made readable."""

from __future__ import annotations

import errno

import torch

_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "could not create a memory",
              "can't start new thread")
_LONGEST = 400  # characters of a library's message


class LoadError(ValueError):
    """A model can't be loaded; the message is a sentence for the user."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever asked for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def foreseen(error: BaseException) -> bool:
    """Whether what a library raised is an error, and not a signal to end: extensions written in Rust panic with
    something that is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What to show of an error that a library raised: its first line, and the next where the first announces it."""
    if isinstance(error, KeyError) and len(error.args) == 1 and " " not in str(error.args[0]):
        return f"{error.args[0]!r} is not known"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
