"""What went wrong in the engine, as a sentence for the user where there is one."""

from __future__ import annotations

from app.errors import UserError
from modification.errors import out_of_memory

NO_MEMORY = (
    "The machine ran out of memory and this request was given up; what it held is free again. Shorten the text, ask "
    "for fewer new tokens, or choose a smaller model."
)


def sentence_of(error: BaseException) -> str | None:
    """What to tell the user; None where nobody foresaw the error."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return NO_MEMORY
    if isinstance(error, FloatingPointError):
        return f"This request was given up: {error}."
    return None
