"""Answers of a chat: two models go on with the same conversation, a token of each in turn.

A side's next turn prefills its new tokens alone: the rest is in its cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from app.service.conversations import Conversation, Side, Turn, messages_of
from app.service.dials import Dial
from app.service.jobs import Finished, Mailbox, Report, batches
from app.service.loaded import Loaded
from app.service.pieces import PieceReader
from app.service.requests import Limits, Request
from app.service.runs import budget_of, ending, next_step, start
from app.talk import SideFigures
from modification import Step


def begin(
    conversation: Conversation, models: tuple[Loaded, Loaded], message: str, dials: tuple[Dial, Dial],
    request: Request, limits: Limits,
) -> list[Answer]:
    """Both models' answers to ``message``, ready to be made.

    Raises:
        UserError: a setting out of bounds, or a conversation that fills a model's context.
    """
    _seat(conversation, models)
    return [
        Answer(thread, messages_of(conversation.turns, at, message), dial, request, limits)
        for at, (thread, dial) in enumerate(zip(conversation.threads, dials, strict=True))
    ]


def told(conversation: Conversation, message: str, sides: list[Answer], box: Mailbox, frame: float) -> Iterator[str]:
    """What ``in_turn`` reports, written into the conversation: its growing tape.

    Leaving early keeps what was said so far.
    """
    tape, turn = conversation.tape, Turn(message)
    conversation.turns.append(turn)
    tape.ask(message)
    try:
        with contextlib.closing(batches(box, frame)) as made:
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


def in_turn(sides: list[Answer], report: Report) -> None:
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
            conversation.threads.append(Side.of(loaded))
        elif conversation.threads[at].held() is not loaded:
            conversation.threads[at].close()
            conversation.threads[at] = Side.of(loaded)


class Answer:
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

    def counts(self) -> tuple[int, int, int]:
        """New tokens, (MoD layer, token) pairs that ran, and all of them."""
        return len(self.tokens), self.ran, self.scored

    def figures(self) -> SideFigures:
        """What is known of the answer so far."""
        last = self.last
        return SideFigures(
            tokens=len(self.tokens), speed=len(self.tokens) / self.seconds if self.seconds else None,
            first_token=self.first, prefilled=self.prompt, load=self.ran / self.scored if self.scored else 1.0,
            kv=(last.kv_stored, last.kv_allocated, last.kv_dense) if last else (0, 0, 0),
        )
