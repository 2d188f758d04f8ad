"""The service: models, sessions, queue and everything that a page may ask for.

A run belongs to the iterator that made it: closing the iterator frees its cache and its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.service import measuring
from app.service.chats import Chats, Conversation, answer
from app.service.conversions import Conversions, Plan, Progress
from app.service.desk import Desk
from app.service.jobs import Finished, Mailbox, Report, in_thread, one_by_one
from app.service.library import DTYPES, Library, Loaded, Options, parse
from app.service.metrics import Metrics
from app.service.paths import check_folder_within, check_text_within, real
from app.service.requests import Dial, Limits, Request
from app.service.runs import Update, prepare, stream_tape
from app.service.zero import Zero
from app.talk import ChatTape
from app.tape import Tape, summary, tape_of_trace
from modification import RoutingTrace
from modification.config import check_threshold
from modification.measure.estimate import Estimate
from modification.measure.memory import available_bytes

_PATIENCE = 5.0  # seconds that a stopped answer may take to end


class Service:
    """What the tabs talk to.

    Args:
        shipped: model folders, or Hub ids, by the name shown.
        traces: folder of example traces.
        limits: bounds.
        converted: folder into which models are converted; those in it are listed too.
        zero: runs in forks that get a GPU, on a ZeroGPU Space.
    """

    def __init__(
        self, shipped: dict[str, Path | str], traces: Path | None = None, limits: Limits | None = None,
        converted: Path | None = None, zero: Zero | None = None,
    ) -> None:
        self.limits = _with_memory(limits or Limits())
        self.conversions = Conversions(converted or Path("converted"))
        made = {name: path for name, path in self.conversions.finished().items() if name not in shipped}
        self.library = Library({**shipped, **made}, self.limits, zero)
        self.traces = traces
        self._dials: dict[str, Dial] = {}
        self._chats = Chats(self.limits)
        self.desk = Desk(self.limits, self._chats.held, self._chats.relieve, Metrics(self._gauges()))

    # Models

    def names(self) -> list[str]:
        """Listed models, by name."""
        return list(self.library.listed)

    def parent_of(self, name: str) -> str | None:
        """The listed dense parent of a model, by its name without ``-MoD``."""
        source, options = parse(name)
        parent = source.removesuffix("-MoD")
        return options.label(parent) if parent != source and parent in self.library.listed else None

    def source_of(self, name: str) -> str:
        """How Python loads the model of that name: the arguments of ``modification.load``."""
        source, options = parse(name)
        chosen = [repr(str(self.library.listed.get(source, source)))]
        chosen += [f"dtype={DTYPES[options.dtype]!s}"] if options.dtype else []
        chosen += [f"quantization={options.quantization!r}"] if options.quantization else []
        chosen += [f"device_map={{'': {options.device!r}}}"] if options.device else []
        return ", ".join(chosen)

    def mod_layers(self, name: str) -> tuple[int, ...]:
        """Indices of a model's MoD layers without loading it; empty where that can't be told."""
        return self.library.mod_layers(name)

    def open(self, name: str) -> Loaded:
        """The model of that name, folder or Hub id."""
        return self.library.open(name)

    def load(self, name: str) -> Iterator[Update]:
        """Load a model: how far it is, then a description as the result."""
        for far in self.library.loading(name):
            yield Update(loading=far)
        loaded = self.library.open(name)
        rows, report = measuring.layer_rows(loaded), measuring.report_of(loaded.source)
        yield Update(result=(loaded.describe(), rows, report, measuring.card_of(loaded.source)))

    def label(self, source: str, dtype: str | None, quantization: str | None, device: str | None) -> str:
        """The name under which a model with such options is looked up."""
        return Options(dtype, quantization, device).label(source)

    def keep_tidy(self, every: float = 30.0) -> threading.Thread:
        """Start letting go of unused models in the background."""
        def tidy() -> None:
            while True:
                time.sleep(every)
                self._chats.close_idle(time.monotonic())
                self.library.unload_idle()

        thread = threading.Thread(target=tidy, daemon=True)
        thread.start()
        return thread

    # Traces

    def example(self) -> str:
        """The tape of the first shipped example, or an empty one."""
        paths = sorted(self.traces.glob("*.json")) if self.traces and self.traces.is_dir() else []
        return tape_of_trace(RoutingTrace.from_json(paths[0].read_text(encoding="utf-8"))) if paths else ""

    def read_trace(self, data: bytes) -> str:
        """The tape of a trace that a user brings.

        Raises:
            UserError: too large, or no trace.
        """
        if len(data) > self.limits.file_bytes:
            raise UserError(
                f"The file has {len(data) / 1e6:.1f} MB; traces of at most {self.limits.file_bytes / 1e6:.0f} MB are "
                "read."
            )
        try:
            return tape_of_trace(RoutingTrace.from_json(data.decode("utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"This file can't be shown: {error}. Load a JSON file that this app exported.") from error

    # Explore

    def set_p(self, session: str, p: float, shifts: Sequence[float] | None = None) -> float:
        """Move a session's dial: its run in progress, if any, reads it at the next token."""
        value = _threshold(p)
        if (dial := self._dials.get(session)) is not None:
            dial.p = value
            if shifts is not None and len(shifts) == len(dial.shifts):
                dial.shifts = tuple(shifts)
        return value

    def run(self, session: str, p: float, request: Request) -> Iterator[Update]:
        """Generate: places in the queue first, then a tape that grows token by token.

        Raises:
            UserError: an empty or overlong prompt, a model that can't be loaded, a full queue.
        """
        with self.desk.request("generate"):
            prompt = self.limits.check_prompt(request.prompt)
            dial = Dial(_threshold(p), request.shifts)
            yield from self._load(request.model)
            with self.library.lend(request.model) as loaded, self._dial(session, dial):
                run = prepare(loaded, prompt, request, self.limits)
                with self.desk.place(session, run.need) as line:
                    yield from line
                    yield from self._counted(stream_tape(run, dial, request, self.limits))

    def _counted(self, tapes: Iterator[Tape]) -> Iterator[Update]:
        """A run's tapes as updates; what it did is counted, however it ends."""
        tape: Tape | None = None
        try:
            for tape in tapes:
                yield Update(tape=tape.text)
        finally:
            if tape is not None:
                self.desk.metrics.routed(tape.new_tokens, tape.ran, tape.scored)

    def generate(self, p: float, request: Request, user: str = "") -> dict[str, Any]:
        """A whole run for a program: its text and last figures; see :meth:`run`."""
        tape = ""
        for update in self.run(user or f"api-{secrets.token_hex(8)}", p, request):
            tape = update.tape or tape
        return summary(tape)

    # Chat

    def chat(
        self, session: str, models: tuple[str, str], p: float, request: Request, blind: bool = False,
        turns: int | None = None, user: str = "",
    ) -> Iterator[Update]:
        """Both models answer ``request.prompt``: the left one at p = 0, the right one at p, or the other way round
        if ``blind`` says so by lot. ``turns``: first take back all turns but so many; ``user``: whose request it is, if
        not the session's.

        Raises:
            UserError: an empty message, a model that can't be loaded, a full context or queue.
        """
        with self.desk.request("chat"), contextlib.ExitStack() as kept:
            message = self.limits.check_prompt(request.prompt)
            dial = Dial(_threshold(p))
            yield from self._both(*models)
            dense, routed = (kept.enter_context(self.library.lend(name)) for name in models)
            conversation, swapped = self._conversation(session, (dense, routed), blind)
            sides, dials = (dense, routed), (Dial(0.0), dial)
            if swapped:
                sides, dials = (routed, dense), (dial, Dial(0.0))
            kept.enter_context(conversation.alone(_PATIENCE))
            kept.enter_context(self._dial(f"{session}/chat", dial))
            need = conversation.need(sides, message, min(request.max_new_tokens, self.limits.new_tokens), turns)
            yield from kept.enter_context(self.desk.place(user or session, need))
            kept.enter_context(conversation.counted())
            if turns is not None:
                conversation.cut(turns)
            for tape in answer(conversation, sides, message, dials, request, self.limits):
                yield Update(tape=tape)

    def chat_tape(self, session: str) -> str:
        """The session's conversation as it stands, once an answer under way has come to its end."""
        conversation = self._chats.of(session)
        if conversation is None:
            return ""
        with conversation.alone(_PATIENCE):
            return conversation.tape.text

    def chat_turns(self, session: str) -> list[str]:
        """The session's messages so far."""
        conversation = self._chats.of(session)
        return [] if conversation is None else [turn.message for turn in conversation.turns]

    def chat_record(self, session: str) -> list[dict[str, Any]]:
        """The session's turns for a program: message, answers, figures."""
        conversation = self._chats.of(session)
        return [] if conversation is None else [
            {"message": turn.message, "answers": list(turn.answers),
             "figures": [None if one is None else one.to_dict() for one in turn.figures]}
            for turn in conversation.turns
        ]

    def cut_chat(self, session: str, turns: int) -> str:
        """Take back all turns of a conversation but so many; its tape."""
        conversation = self._chats.of(session)
        if conversation is not None:
            with conversation.alone(_PATIENCE):
                conversation.cut(max(0, turns))
        return self.chat_tape(session)

    def close(self, session: str) -> None:
        """A session ends: its conversation and caches go."""
        self._chats.close(session)

    def _conversation(self, session: str, models: tuple[Loaded, Loaded], blind: bool) -> tuple[Conversation, bool]:
        """The session's conversation with these models, begun anew if they or the mode changed; whether its sides are
        swapped."""
        names = (f"{models[0].name}, every layer", f"{models[1].name}, routed at p")
        found = self._chats.of(session)
        if found is None or found.closed or set(found.names) != set(names) or found.tape.blind != blind:
            shown = names if not (blind and secrets.randbelow(2)) else names[::-1]
            found = Conversation(shown, ChatTape(shown, blind))
        self._chats.put(session, found)
        return found, found.names != names

    # Measuring

    def sweep(
        self, model: str, parent: str | None, text: str, grid: Sequence[float], within: float, user: str = ""
    ) -> Iterator[Update]:
        """A text over a grid of p: the sweep so far, again and again; the last is whole."""
        yield from self._measured(
            "sweep", user, model, parent,
            lambda loaded, dense, report: measuring.sweep_text(loaded, dense, text, grid, within, self.limits, report),
        )

    def bench(
        self, model: str, parent: str | None, contexts: Sequence[int], loads: Sequence[float], new_tokens: int,
        rounds: int, stock: bool, user: str = "",
    ) -> Iterator[Update]:
        """Time a model against its dense parent: sentences, then the results."""
        yield from self._measured(
            "bench", user, model, parent,
            lambda loaded, dense, report: measuring.bench_model(
                loaded, dense, contexts, loads, new_tokens, rounds, stock, report
            ),
        )

    def _measured(
        self, kind: str, user: str, model: str, parent: str | None,
        work: Callable[[Loaded, Loaded | None, Report], Any],
    ) -> Iterator[Update]:
        """What work on a model and its dense parent, if there is one, reports, and its result.

        Whoever leaves gives the place back only when the work has noticed, at its next report.
        """
        with self.desk.request(kind), contextlib.ExitStack() as kept:
            yield from self._both(model, parent)
            yield from kept.enter_context(self.desk.place(user))
            loaded = kept.enter_context(self.library.lend(model))
            dense = kept.enter_context(self.library.lend(parent)) if parent else None
            box = in_thread(lambda report: work(loaded, dense, report))
            kept.push(_once_ended(box, kept.pop_all()))
            for found in kept.enter_context(contextlib.closing(one_by_one(box))):
                if found is not None:
                    yield Update(result=found.value if isinstance(found, Finished) else found)

    def estimate(
        self, source: str, context: int, batch: int, load: float, dtype: str, layers: str, device: str
    ) -> Estimate:
        """Cost of any shape on paper; UserError says what is out of bounds."""
        listed = self.library.listed.get(source.strip())
        anything = self.limits.free_models or listed is not None
        if listed is None and real(source.strip()).exists():
            check_folder_within(source.strip(), self.limits.folders)
        return measuring.estimate_config(
            source.strip() if listed is None else str(listed), context, batch, load, dtype, layers, device, anything
        )

    def presets(self) -> list[str]:
        """Shapes that estimates know by name."""
        return measuring.known_presets()

    def devices(self) -> list[str]:
        """Devices that estimates know."""
        return measuring.known_devices()

    # Conversion

    def convert(self, plan: Plan) -> Iterator[Progress]:
        """Convert a model; it is listed when done."""
        self._may_convert()
        self.library.check(plan.parent)
        check_text_within(plan.data, self.limits.folders)
        if plan.name in self.library.listed and not plan.resume:
            raise UserError(f"There is a model called {plan.name} already. Choose another name.")
        for progress in self.conversions.run(self._resolved(plan)):
            if progress.ended and not progress.failed:
                self.library.listed.update(self.conversions.finished())
            yield progress

    def estimate_conversion(self, plan: Plan) -> tuple[float, float, int]:
        """Seconds and bytes that it will take (estimated), and bytes that are free (measured)."""
        self._may_convert()
        self.library.check(plan.parent)
        check_text_within(plan.data, self.limits.folders)
        return self.conversions.estimate(self._resolved(plan))

    def _may_convert(self) -> None:
        if not self.limits.convert:
            raise UserError(
                "Models are not converted on a shared app. At home: python -m modification convert PARENT OUT "
                "--data TEXT"
            )

    def _resolved(self, plan: Plan) -> Plan:
        return dataclasses.replace(plan, parent=str(self.library.listed.get(plan.parent, plan.parent)))

    # The machine room

    def metrics(self) -> bytes:
        """Figures in Prometheus' text format."""
        return self.desk.metrics.text()

    def shut_down(self, patience: float) -> bool:
        """Begin nothing new and wait for answers under way; whether all came to their end."""
        return self.desk.close(patience)

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        return {
            "mod_running": ("Requests at work.", lambda: self.desk.turnstile.count()[0]),
            "mod_waiting": ("Requests in line.", lambda: self.desk.turnstile.count()[1]),
            "mod_kv_promised_bytes": (
                "Keys and values that requests at work may come to (estimated).", lambda: self.desk.turnstile.promised()
            ),
            "mod_kv_kept_bytes": ("Keys and values kept between a chat's turns.", self._chats.held),
            "mod_models": ("Models in memory.", lambda: len(self.library.held())),
        }

    # Shared parts

    @contextlib.contextmanager
    def _dial(self, key: str, dial: Dial) -> Iterator[Dial]:
        self._dials[key] = dial
        try:
            yield dial
        finally:
            if self._dials.get(key) is dial:
                del self._dials[key]

    def _load(self, name: str) -> Iterator[Update]:
        for far in self.library.loading(name):
            yield Update(loading=far)

    def _both(self, model: str, parent: str | None) -> Iterator[Update]:
        for name in filter(None, (model, parent)):
            yield from self._load(name)


def _once_ended(box: Mailbox, held: contextlib.ExitStack) -> Callable[..., None]:
    """An exit that gives back what is held, now or when the work behind a mailbox has come to its end."""
    def wait() -> None:
        box.ended.wait()
        held.close()

    def leave(*error: Any) -> None:
        if box.ended.is_set():
            held.close()
        else:
            threading.Thread(target=wait, daemon=True).start()

    return leave


def _with_memory(limits: Limits) -> Limits:
    """Limits with a bound for keys and values: the one given, or a quarter of what is free now."""
    return limits if limits.cache_bytes else dataclasses.replace(limits, cache_bytes=available_bytes() // 4)


def _threshold(p: object) -> float:
    try:
        return check_threshold(p)
    except ValueError as error:
        raise UserError(f"{error}.") from error
