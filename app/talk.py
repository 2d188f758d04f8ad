"""A conversation as a tape that the chat view reads: one growing string, a JSON array a line. No tensors, no gradio.

    ["h", {...}]           header: id, the two names, blind or not
    ["u", text]            a user's message: a new turn
    ["t", side, text]      what one side (0 or 1) adds to its answer
    ["d", offset]          from this character on the two answers differ
    ["f", side, {...}]     figures of a side's answer so far
    ["e", side, text]      how a side's answer ended, as a sentence
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SideFigures:
    """One answer's figures, all measured but the dense parent's cache, which is estimated.

    Attributes:
        tokens: new tokens.
        speed: new tokens per second of this side's own time; None before the first.
        first_token: seconds from the turn's start, in this side's own time, to its first token.
        prefilled: prompt tokens that were run; the others were in the cache.
        load: share of (MoD layer, token) pairs that ran.
        kv: bytes of keys and values stored, allocated, and of the dense parent.
    """

    tokens: int
    speed: float | None
    first_token: float
    prefilled: int
    load: float
    kv: tuple[int, int, int]

    def to_dict(self) -> dict[str, Any]:
        """Rounded, for the page."""
        return {
            "tokens": self.tokens, "speed": None if self.speed is None else round(self.speed, 1),
            "first": round(self.first_token, 3), "prefilled": self.prefilled, "load": round(self.load, 4),
            "kv": list(self.kv),
        }


@dataclass(slots=True)
class ChatTape:
    """Builds the tape of one conversation; turns can be taken back.

    Attributes:
        names: the two sides as shown.
        blind: whether the page hides the names until there is a vote.
    """

    names: tuple[str, str]
    blind: bool = False
    _turns: list[list[str]] = field(default_factory=list)
    _texts: list[str] = field(default_factory=lambda: ["", ""])
    _same: int = 0
    _differ: bool = False
    _head: str = ""

    def __post_init__(self) -> None:
        self._head = self._header()

    def ask(self, message: str) -> None:
        """Begin a turn."""
        self._turns.append([])
        self._texts, self._same, self._differ = ["", ""], 0, False
        self._add("u", message)

    def say(self, side: int, text: str) -> None:
        """Add to a side's answer, and note where the two part."""
        if not text:
            return
        self._texts[side] += text
        self._add("t", side, text)
        if not self._differ:
            one, other = self._texts
            while self._same < min(len(one), len(other)) and one[self._same] == other[self._same]:
                self._same += 1
            if self._same < min(len(one), len(other)):
                self._differ = True
                self._add("d", self._same)

    def figures(self, side: int, figures: SideFigures) -> None:
        """A side's figures as they stand."""
        self._add("f", side, figures.to_dict())

    def end(self, side: int, text: str) -> None:
        """How a side's answer ended."""
        self._add("e", side, text)

    def cut(self, turns: int) -> None:
        """Take back all turns but so many: a new tape, since this one no longer only grows."""
        del self._turns[turns:]
        self._head = self._header()

    @property
    def text(self) -> str:
        """The tape so far."""
        return self._head + "".join(line for turn in self._turns for line in turn)

    def _header(self) -> str:
        return _line("h", {"id": secrets.token_hex(4), "names": list(self.names), "blind": self.blind})

    def _add(self, *record: Any) -> None:
        self._turns[-1].append(_line(*record))


def _line(*record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
