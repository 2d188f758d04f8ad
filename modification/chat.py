"""Conversations as the text that a model reads: its chat template's doing, which is a program of the model's."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from modification.errors import first_line

SECONDS = 5.0  # that a template may take; the longest are done in a hundredth of one


def written(tokenizer: Any, messages: list[dict[str, str]], seconds: float = SECONDS) -> str:
    """Messages with ``role`` and ``content``, and the start of an answer, as the tokenizer's chat template writes them;
    without one, their texts.

    Raises:
        ValueError: the template fails, or takes longer than that.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        with _deadline(seconds):
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # whatever a program of others raises
        raise ValueError(f"the model's chat template fails: {first_line(error)}") from error


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code of this thread that runs for longer is ended by TimeoutError. A sandbox keeps a template from
    reaching anything, and not from going in circles."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it was not done after {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
