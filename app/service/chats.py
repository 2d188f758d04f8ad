"""Chats: two models answer the same messages side by side, each with a cache of its own that lives between turns.

A side's next turn prefills its new tokens alone. The tokens of earlier turns are kept as they were made, so that
they are found in the cache again whatever the tokenizer would make of their text.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from app.errors import UserError
from app.service.jobs import Finished, Report, batches
from app.service.library import Loaded
from app.service.pieces import PieceReader
from app.service.requests import Dial, Limits, Request
from app.service.runs import budget_of, ending, next_step, start
from app.talk import ChatTape, SideFigures
from modification import Step
from modification.errors import first_line

_TEMPLATE = 64  # tokens that a chat template may put around a message


@dataclass(slots=True)
class Turn:
    """A message, the two answers to it as text, and the answers' figures."""

    message: str
    answers: list[str] = field(default_factory=lambda: ["", ""])
    figures: list[SideFigures | None] = field(default_factory=lambda: [None, None])


@dataclass(slots=True)
class Side:
    """One side of a conversation: its model and what its cache was filled with."""

    loaded: Loaded
    cache: Any
    seen: list[tuple[str, list[int]]] = field(default_factory=list)  # texts of the conversation and their tokens

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the messages; those seen before stay the tokens they were."""
        tokenizer = self.loaded.tokenizer
        whole = _written(tokenizer, messages)
        self.seen = [(text, ids) for text, ids in self.seen if whole.startswith(text)]
        text, ids = self.seen[-1] if self.seen else ("", [])
        plain = tokenizer.chat_template or ids  # a text without a template gets the tokenizer's own start
        fresh = tokenizer(whole[len(text) :], add_special_tokens=not plain)["input_ids"]
        self.seen.append((whole, [*ids, *fresh]))
        return self.seen[-1][1]

    def said(self, text: str, tokens: list[int]) -> None:
        """Remember an answer to the last prompt as the tokens it was made of."""
        if tokens:
            self.seen.append((self.seen[-1][0] + text, self.seen[-1][1] + tokens))

    def close(self) -> None:
        """Free the cache."""
        self.cache.reset()
        self.seen = []


@dataclass(slots=True)
class Conversation:
    """One session's chat.

    Attributes:
        names: the two models' names, in the order shown.
        tape: all turns as the page shows them.
        busy: held while an answer is being made or a turn taken back.
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
        """Its caches count as its request's meanwhile, and not as kept."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

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
        total = 0
        for at, loaded in enumerate(models):
            kept = len(self.threads[at].cache.tokens) if at < len(self.threads) else 0
            new = len(loaded.tokenizer(message)["input_ids"]) + _TEMPLATE
            written = _written(loaded.tokenizer, _messages(self.turns[:turns], at, message))
            whole = len(loaded.tokenizer(written)["input_ids"])
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


class Chats:
    """Conversations by session; the least recently used are closed when there are too many."""

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
            quiet = [name for name, one in self._open.items() if name != session and not one.busy.locked()]
            spare = [self._open.pop(name) for name in quiet[: max(0, len(self._open) - self.limits.chats)]]
        for one in ([old] if old is not None and old is not conversation else []) + spare:
            one.close()

    def held(self) -> int:
        """Bytes of the caches of conversations whose request has no place, or that have none."""
        with self._table:
            outside = [one for one in self._open.values() if not one.inside]
        return sum(one.allocated() for one in outside)

    def relieve(self, wanted: int) -> None:
        """Close quiet conversations, the least recently used first, until so many bytes are free."""
        with self._table:
            quiet = sorted(((one.used, name) for name, one in self._open.items() if not one.busy.locked()))
        for _, name in quiet:
            if wanted <= 0:
                return
            if (found := self.of(name)) is not None:
                wanted -= found.allocated()
                self.close(name)

    def close(self, session: str) -> None:
        """Forget a session's conversation and free its caches."""
        with self._table:
            found = self._open.pop(session, None)
        if found is not None:
            found.close()

    def close_idle(self, now: float) -> None:
        """Close conversations that nobody has gone on with for a while."""
        with self._table:
            idle = [name for name, one in self._open.items() if now - one.used > self.limits.idle]
        for name in idle:
            self.close(name)


def answer(
    conversation: Conversation, models: tuple[Loaded, Loaded], message: str, dials: tuple[Dial, Dial],
    request: Request, limits: Limits,
) -> Iterator[str]:
    """Both models answer ``message``, a token of each in turn; the growing tape of the conversation.

    Leaving early keeps what was said so far.

    Raises:
        UserError: a setting out of bounds, or a conversation that fills a model's context.
    """
    _seat(conversation, models)
    tape, turn = conversation.tape, Turn(message)
    sides = [
        _Answer(thread, _messages(conversation.turns, at, message), dial, request, limits)
        for at, (thread, dial) in enumerate(zip(conversation.threads, dials, strict=True))
    ]
    conversation.turns.append(turn)
    tape.ask(message)
    try:
        with contextlib.closing(batches(functools.partial(_in_turn, sides), limits.frame)) as made:
            for batch in made:
                for at, step, seconds in (one for one in batch if not isinstance(one, Finished)):
                    piece = sides[at].take(step, seconds)
                    turn.answers[at] += piece
                    tape.say(at, piece)
                    if not sides[at].going:
                        tape.figures(at, sides[at].figures())
                        tape.end(at, sides[at].ending)
                for at, side in enumerate(sides):
                    if side.going:
                        tape.figures(at, side.figures())
                yield tape.text
    finally:
        for at, side in enumerate(sides):
            turn.figures[at] = side.figures()
            if side.going:
                tape.figures(at, side.figures())
                tape.end(at, "Stopped.")
            side.thread.said(side.text, side.tokens)
    yield tape.text


def _in_turn(sides: list[_Answer], report: Report) -> None:
    """A step of each side in turn, with its own seconds; None when a side has come to its end."""
    going = list(enumerate(sides))
    try:
        while going:
            for at, side in list(going):
                began = time.perf_counter()
                step = next_step(side.steps, side.thread.loaded.lock)
                report((at, step, time.perf_counter() - began))
                if step is None:
                    going.remove((at, side))
    finally:
        for side in sides:
            side.steps.close()


def _seat(conversation: Conversation, models: tuple[Loaded, Loaded]) -> None:
    """A thread for each model; one whose model was loaded anew starts over."""
    for at, loaded in enumerate(models):
        if len(conversation.threads) <= at:
            conversation.threads.append(Side(loaded, loaded.model.new_cache()))
        elif conversation.threads[at].loaded is not loaded:
            conversation.threads[at].close()
            conversation.threads[at] = Side(loaded, loaded.model.new_cache())


def _messages(turns: list[Turn], side: int, message: str) -> list[dict[str, str]]:
    told = []
    for turn in turns:
        told += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.answers[side]}]
    return [*told, {"role": "user", "content": message}]


def _written(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the text that a model reads; UserError if its chat template fails."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program of the model's
        raise UserError(f"The model's chat template fails: {first_line(error)}.") from error


class _Answer:
    """One model's answer under way."""

    def __init__(
        self, thread: Side, messages: list[dict[str, str]], dial: Dial, request: Request, limits: Limits
    ) -> None:
        self.thread, loaded = thread, thread.loaded
        ids = thread.prompt(messages)
        self.budget, self.room = budget_of(loaded, len(ids), request.max_new_tokens, limits)
        self.reader = PieceReader(loaded.tokenizer)
        self.steps = start(loaded, ids, dial, self.budget, request, thread.cache, alternatives=0)
        self.tokens: list[int] = []
        self.text, self.going, self.ending = "", True, ""
        self.seconds, self.first, self.prompt, self.ran, self.scored = 0.0, 0.0, 0, 0, 0
        self.last: Step | None = None

    def take(self, step: Step | None, spent: float) -> str:
        """What a step adds to the text; None, the end of the steps, ends the answer."""
        if step is None:
            self.going, self.ending = False, ending(len(self.tokens), self.budget, self.room)
            return ""
        self.last = step
        self.ran, self.scored = self.ran + int(step.routed.sum()), self.scored + step.routed.size
        if step.prefill:
            self.prompt, self.first = len(step.tokens), spent
            return ""
        if not self.tokens:
            self.first += spent
        self.seconds += spent
        self.tokens.append(step.token)
        piece = self.reader.read(step.token)
        self.text += piece.text
        return "" if piece.special else piece.text

    def figures(self) -> SideFigures:
        """What is known of the answer so far."""
        last = self.last
        return SideFigures(
            tokens=len(self.tokens), speed=len(self.tokens) / self.seconds if self.seconds else None,
            first_token=self.first, prefilled=self.prompt, load=self.ran / self.scored if self.scored else 1.0,
            kv=(last.kv_stored, last.kv_allocated, last.kv_dense) if last else (0, 0, 0),
        )
