"""How several commands read their arguments."""

from __future__ import annotations

from typing import Any


def layers_of(text: str) -> Any:
    """A rule's name, or layer indices."""
    if text in ("inner", "interleaved"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers {text}: expected inner, interleaved or indices like 1,3,5") from None


def numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text}: expected numbers with commas between them") from None
