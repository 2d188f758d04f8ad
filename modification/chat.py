"""Conversations as the text that a model reads: its chat template's doing, which is a program of the model's.

The template runs in Jinja's sandbox, which keeps it from reaching anything. Here it is kept from going on for ever.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment

from modification.errors import reason

SECONDS = 5.0  # of work that a template may take; the longest are done in a hundredth of one
_PATIENCE = 12  # times as long may pass meanwhile, on a machine that has much else to do
_TIMES, _DIGITS = 10_000, 5  # no template repeats anything so often
_OPEN = 4  # products of unknown size, each of which may take seconds once numbers have grown long
_OPENING = (("operator", "("), ("operator", ","))  # before a star that unpacks
_GROWTH = 1 << 30  # bytes by which the process may grow meanwhile
_STATM = Path("/proc/self/statm")
_LOOK = 64  # steps between two looks at them


def written(tokenizer: Any, messages: list[dict[str, str]], seconds: float = SECONDS) -> str:
    """Messages with ``role`` and ``content``, and the start of an answer, as the tokenizer's chat template writes them;
    without one, their texts.

    Raises:
        ValueError: the template fails, or works for longer than that.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        _check(tokenizer.get_chat_template())
        with _deadline(seconds):
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (Exception, _Late) as error:  # whatever a program of others raises
        raise ValueError(f"the model's chat template fails: {reason(error)}") from error


def _check(template: str) -> None:
    """Single operations that take for ever, or all memory, can't be ended, so they are not begun."""
    read = [one[1:] for one in Environment(autoescape=True).lex(template) if one[1] != "whitespace"]
    product, open_ones = 1, 0  # of what is written out, and products of what is not
    for before, (kind, value), after in zip(read, read[1:], read[2:], strict=False):
        if kind == "operator" and value == "**" and before not in _OPENING:
            raise ValueError("it computes powers")
        if kind == "operator" and value == "*" and before not in _OPENING:
            given = [number for one, number in (before, after) if one == "integer"]
            open_ones += not given
            if open_ones > _OPEN:
                raise ValueError(f"it has more than {_OPEN} products of values that are not written out")
            product *= max((int(number, 0) if len(number) <= _DIGITS else _TIMES + 1 for number in given), default=1)
            if product > _TIMES:
                raise ValueError(f"it multiplies by more than {_TIMES:,}")


class _Late(BaseException):
    """No Exception, which Jinja takes to be an expression's own affair while it compiles."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code of this thread that works for longer, or takes too much memory, is ended by ``_Late``.

    Waiting for its turn among threads is no work: many visitors' templates may be at it on few cores.
    """
    end, late = time.thread_time() + seconds, time.monotonic() + _PATIENCE * seconds
    before, most, steps = sys.gettrace(), _resident() + _GROWTH, 0

    def watch(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if time.thread_time() > end or time.monotonic() > late:
            raise _Late(f"it was not done after {seconds:g} seconds of work, or {_PATIENCE * seconds:g} in all")
        if steps % _LOOK == 0 and _resident() > most:
            raise _Late(f"it takes more than {_GROWTH / 1e9:.1f} GB of memory")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
