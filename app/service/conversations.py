"""Conversations: two models' sides of a chat, each with a cache of its own that lives between turns.

The tokens of earlier turns are kept as they were made, so that they are found in the cache again whatever the
tokenizer would make of their text. How answers are made: ``answers.py``.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from app.errors import UserError
from app.service.loaded import Loaded
from app.service.requests import Limits
from app.talk import ChatTape, SideFigures
from modification import chat

_TEMPLATE = 64  # tokens that a chat template may put around a message


@dataclass(slots=True)
class Turn:
    """A message, the two answers to it as text, and the answers' figures."""

    message: str
    answers: list[str] = field(default_factory=lambda: ["", ""])
    figures: list[SideFigures | None] = field(default_factory=lambda: [None, None])


@dataclass(slots=True)
class Side:
    """One side of a conversation: its cache and what that was filled with.

    A model that is let go is not kept by chats that it once was part of.

    Attributes:
        text, ids: the conversation as it was last written, and its tokens.
        ends: where prompts and answers end, in characters and in tokens.
    """

    held: weakref.ref[Loaded]
    cache: Any
    text: str = ""
    ids: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: Loaded) -> Side:
        """An empty one."""
        return cls(weakref.ref(loaded), loaded.model.new_cache())

    @property
    def loaded(self) -> Loaded:
        """Its model, which is lent while an answer is made."""
        found = self.held()
        assert found is not None
        return found

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the messages; those seen before stay the tokens they were."""
        tokenizer = self.loaded.tokenizer
        whole = written(tokenizer, messages)
        self.ends = [(end, tokens) for end, tokens in self.ends if whole.startswith(self.text[:end])]
        characters, tokens = self.ends[-1] if self.ends else (0, 0)
        plain = tokenizer.chat_template or tokens  # a text without a template gets the tokenizer's own start
        fresh = tokenizer(whole[characters:], add_special_tokens=not plain)["input_ids"]
        self._go_on(whole, [*self.ids[:tokens], *fresh])
        return self.ids

    def said(self, text: str, tokens: list[int]) -> None:
        """Remember an answer to the last prompt as the tokens it was made of."""
        if tokens:
            self._go_on(self.text + text, self.ids + tokens)

    def _go_on(self, text: str, ids: list[int]) -> None:
        self.text, self.ids = text, ids
        self.ends.append((len(text), len(ids)))

    def close(self) -> None:
        """Free the cache."""
        self.cache.reset()
        self.text, self.ids, self.ends = "", [], []


@dataclass(slots=True)
class Conversation:
    """One session's chat.

    Attributes:
        names: the two models' names, in the order shown.
        tape: all turns as the page shows them.
        busy: held while an answer waits or is being made, or a turn is taken back.
        filling: held while its caches are in use: not while its request waits.
        closed: whether the caches go as soon as it is not busy.
        inside: whether its request has got its place, and its caches count as promised.
    """

    names: tuple[str, str]
    tape: ChatTape
    turns: list[Turn] = field(default_factory=list)
    threads: list[Side] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)
    busy: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    inside: bool = False
    filling: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def alone(self, patience: float = 0.0) -> Iterator[None]:
        """Nobody else answers or cuts meanwhile; UserError if an answer is still being made after ``patience``."""
        if not self.busy.acquire(timeout=patience):
            raise UserError("An answer is still being made. Wait for it, or press Stop.")
        try:
            yield
        finally:
            self.used = time.monotonic()
            self.busy.release()
            if self.closed:
                self._free()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Its caches are in use meanwhile, and count as its request's, not as kept."""
        with self.filling:
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

    def empty(self) -> int:
        """Free what the caches hold, unless they are in use; bytes that were freed. What was said is read again."""
        if not self.filling.acquire(blocking=False):
            return 0
        try:
            freed = self.allocated()
            self._free()
            self.threads = []  # and their models
            return freed
        finally:
            self.filling.release()

    def cut(self, turns: int) -> None:
        """Take back all turns but so many."""
        del self.turns[turns:]
        self.tape.cut(turns)

    def allocated(self) -> int:
        """Bytes of both caches' buffers."""
        with contextlib.suppress(IndexError):  # emptied while it was being counted
            return sum(thread.cache.nbytes().allocated for thread in self.threads)
        return 0

    def need(
        self, models: tuple[Loaded, Loaded], message: str, budget: int, turns: int | None = None
    ) -> int:
        """Bytes that the caches may come to (estimated), once ``message``, after so many turns, has got answers of
        ``budget`` tokens."""
        total, threads = 0, self.threads  # which may be emptied meanwhile
        for at, loaded in enumerate(models):
            kept = len(threads[at].cache.tokens) if at < len(threads) else 0
            new = len(loaded.tokenizer(message)["input_ids"]) + _TEMPLATE
            text = written(loaded.tokenizer, messages_of(self.turns[:turns], at, message))
            whole = len(loaded.tokenizer(text)["input_ids"])
            total += loaded.cache_bytes(min(max(kept + new, whole + _TEMPLATE) + budget, loaded.context))
        return total

    def close(self) -> None:
        """Free both caches, now or when the answer under way has come to its end."""
        self.closed = True
        if self.busy.acquire(blocking=False):
            self.busy.release()
            self._free()

    def _free(self) -> None:
        for thread in self.threads:
            thread.close()


class Conversations:
    """Conversations by session. The least recently used give up their caches when too many have one; what was said
    stays, and is read again with the next message."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: dict[str, Conversation] = {}
        self._table = threading.Lock()

    def of(self, session: str) -> Conversation | None:
        """The session's conversation, if there is one."""
        with self._table:
            return self._open.get(session)

    def put(self, session: str, conversation: Conversation) -> None:
        """Make it the session's conversation."""
        with self._table:
            old = self._open.pop(session, None)
            self._open[session] = conversation
            others = [one for one in self._open.values() if one is not conversation]
        if old is not None and old is not conversation:
            old.close()
        warm = [one for one in others if one.allocated()]
        spare = len(warm) + 1 - self.limits.chats
        for one in warm:
            if spare > 0 and one.empty():  # not those in use
                spare -= 1

    def held(self) -> int:
        """Bytes of the caches of conversations whose request has no place, or that have none."""
        with self._table:
            outside = [one for one in self._open.values() if not one.inside]
        return sum(one.allocated() for one in outside)

    def relieve(self, wanted: int) -> None:
        """Empty caches until so many bytes are free: those of quiet conversations first, the least recently used
        before others, then those of conversations whose next message waits."""
        with self._table:
            open_now = sorted(self._open.values(), key=lambda one: (one.busy.locked(), one.used))
        for one in open_now:
            if wanted <= 0:
                return
            wanted -= one.empty()

    def close(self, session: str) -> None:
        """Forget a session's conversation and free its caches."""
        with self._table:
            found = self._open.pop(session, None)
        if found is not None:
            found.close()

    def close_idle(self, now: float) -> None:
        """Close conversations that nobody has gone on with for a while, but those whose answer is being made."""
        with self._table:
            idle = [
                name for name, one in self._open.items()
                if not one.busy.locked() and now - one.used > self.limits.idle
            ]
        for name in idle:
            self.close(name)


def messages_of(turns: list[Turn], side: int, message: str) -> list[dict[str, str]]:
    told = []
    for turn in turns:
        told += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.answers[side]}]
    return [*told, {"role": "user", "content": message}]


def written(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the text that a model reads; UserError if its chat template fails."""
    try:
        return chat.written(tokenizer, messages)
    except ValueError as error:
        raise UserError(f"Can't chat: {error}.") from error
