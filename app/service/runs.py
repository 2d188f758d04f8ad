"""Runs for Explore: the engine's steps become a tape; a finished run becomes a trace."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from app.errors import UserError
from app.service.dials import Dial
from app.service.jobs import Finished, batches
from app.service.library import Library, Loading
from app.service.loaded import Loaded
from app.service.pieces import PieceReader
from app.service.requests import ALTERNATIVES, Limits, Request
from app.service.turnstile import FairLock
from app.tape import Tape
from modification import RoutingTrace, Step
from modification.generate import generate
from modification.generate import prepare as prepare_stream
from modification.loading import encode_prompt


@dataclass(frozen=True, slots=True)
class Update:
    """What a run tells the page: a place in the queue, how far a model's load is, or a longer tape."""

    waiting: int | None = None
    loading: Loading | None = None
    tape: str | None = None
    result: Any = None


def loading(library: Library, *names: str | None) -> Iterator[Update]:
    """Load models, those that are named: how far each is."""
    for name in filter(None, names):
        for far in library.loading(name):
            yield Update(loading=far)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is checked and may begin: prompt tokens, new tokens at most, and those the context has room for."""

    loaded: Loaded
    ids: list[int]
    budget: int
    room: int

    @property
    def need(self) -> int:
        """Bytes of keys and values that it may come to (estimated)."""
        return self.loaded.cache_bytes(len(self.ids) + self.budget)


def prepare(loaded: Loaded, prompt: str, request: Request, limits: Limits) -> Prepared:
    """Tokenize a prompt and bound its continuation.

    Raises:
        UserError: a setting out of bounds, or a prompt that fills the context.
    """
    try:
        ids = encode_prompt(loaded.tokenizer, prompt, request.chat)
    except ValueError as error:
        raise UserError(f"{error}. Switch the chat message off.") from error
    budget, room = budget_of(loaded, len(ids), request.max_new_tokens, limits)
    check_shifts(loaded, request.shifts)
    return Prepared(loaded, ids, budget, room)


def stream_tape(run: Prepared, dial: Dial, request: Request, limits: Limits) -> Iterator[Tape]:
    """Generate, together with the model's other runs, and give the growing tape at the frame rate and at the end.

    Raises:
        UserError: a setting out of bounds.
    """
    loaded = run.loaded
    stream = _checked(prepare_stream, loaded, run.ids, dial, run.budget, request)
    tape, reader = Tape(loaded.shape, loaded.describe(), loaded.anchors), PieceReader(loaded.tokenizer)
    with contextlib.closing(batches(loaded.run(stream, run.ids, dial, run.budget, request), limits.frame)) as made:
        for batch in made:
            for step, seconds in (one for one in batch if not isinstance(one, Finished)):
                pieces = [reader.read(int(token)) for token in step.tokens]
                tape.add(step, pieces, seconds, reader.names(step.likely))
            if tape.columns:
                yield tape
    tape.end(ending(tape.new_tokens, run.budget, run.room))
    yield tape


def start(
    loaded: Loaded, ids: list[int], p: float | Callable[[], Any], budget: int, request: Request, cache: Any = None,
    alternatives: int = ALTERNATIVES,
) -> Iterator[Step]:
    """A run by itself; UserError says which setting is out of bounds."""
    found: Iterator[Step] = _checked(generate, loaded, ids, p, budget, request, cache, alternatives)
    return found


def _checked(
    call: Callable[..., Any], loaded: Loaded, ids: list[int], p: float | Callable[[], Any], budget: int,
    request: Request, cache: Any = None, alternatives: int = ALTERNATIVES,
) -> Any:
    try:
        return call(
            loaded.model, ids, p=p, max_new_tokens=budget, alternatives=alternatives, cache=cache,
            **request.sampling(),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def next_step(steps: Iterator[Step], lock: FairLock) -> Step | None:
    """One step, while no other stream of this model makes one."""
    with lock:
        return next(steps, None)


def budget_of(loaded: Loaded, taken: int, wanted: int, limits: Limits) -> tuple[int, int]:
    """New tokens that may be made after ``taken``, and those that the context has room for."""
    room = loaded.context - taken
    if taken > limits.prompt_tokens:
        raise UserError(f"The prompt is {taken:,} tokens long; at most {limits.prompt_tokens:,} are read. Shorten it.")
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
