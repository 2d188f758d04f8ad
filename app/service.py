"""The only door to the engine: models, sessions, limits and streams. Handlers hold no tensors.

Safe to call from several threads. A run belongs to the iterator that made it: closing the iterator
frees its cache and its place.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.present import Piece, Tape, tape_of_trace
from modification import ConversionError, LoadError, MoDModel, RoutingTrace, Step, generate, load
from modification.config import check_threshold
from modification.measure.cost import ModelShape

MAX_PROMPT_CHARACTERS = 200_000


class UserError(ValueError):
    """Something the user can mend; the message is a sentence for the page."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a shared app.

    Attributes:
        running: generations that take turns on the models at once.
        waiting: generations that may wait for a place.
        new_tokens: longest continuation.
        models: models held in memory.
    """

    running: int = 2
    waiting: int = 20
    new_tokens: int = 2048
    models: int = 2


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
    """What a run tells the page: a place in the queue, or a longer tape."""

    waiting: int | None = None
    tape: str | None = None


@dataclass(slots=True)
class Loaded:
    """A model in memory, shared between users; ``lock`` gives one step at a time."""

    name: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    def describe(self) -> str:
        """A line about the model."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"{self.name}: {millions:.1f} M parameters, {self.shape.depth} layers, "
            f"{len(self.shape.mod_layers)} of them MoD layers, context {self.context} tokens"
        )

    @property
    def context(self) -> int:
        """Longest prompt plus continuation, in tokens."""
        return int(self.model.config.max_position_embeddings)

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and it is wanted."""
        if chat and self.chat:
            messages = [{"role": "user", "content": prompt}]
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])


class PieceReader:
    """Token ids -> what each reads as, holding back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self._held: list[int] = []
        self._before: list[int] = []

    def read(self, token: int) -> Piece:
        """The piece of the next token."""
        if token in self.special:
            self._held, self._before = [], []
            return Piece(self.tokenizer.convert_ids_to_tokens(token), True)
        self._held.append(token)
        # Decoding after the token before keeps the leading space that decoding alone would lose.
        start = self.tokenizer.decode(self._before)
        text = self.tokenizer.decode(self._before + self._held)
        if text.endswith("\ufffd") and len(self._held) < 8:
            return Piece("")
        self._before, self._held = self._held, []
        return Piece(text[len(start) :])


class Turnstile:
    """Lets ``size`` runs in at once, the rest in order of arrival."""

    def __init__(self, size: int, waiting: int) -> None:
        self._size, self._waiting = size, waiting
        self._inside: set[object] = set()
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def join(self, ticket: object) -> None:
        """Take a place in line; UserError when it is full."""
        with self._changed:
            if len(self._inside) >= self._size and len(self._line) >= self._waiting:
                raise UserError(f"The queue is full ({self._waiting} waiting). Please try again in a minute.")
            self._line.append(ticket)

    def wait(self, ticket: object, seconds: float) -> int | None:
        """None once the ticket is inside; after ``seconds`` in line, how many are ahead."""
        with self._changed:
            if self._changed.wait_for(lambda: self._may_enter(ticket), timeout=seconds):
                self._line.remove(ticket)
                self._inside.add(ticket)
                self._changed.notify_all()
                return None
            return self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        """Give the place back, in line or inside."""
        with self._changed:
            self._inside.discard(ticket)
            if ticket in self._line:
                self._line.remove(ticket)
            self._changed.notify_all()

    def _may_enter(self, ticket: object) -> bool:
        return len(self._inside) < self._size and self._line[0] is ticket


class Dial:
    """A session's threshold, readable while a run goes on."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self) -> float:
        return self.p


class Service:
    """Models by name or folder, one dial per session, runs in turn.

    Args:
        shipped: model folders by the name shown.
        traces: folder of example traces.
        limits: bounds.
    """

    def __init__(self, shipped: dict[str, Path], traces: Path | None = None, limits: Limits | None = None) -> None:
        self.shipped, self.traces, self.limits = dict(shipped), traces, limits or Limits()
        self._models: dict[str, Loaded] = {}
        self._loading = threading.Lock()
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
        with self._loading:
            if key not in self._models:
                try:
                    model, tokenizer = load(self.shipped.get(key, key))
                except (LoadError, ConversionError) as error:
                    raise UserError(str(error)) from error
                assert isinstance(model, MoDModel)
                while len(self._models) >= self.limits.models:
                    del self._models[next(iter(self._models))]
                self._models[key] = Loaded(key, model, tokenizer, ModelShape.of(model))
            self._models[key] = self._models.pop(key)
            return self._models[key]

    def example(self) -> str:
        """The tape of the first shipped example, or an empty one."""
        paths = sorted(self.traces.glob("*.json")) if self.traces and self.traces.is_dir() else []
        return tape_of_trace(RoutingTrace.from_json(paths[0].read_text(encoding="utf-8"))) if paths else ""

    def set_p(self, session: str, p: float) -> float:
        """Move a session's dial; a run in progress reads it at its next token."""
        value = check_threshold(p)
        self._dials.setdefault(session, Dial(value)).p = value
        return value

    def forget(self, session: str) -> None:
        """A session is gone."""
        self._dials.pop(session, None)

    def run(self, session: str, p: float, request: Request) -> Iterator[Update]:
        """Generate: places in the queue first, then a tape that grows token by token.

        Raises:
            UserError: an empty or overlong prompt, a model that can't be loaded, a full queue.
        """
        prompt = _checked_prompt(request.prompt)
        self.set_p(session, p)
        ticket = object()
        self._turnstile.join(ticket)
        try:
            while (ahead := self._turnstile.wait(ticket, 0.4)) is not None:
                yield Update(waiting=ahead)
            dial = self._dials.setdefault(session, Dial(p))
            yield from self._generate(self.open(request.model), dial, prompt, request)
        finally:
            self._turnstile.leave(ticket)

    def _generate(self, loaded: Loaded, dial: Dial, prompt: str, request: Request) -> Iterator[Update]:
        ids = loaded.encode(prompt, request.chat)
        steps = self._start(loaded, ids, dial, request)
        tape, reader = Tape(loaded.shape, loaded.name), PieceReader(loaded.tokenizer)
        try:
            while (step := _next(steps, loaded.lock)) is not None:
                tape.add(step, [reader.read(int(token)) for token in step.tokens])
                yield Update(tape=tape.text)
        finally:
            steps.close()
        ended = tape.new_tokens < request.max_new_tokens
        how = "Finished" if ended else "Stopped at the length limit"
        tape.end("done", f"{how} after {tape.new_tokens} new tokens.")
        yield Update(tape=tape.text)

    def _start(self, loaded: Loaded, ids: list[int], dial: Dial, request: Request) -> Any:
        budget = min(int(request.max_new_tokens), self.limits.new_tokens, max(0, loaded.context - len(ids)))
        if len(ids) >= loaded.context:
            raise UserError(
                f"The prompt is {len(ids):,} tokens long; {loaded.name} has a context of {loaded.context:,}. "
                "Shorten the prompt."
            )
        try:
            return generate(
                loaded.model, ids, p=dial, max_new_tokens=budget, temperature=request.temperature,
                top_p=request.top_p, top_k=int(request.top_k), seed=request.seed,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


def record(loaded: Loaded, request: Request, p: Any, title: str) -> RoutingTrace:
    """A finished run as a trace with all that the view needs, to be shipped as an example.

    ``p`` is a number, or a function read at every step.
    """
    trace = RoutingTrace(loaded.shape.depth, loaded.shape.mod_layers)
    reader, special = PieceReader(loaded.tokenizer), []
    ids = loaded.encode(request.prompt, request.chat)
    for step in generate(
        loaded.model, ids, p=p, max_new_tokens=request.max_new_tokens, temperature=request.temperature,
        top_p=request.top_p, top_k=request.top_k, seed=request.seed,
    ):
        pieces = [reader.read(int(token)) for token in step.tokens]
        special += [len(trace.texts) + at for at, piece in enumerate(pieces) if piece.special]
        trace.append(step, [piece.text for piece in pieces])
    shape = dataclasses.asdict(loaded.shape)
    trace.info = {"title": title, "prompt": request.prompt, "shape": shape, "special": special}
    return trace


def _next(steps: Iterator[Step], lock: threading.Lock) -> Step | None:
    with lock:
        return next(steps, None)


def _checked_prompt(prompt: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("The prompt is empty. Type something, or pick an example.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read.")
    return prompt.strip()
