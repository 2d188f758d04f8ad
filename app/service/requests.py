"""What users ask for and what bounds it: frozen records, checked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import UserError

_CHARACTERS = 6  # of a token, as texts go
ALTERNATIVES = 5  # likeliest tokens that are noted at every choice


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a shared app.

    Attributes:
        running: requests at work at once; generations of one model are decoded together.
        waiting: requests that may wait for a place.
        each: requests of one user, at work or waiting.
        cache_bytes: keys and values of all sessions together; 0: a quarter of the memory that is free at the start.
        prompt_characters: longest prompt; six for each of ``prompt_tokens``, where that is more.
        prompt_tokens: longest prompt, once it is split into tokens.
        new_tokens: longest continuation.
        models: models held in memory.
        idle: seconds after which a model that nobody uses is unloaded.
        chats: conversations whose caches are kept between messages; the least recent ones are emptied first.
        text_characters, text_tokens: longest text of a sweep, before and after it is split into tokens.
        thresholds: most of a sweep.
        file_bytes: largest file that can be uploaded.
        trace_bytes: largest trace that is read; what it shows stays in memory as long as its page is open.
        measuring: seconds that a sweep or a benchmark may take; it ends between two timings.
        body_bytes: longest HTTP request that is no upload.
        folders: where model folders may lie; empty: anywhere, if others than the listed may be opened at all.
        frame: least seconds between two pictures of a run, up to thrice that where tokens come fast; a message a token
            would cost more than the token.
        free_models: whether folders and Hub ids may be typed in; off, only listed models open.
        convert: whether models may be converted here.
    """

    running: int = 8
    waiting: int = 64
    each: int = 4
    cache_bytes: int = 0
    prompt_characters: int = 200_000
    prompt_tokens: int = 32_768
    new_tokens: int = 2048
    models: int = 3
    idle: float = 900.0
    chats: int = 16
    text_characters: int = 400_000
    text_tokens: int = 32_768
    thresholds: int = 101
    file_bytes: int = 20_000_000
    trace_bytes: int = 4_000_000
    measuring: float = 1800.0
    body_bytes: int = 8_000_000
    folders: tuple[Path, ...] = ()
    frame: float = 0.1
    free_models: bool = True
    convert: bool = True

    @property
    def longest_prompt(self) -> int:
        """In characters."""
        return max(self.prompt_characters, _CHARACTERS * self.prompt_tokens)

    @property
    def longest_text(self) -> int:
        """Characters of the longest text that any field takes."""
        return max(self.longest_prompt, self.text_characters)

    def check_prompt(self, prompt: str) -> str:
        """The prompt without blanks at its ends; UserError if it is empty or overlong."""
        if not isinstance(prompt, str) or not prompt:
            raise UserError("The prompt is empty. Type something, or pick an example.")
        if len(prompt) > (most := self.longest_prompt):  # before anything
            raise UserError(f"The prompt has {len(prompt):,} characters; at most {most:,} are read. Shorten it.")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError("The prompt holds half a character (a lone surrogate). Remove it.") from None
        if not (text := prompt.strip()):
            raise UserError("The prompt is empty. Type something, or pick an example.")
        return text


@dataclass(frozen=True, slots=True)
class Request:
    """One generation as the user asked for it.

    Attributes:
        seed: makes sampling repeatable; None, or a negative number, draws a new one.
        shifts: what is added to p in each MoD layer, [M], or empty.

    Raises:
        UserError: a value that is no such thing, or out of bounds; the message names it and the bound.
    """

    prompt: str
    model: str
    max_new_tokens: int = 300
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    chat: bool = True
    shifts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most in (("max_new_tokens", 1, 10**9), ("top_k", 0, 10**9)):
            object.__setattr__(self, name, whole(getattr(self, name), _WORDS[name], least, most))
        for name, least, most in (("temperature", 0.0, 10.0), ("top_p", 0.0, 1.0)):
            object.__setattr__(self, name, number(getattr(self, name), _WORDS[name], least, most))
        seed = -1 if self.seed is None else whole(self.seed, "Seed", -(1 << 62), 1 << 62)
        object.__setattr__(self, "seed", seed if seed >= 0 else secrets.randbelow(1 << 31))
        shifts = tuple(number(shift, "Shift of p", -1.0, 1.0) for shift in self.shifts)
        object.__setattr__(self, "shifts", shifts)
        object.__setattr__(self, "chat", bool(self.chat))
        if not isinstance(self.model, str):
            raise UserError("Choose a model, or type the path of a model folder.")

    def sampling(self) -> dict[str, Any]:
        """How tokens are chosen, as the engine's ``generate`` takes it."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}


_WORDS = {"max_new_tokens": "New tokens", "top_k": "Top-k", "temperature": "Temperature", "top_p": "Top-p"}


def whole(value: object, what: str, least: int = 0, most: int = 10**9) -> int:
    """A whole number; UserError names what it is and its bounds."""
    found = number(value, what, least, most)
    if found != int(found):
        raise UserError(f"{what} {value!r}: give a whole number.")
    return int(found)


def number(value: object, what: str, least: float, most: float) -> float:
    """A number within bounds; UserError names what it is and its bounds."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{what} {str(value)[:40]!r}: give a number from {least:g} to {most:g}.") from None
    if not least <= found <= most:
        raise UserError(f"{what} {found:g}: give a number from {least:g} to {most:g}.")
    return found
