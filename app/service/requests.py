"""What users ask for and what bounds it: frozen records, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.errors import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a shared app.

    Attributes:
        running: requests at work at once; generations of one model are decoded together.
        waiting: requests that may wait for a place.
        each: requests of one user, at work or waiting.
        cache_bytes: keys and values of all sessions together; 0: a quarter of the memory that is free at the start.
        prompt_characters: longest prompt.
        prompt_tokens: longest prompt, once it is split into tokens.
        new_tokens: longest continuation.
        models: models held in memory.
        idle: seconds after which a model that nobody uses is unloaded.
        chats: conversations whose caches are kept; the least recent goes first.
        text_tokens: longest text of a sweep.
        thresholds: most of a sweep.
        file_bytes: largest file that can be uploaded.
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
    text_tokens: int = 32_768
    thresholds: int = 101
    file_bytes: int = 20_000_000
    body_bytes: int = 8_000_000
    folders: tuple[Path, ...] = ()
    frame: float = 0.1
    free_models: bool = True
    convert: bool = True

    def check_prompt(self, prompt: str) -> str:
        """The prompt without blanks at its ends; UserError if it is empty or overlong."""
        if not isinstance(prompt, str) or not prompt:
            raise UserError("The prompt is empty. Type something, or pick an example.")
        if len(prompt) > self.prompt_characters:  # before anything looks at it
            raise UserError(
                f"The prompt has {len(prompt):,} characters; at most {self.prompt_characters:,} are read. Shorten it."
            )
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
        shifts: what is added to p in each MoD layer, [M], or empty.
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


class Dial:
    """A session's threshold, readable while a run goes on; with a shift per MoD layer, a threshold for each."""

    def __init__(self, p: float, shifts: tuple[float, ...] = ()) -> None:
        self.p, self.shifts = p, shifts

    def __call__(self) -> float | tuple[float, ...]:
        if not any(self.shifts):
            return self.p
        return tuple(min(1.0, max(0.0, self.p + shift)) for shift in self.shifts)
