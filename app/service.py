"""The door to the engine: models, sessions, limits and streams. Handlers hold no tensors.

The rest of the app reads the engine's records and formulas (trace, measure.cost) but calls nothing else in
it. Safe to call from several threads. A run belongs to the iterator that made it: closing the iterator frees
its cache and its place.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.pieces import PieceReader
from app.present import Tape, tape_of_trace
from app.turnstile import Turnstile
from modification import MoDModel, RoutingTrace, Step, generate
from modification.config import check_threshold
from modification.executor import executor_of
from modification.loading import as_mod, encode_prompt, load_dense_or_mod
from modification.measure.cost import ModelShape

MAX_PROMPT_CHARACTERS = 200_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a shared app.

    Attributes:
        running: generations that take turns on the models at once.
        waiting: generations that may wait for a place.
        new_tokens: longest continuation.
        models: models held in memory.
        frame: least seconds between two pictures of a run; a message a token would cost more than the token.
    """

    running: int = 2
    waiting: int = 20
    new_tokens: int = 2048
    models: int = 2
    frame: float = 0.04


@dataclass(frozen=True, slots=True)
class Request:
    """One generation as the user asked for it."""

    prompt: str
    model: str
    max_new_tokens: int = 300
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    chat: bool = True


@dataclass(frozen=True, slots=True)
class Update:
    """What a run tells the page: a place in the queue, a model being loaded, or a longer tape."""

    waiting: int | None = None
    loading: bool = False
    tape: str | None = None


@dataclass(slots=True)
class Loaded:
    """A model in memory, shared between users; ``lock`` gives one step at a time."""

    name: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    trained: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self) -> str:
        """A line about the model."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        line = (
            f"{self.name}: {millions:.1f} M parameters, {self.shape.depth} layers, "
            f"{len(self.shape.mod_layers)} of them MoD layers, context {self.context:,} tokens"
        )
        line += f", executor {executor_of(self.model).note}"
        if not self.trained:
            line += ". A dense model: its routers are untrained, so p is no useful dial. Convert it first (see README)."
        return line

    @property
    def anchors(self) -> int:
        """Leading tokens that always run."""
        return int(self.model.mod_config.anchors)

    @property
    def context(self) -> int:
        """Longest prompt plus continuation, in tokens."""
        return int(self.model.config.max_position_embeddings)


class Dial:
    """A session's threshold, readable while a run goes on."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self) -> float:
        return self.p


class Service:
    """Models by name or folder, one dial per session, runs in turn.

    Args:
        shipped: model folders, or Hub ids, by the name shown.
        traces: folder of example traces.
        limits: bounds.
    """

    def __init__(
        self, shipped: dict[str, Path | str], traces: Path | None = None, limits: Limits | None = None
    ) -> None:
        self.shipped, self.traces, self.limits = dict(shipped), traces, limits or Limits()
        self._models: dict[str, Loaded] = {}
        self._loading, self._table = threading.Lock(), threading.Lock()
        self._dials: dict[str, Dial] = {}
        self._turnstile = Turnstile(self.limits.running, self.limits.waiting)

    def names(self) -> list[str]:
        """Names of the shipped models."""
        return list(self.shipped)

    def open(self, name: str) -> Loaded:
        """The model of that name, folder or Hub id; loaded once, shared, the least recent dropped.

        Raises:
            UserError: it can't be loaded; the message says why.
        """
        key = name.strip()
        if not key:
            raise UserError("Choose a model, or type the path of a model folder.")
        if (found := self._held(key)) is not None:
            return found
        with self._loading:  # one at a time; runs on models that are held go on meanwhile
            if (found := self._held(key)) is not None:
                return found
            loaded = self._load(key)
            with self._table:
                while len(self._models) >= self.limits.models:
                    del self._models[next(iter(self._models))]
                self._models[key] = loaded
            return loaded

    def _held(self, key: str) -> Loaded | None:
        """A model in memory, marked as used last."""
        with self._table:
            if key in self._models:
                self._models[key] = self._models.pop(key)
            return self._models.get(key)

    def _load(self, key: str) -> Loaded:
        try:
            found, tokenizer = load_dense_or_mod(self.shipped.get(key, key))
            trained, model = isinstance(found, MoDModel), as_mod(found)
            executor_of(model)  # compiled and checked now, not in the first run
            return Loaded(key, model, tokenizer, ModelShape.of(model), trained)
        except ValueError as error:  # LoadError and ConversionError are sentences too
            raise UserError(str(error)) from error

    def example(self) -> str:
        """The tape of the first shipped example, or an empty one."""
        paths = sorted(self.traces.glob("*.json")) if self.traces and self.traces.is_dir() else []
        return tape_of_trace(RoutingTrace.from_json(paths[0].read_text(encoding="utf-8"))) if paths else ""

    def set_p(self, session: str, p: float) -> float:
        """Move a session's dial: its run in progress, if any, reads it at the next token."""
        value = check_threshold(p)
        if (dial := self._dials.get(session)) is not None:
            dial.p = value
        return value

    def run(self, session: str, p: float, request: Request) -> Iterator[Update]:
        """Generate: places in the queue first, then a tape that grows token by token.

        Raises:
            UserError: an empty or overlong prompt, a model that can't be loaded, a full queue.
        """
        prompt = _checked_prompt(request.prompt)
        ticket, dial = object(), Dial(check_threshold(p))
        self._turnstile.join(ticket)
        self._dials[session] = dial
        try:
            while (ahead := self._turnstile.wait(ticket, 0.4)) is not None:
                yield Update(waiting=ahead)
            if self._held(request.model.strip()) is None:
                yield Update(loading=True)
            yield from self._generate(self.open(request.model), dial, prompt, request)
        finally:
            self._turnstile.leave(ticket)
            if self._dials.get(session) is dial:
                del self._dials[session]

    def _generate(self, loaded: Loaded, dial: Dial, prompt: str, request: Request) -> Iterator[Update]:
        ids = encode_prompt(loaded.tokenizer, prompt, request.chat)
        room = loaded.context - len(ids)
        if room <= 0:
            raise UserError(
                f"The prompt is {len(ids):,} tokens long; {loaded.name} has a context of {loaded.context:,}. "
                "Shorten the prompt."
            )
        budget = min(request.max_new_tokens, self.limits.new_tokens, room)
        try:
            steps: Any = start(loaded, ids, dial, budget, request)
        except ValueError as error:
            raise UserError(str(error)) from error
        tape, reader = Tape(loaded.shape, loaded.describe(), loaded.anchors), PieceReader(loaded.tokenizer)
        clock = time.perf_counter()
        try:
            shown = 0.0
            while (step := _next(steps, loaded.lock)) is not None:
                before, clock = clock, time.perf_counter()
                tape.add(step, [reader.read(int(token)) for token in step.tokens], clock - before)
                if clock - shown >= self.limits.frame:
                    shown = clock
                    yield Update(tape=tape.text)
        finally:
            steps.close()
        tape.end(_ending(tape.new_tokens, budget, room))
        yield Update(tape=tape.text)


def start(loaded: Loaded, ids: list[int], p: float | Callable[[], float], budget: int, request: Request) -> Any:
    """The engine's stream for a request; ValueError says which setting is out of bounds."""
    return generate(
        loaded.model, ids, p=p, max_new_tokens=budget, temperature=request.temperature, top_p=request.top_p,
        top_k=request.top_k, seed=request.seed,
    )


def record(loaded: Loaded, request: Request, p: Any, title: str) -> RoutingTrace:
    """A finished run as a trace with all that the view needs, to be shipped as an example.

    ``p`` is a number, or a function read at every step.
    """
    trace = RoutingTrace(loaded.shape.depth, loaded.shape.mod_layers)
    reader, special = PieceReader(loaded.tokenizer), []
    ids = encode_prompt(loaded.tokenizer, request.prompt, request.chat)
    for step in start(loaded, ids, p, request.max_new_tokens, request):
        pieces = [reader.read(int(token)) for token in step.tokens]
        special += [len(trace.texts) + at for at, piece in enumerate(pieces) if piece.special]
        trace.append(step, [piece.text for piece in pieces])
    shape = dataclasses.asdict(loaded.shape)
    trace.info = {
        "title": title, "prompt": request.prompt, "shape": shape, "anchors": loaded.anchors, "special": special,
    }
    return trace


def _next(steps: Iterator[Step], lock: threading.Lock) -> Step | None:
    with lock:
        return next(steps, None)


def _ending(made: int, budget: int, room: int) -> str:
    if made < budget:
        return f"Finished after {made} new tokens."
    if budget == room:
        return f"Reached the end of the model's context after {made} new tokens."
    return f"Reached the limit of {made} new tokens."


def _checked_prompt(prompt: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("The prompt is empty. Type something, or pick an example.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read.")
    return prompt.strip()
