"""Conversations as the text that a model reads: its chat template's doing, which is a program of the model's.

The template runs in Jinja's sandbox, which keeps it from reaching anything. Here it is kept from going on for ever.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment

from modification.errors import first_line

SECONDS = 5.0  # that a template may take; the longest are done in a hundredth of one
_TIMES = 10_000  # no template repeats anything so often


def written(tokenizer: Any, messages: list[dict[str, str]], seconds: float = SECONDS) -> str:
    """Messages with ``role`` and ``content``, and the start of an answer, as the tokenizer's chat template writes them;
    without one, their texts.

    Raises:
        ValueError: the template fails, or takes longer than that.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        _check(tokenizer.get_chat_template())
        with _deadline(seconds):
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (Exception, _Late) as error:  # whatever a program of others raises
        raise ValueError(f"the model's chat template fails: {first_line(error)}") from error


def _check(template: str) -> None:
    """Single operations that take for ever, or all memory, can't be ended, so they are not begun."""
    before: tuple[str, str] = ("", "")
    for _, kind, value in Environment(autoescape=True).lex(template):
        if kind == "whitespace":
            continue
        times = [one[1] for one in (before, (kind, value)) if one[0] == "integer"]
        product = "*" in (value if kind == "operator" else "", before[1] if before[0] == "operator" else "")
        if kind == "operator" and value == "**":
            raise ValueError("it computes powers")
        if product and any(len(number) > len(str(_TIMES)) or int(number, 0) > _TIMES for number in times):
            raise ValueError(f"it multiplies by more than {_TIMES:,}")
        before = kind, value


class _Late(BaseException):
    """No Exception, which Jinja takes to be an expression's own affair while it compiles."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code of this thread that runs for longer is ended by ``_Late``."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _Late(f"it was not done after {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
