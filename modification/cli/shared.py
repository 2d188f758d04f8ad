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
        known = "inner, interleaved, indices like 1,3,5 or (convert) auto:K"
        raise ValueError(f"--layers {text}: expected {known}") from None


def numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text}: expected numbers with commas between them") from None


def check_block(block: int, model: Any) -> None:
    """Rows must hold a next token to score, and fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if block < 2:
        raise ValueError(f"--block {block}: must be 2 or more, a token and the one after it")
    if context is not None and block > context:
        raise ValueError(f"--block {block}: the model has a context of {context} tokens; give at most that many")


def check_vocabulary(flag: str, name: str, other: Any, model: Any) -> None:
    """Two models can be compared token by token only over one vocabulary."""
    theirs, ours = other.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise ValueError(f"{flag} {name} has {theirs:,} tokens and the model {ours:,}: they need one vocabulary")
