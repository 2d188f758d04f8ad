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
from app.service.choice import DTYPES, Options, parse
from app.service.conversations import Conversations
from app.service.conversions import Conversions, Plan, Progress
from app.service.desk import Desk
from app.service.dials import Dial, Dials
from app.service.lab import Lab
from app.service.library import Library
from app.service.loaded import Loaded
from app.service.metrics import Metrics
from app.service.paths import check_text_within
from app.service.requests import Limits, Request
from app.service.runs import Update, loading, prepare, stream_tape
from app.service.talks import Talks
from app.service.zero import Zero
from app.tape import Tape, summary, tape_of_trace
from modification import RoutingTrace
from modification.measure.memory import available_bytes, trim


class Service:
    """What the tabs talk to; ``talks`` has the chats, ``lab`` the measurements.

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
        self.dials, store = Dials(), Conversations(self.limits)
        self.desk = Desk(self.limits, store.held, store.relieve, Metrics(self._gauges()))
        self.talks = Talks(self.library, self.desk, self.dials, store, self.limits)
        self.lab = Lab(self.library, self.desk, self.limits)

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
        place = Path(self.library.listed.get(source, source))
        # On a shared app its folders are nobody's business.
        chosen = [repr(str(place) if self.limits.free_models or not place.is_dir() else place.name)]
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
        with self.desk.request("load"):
            yield from loading(self.library, name)
            loaded = self.library.open(name)
        rows, report = measuring.layer_rows(loaded), measuring.report_of(loaded.source)
        yield Update(result=(loaded.describe(), rows, report, measuring.card_of(loaded.source)))

    def label(self, source: str, dtype: str | None, quantization: str | None, device: str | None) -> str:
        """The name under which a model with such options is looked up."""
        return Options(dtype, quantization, device).label(source)

    def keep_tidy(self, every: float = 30.0) -> threading.Thread:
        """Start letting go of unused models, and of memory that malloc keeps, in the background."""
        def tidy() -> None:
            while True:
                time.sleep(every)
                self.talks.store.close_idle(time.monotonic())
                self.library.unload_idle()
                trim()

        thread = threading.Thread(target=tidy, daemon=True)
        thread.start()
        return thread

    # Traces

    def example(self) -> str:
        """The tape of the first shipped example, or an empty one."""
        paths = sorted(self.traces.glob("*.json")) if self.traces and self.traces.is_dir() else []
        return tape_of_trace(RoutingTrace.from_json(paths[0].read_text(encoding="utf-8"))) if paths else ""

    def trace(self, session: str, data: bytes) -> Iterator[Update]:
        """The tape of a trace that a user brings, once there is a place to read it; see :meth:`read_trace`."""
        with self.desk.request("trace"), self.desk.place(session) as line:
            yield from line
            yield Update(tape=self.read_trace(data))

    def read_trace(self, data: bytes) -> str:
        """The tape of a trace that a user brings.

        Raises:
            UserError: too large, or no trace.
        """
        if len(data) > self.limits.trace_bytes:
            raise UserError(
                f"The file has {len(data) / 1e6:.1f} MB; traces of at most {self.limits.trace_bytes / 1e6:.0f} MB are "
                "read."
            )
        try:
            return tape_of_trace(RoutingTrace.from_json(data.decode("utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"This file can't be shown: {error}. Load a JSON file that this app exported.") from error

    # Explore

    def set_p(self, session: str, p: float, shifts: Sequence[float] | None = None) -> float:
        """Move a session's dial: its run in progress, if any, reads it at the next token."""
        return self.dials.move(session, p, shifts)

    def run(self, session: str, p: float, request: Request, user: str = "") -> Iterator[Update]:
        """Generate: places in the queue first, then a tape that grows token by token. ``user``: whose request it is,
        if not the session's.

        Raises:
            UserError: an empty or overlong prompt, a model that can't be loaded, a full queue.
        """
        with self.desk.request("generate"):
            prompt = self.limits.check_prompt(request.prompt)
            dial = Dial(p, request.shifts)
            yield from loading(self.library, request.model)
            with self.library.lend(request.model) as loaded, self.dials.hold(session, dial):
                run = prepare(loaded, prompt, request, self.limits)
                with self.desk.place(user or session, run.need) as line:
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
        for update in self.run(f"run-{secrets.token_hex(16)}", p, request, user):  # nobody else may move its p
            tape = update.tape or tape
        return summary(tape)

    def close(self, session: str) -> None:
        """A session ends: its conversation and caches go."""
        self.talks.store.close(session)

    # Conversion

    def convert(self, plan: Plan) -> Iterator[Progress]:
        """Convert a model; it is listed when done."""
        self._may_convert()
        self.library.check(plan.parent)
        check_text_within(plan.data, self.limits.folders)
        if plan.name in self.library.listed and not plan.resume:
            raise UserError(f"There is a model called {plan.name} already. Choose another name.")
        with self.desk.request("conversion"), contextlib.closing(self.conversions.run(self._resolved(plan))) as run:
            for progress in run:
                if progress.ended and not progress.failed:
                    self.library.listed.update(self.conversions.finished())
                yield progress

    def estimate_conversion(self, plan: Plan) -> tuple[float, float, int]:
        """Seconds and bytes that it will take (estimated), and bytes that are free (measured)."""
        self._may_convert()
        self.library.check(plan.parent)
        check_text_within(plan.data, self.limits.folders)
        with self.desk.request("conversion estimate"):
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
        """Begin nothing new, have a conversion under way leave a checkpoint, and wait for answers; whether all came to
        their end."""
        self.conversions.end()
        return self.desk.close(patience)

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        return {
            "mod_running": ("Requests at work.", lambda: self.desk.turnstile.count()[0]),
            "mod_waiting": ("Requests in line.", lambda: self.desk.turnstile.count()[1]),
            "mod_kv_promised_bytes": (
                "Keys and values that requests at work may come to (estimated).", lambda: self.desk.turnstile.promised()
            ),
            "mod_kv_kept_bytes": ("Keys and values kept between a chat's turns.", lambda: self.talks.store.held()),
            "mod_models": ("Models in memory.", lambda: len(self.library.held())),
        }


def _with_memory(limits: Limits) -> Limits:
    """Limits with a bound for keys and values: the one given, or a quarter of what is free now."""
    return limits if limits.cache_bytes else dataclasses.replace(limits, cache_bytes=available_bytes() // 4)
