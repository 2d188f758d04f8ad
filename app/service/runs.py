"""Runs for Explore: the engine's steps become a tape; a finished run becomes a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from app.errors import UserError
from app.service.jobs import Finished, Report, batches
from app.service.library import Loaded
from app.service.pieces import PieceReader
from app.service.requests import Dial, Limits, Request
from app.tape import Tape
from modification import RoutingTrace, Step, generate
from modification.loading import encode_prompt

ALTERNATIVES = 5


@dataclass(frozen=True, slots=True)
class Update:
    """What a run tells the page: a place in the queue, seconds that a model has been loading, or a longer tape."""

    waiting: int | None = None
    loading: float | None = None
    tape: str | None = None
    result: Any = None


def stream_tape(loaded: Loaded, dial: Dial, prompt: str, request: Request, limits: Limits) -> Iterator[Tape]:
    """Generate, and give the growing tape at the frame rate and at the end.

    Raises:
        UserError: a setting out of bounds, or a prompt that fills the context.
    """
    ids = encode_prompt(loaded.tokenizer, prompt, request.chat)
    budget, room = budget_of(loaded, len(ids), request.max_new_tokens, limits)
    check_shifts(loaded, dial.shifts)
    steps = start(loaded, ids, dial, budget, request)
    tape, reader = Tape(loaded.shape, loaded.describe(), loaded.anchors), PieceReader(loaded.tokenizer)
    with contextlib.closing(batches(functools.partial(_decode, steps, loaded.lock), limits.frame)) as made:
        for batch in made:
            for step, seconds in (one for one in batch if not isinstance(one, Finished)):
                pieces = [reader.read(int(token)) for token in step.tokens]
                tape.add(step, pieces, seconds, reader.names(step.likely))
            if tape.columns:
                yield tape
    tape.end(ending(tape.new_tokens, budget, room))
    yield tape


def _decode(steps: Any, lock: threading.Lock, report: Report) -> None:
    """Report every step with the seconds since the one before."""
    clock = time.perf_counter()
    try:
        while (step := next_step(steps, lock)) is not None:
            before, clock = clock, time.perf_counter()
            report((step, clock - before))
    finally:
        steps.close()


def start(
    loaded: Loaded, ids: list[int], p: float | Callable[[], Any], budget: int, request: Request, cache: Any = None,
    alternatives: int = ALTERNATIVES,
) -> Any:
    """The engine's stream for a request; UserError says which setting is out of bounds."""
    try:
        return generate(
            loaded.model, ids, p=p, max_new_tokens=budget, temperature=request.temperature, top_p=request.top_p,
            top_k=request.top_k, seed=request.seed, alternatives=alternatives, cache=cache,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def next_step(steps: Iterator[Step], lock: threading.Lock) -> Step | None:
    """One step, while no other stream of this model makes one."""
    with lock:
        return next(steps, None)


def budget_of(loaded: Loaded, taken: int, wanted: int, limits: Limits) -> tuple[int, int]:
    """New tokens that may be made after ``taken``, and those that the context has room for."""
    room = loaded.context - taken
    if room <= 0:
        raise UserError(
            f"The prompt is {taken:,} tokens long; {loaded.name} has a context of {loaded.context:,}. "
            "Shorten the prompt."
        )
    return min(wanted, limits.new_tokens, room), room


def check_shifts(loaded: Loaded, shifts: tuple[float, ...]) -> None:
    """Shifts must be one per MoD layer, or none."""
    count = len(loaded.shape.mod_layers)
    if any(shifts) and len(shifts) != count:
        raise UserError(f"{len(shifts)} shifts of p for {count} MoD layers of {loaded.name}: give one per MoD layer.")


def ending(made: int, budget: int, room: int) -> str:
    """How a run ended, as a sentence."""
    if made < budget:
        return f"Finished after {made} new tokens."
    if budget == room:
        return f"Reached the end of the model's context after {made} new tokens."
    return f"Reached the limit of {made} new tokens."


def record(loaded: Loaded, request: Request, p: Any, title: str) -> RoutingTrace:
    """A finished run as a trace with all that the view needs, to be shipped as an example.

    ``p`` is a number, or a function read at every step.
    """
    trace = RoutingTrace(loaded.shape.depth, loaded.shape.mod_layers)
    reader, special = PieceReader(loaded.tokenizer), []
    likely: list[list[str]] = []
    ids = encode_prompt(loaded.tokenizer, request.prompt, request.chat)
    for step in start(loaded, ids, p, request.max_new_tokens, request):
        pieces = [reader.read(int(token)) for token in step.tokens]
        special += [len(trace.texts) + at for at, piece in enumerate(pieces) if piece.special]
        likely.append(reader.names(step.likely))
        trace.append(step, [piece.text for piece in pieces])
    trace.info = {
        "title": title, "prompt": request.prompt, "shape": dataclasses.asdict(loaded.shape),
        "anchors": loaded.anchors, "special": special, "likely": likely,
    }
    return trace
