"""Sweeps, benches and estimates on behalf of a page: each gets its place and its models, and works in a thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from app.errors import UserError
from app.service import measuring
from app.service.desk import Desk, in_line
from app.service.jobs import Finished, Report, in_thread, once_ended, one_by_one
from app.service.library import Library
from app.service.loaded import Loaded
from app.service.paths import check_folder_within, real
from app.service.requests import Limits
from app.service.runs import Update, loading
from app.service.turnstile import Turnstile
from modification.measure.estimate import Estimate


class Lab:
    """Measurements.

    Args:
        library: where models come from.
        desk: where places are given.
    """

    def __init__(self, library: Library, desk: Desk, limits: Limits) -> None:
        self.library, self.desk, self.limits = library, desk, limits
        self._benching = Turnstile(1, limits.waiting)  # two would time each other, and copy a model each

    def sweep(
        self, model: str, parent: str | None, text: str, grid: Sequence[float], within: float, user: str = ""
    ) -> Iterator[Update]:
        """A text over a grid of p: the sweep so far, again and again; the last is whole."""
        yield from self._measured(
            "sweep", user, model, parent,
            lambda loaded, dense, report: measuring.sweep_text(loaded, dense, text, grid, within, self.limits, report),
            measuring.BLOCK,
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
            max(contexts, default=0) + new_tokens, self._benching,
        )

    def _measured(
        self, kind: str, user: str, model: str, parent: str | None,
        work: Callable[[Loaded, Loaded | None, Report], Any], tokens: int, alone: Turnstile | None = None,
    ) -> Iterator[Update]:
        """What work on a model and its dense parent, if there is one, reports, and its result. It keeps so many tokens
        in a cache at a time.

        Whoever leaves gives the place back only when the work has noticed, at its next report.
        """
        with self.desk.request(kind), contextlib.ExitStack() as kept:
            yield from loading(self.library, model, parent)
            loaded = kept.enter_context(self.library.lend(model))
            need = loaded.cache_bytes(max(0, min(tokens, loaded.context)))
            if alone is not None:
                yield from kept.enter_context(in_line(alone))
            yield from kept.enter_context(self.desk.place(user, need))
            dense = kept.enter_context(self.library.lend(parent)) if parent else None
            box = in_thread(lambda report: work(loaded, dense, _until(report, self.limits.measuring)))
            kept.push(once_ended(box, kept.pop_all()))
            for found in kept.enter_context(contextlib.closing(one_by_one(box))):
                if found is not None:
                    yield Update(result=found.value if isinstance(found, Finished) else found)

    def estimate(
        self, source: str, context: int, batch: int, load: float, dtype: str, layers: str, device: str
    ) -> Estimate:
        """Cost of any shape on paper; UserError says what is out of bounds."""
        listed = self.library.listed.get(source.strip())
        anything = self.limits.free_models or listed is not None
        if listed is None and anything and real(source.strip()).exists():
            check_folder_within(source.strip(), self.limits.folders)
        place = source.strip() if listed is None else str(listed)
        with self.desk.request("estimate"):
            try:
                return measuring.estimate_config(place, context, batch, load, dtype, layers, device, anything)
            except UserError as error:  # where a listed model lies is nobody's business
                raise UserError(str(error).replace(place, source.strip())) from error

    def presets(self) -> list[str]:
        """Shapes that estimates know by name."""
        return measuring.known_presets()

    def devices(self) -> list[str]:
        """Devices that estimates know."""
        return measuring.known_devices()


def _until(report: Report, seconds: float) -> Report:
    """The same, which ends the work at its first report after so many seconds."""
    end = time.monotonic() + seconds

    def timed(value: Any) -> None:
        report(value)
        if time.monotonic() > end:
            raise UserError(
                f"This was ended after {seconds / 60:.0f} minutes, the longest that a measurement may take here. Ask "
                "for less at once: fewer lengths, loads, rounds or thresholds, or a shorter text."
            )

    return timed
