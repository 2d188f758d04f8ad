"""Rounds that alternate between engines, and what they found: rows, a table, a report."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.engine import Engine, Settings, Timing, random_ids, stock_name
from benchmarks.peers.gather import Peers
from benchmarks.peers.host import machine, say, versions
from benchmarks.peers.llamacpp import llama_name

SETTLE = 0.1  # seconds between runs, for the threads of the engine before to go to sleep
Times = dict[str, list[Timing]]


def measure(engines: Sequence[Engine], context: int, vocabulary: int, settings: Settings) -> Times:
    """Times of every engine in each round but the first; the rounds start at one engine after the other."""
    prompt, follow = random_ids(vocabulary, context, settings.new_tokens, seed=context)
    times: Times = {engine.name: [] for engine in engines}
    for turn in range(settings.rounds + 1):
        say(f"context {context}, round {turn} of {settings.rounds}{' (dropped)' if turn == 0 else ''}")
        first = turn % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            gc.collect()
            time.sleep(SETTLE)
            times[engine.name].append(engine.run(prompt, follow))
    return {name: found[1:] for name, found in times.items()}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of what rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """``median (low-high)``, each number in this format."""
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one context; ratios say how many times as fast as another it is, within a round.

    Attributes:
        prefill_ratio, decode_ratio: to stock.
        prefill_ratio_llamacpp, decode_ratio_llamacpp: to llama.cpp on weights of stock's type; None if it did not run.
    """

    engine: str
    context: int
    prefill_seconds: Spread
    decode_tokens_per_second: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    prefill_ratio_llamacpp: Spread | None = None
    decode_ratio_llamacpp: Spread | None = None


def summarise(times: Times, context: int, dtype: str) -> list[Row]:
    """Rows of one context; ``dtype`` is that of the engines to compare with."""
    stock, llamacpp = times[stock_name(dtype)], times.get(llama_name(dtype))
    return [
        Row(
            name, context,
            Spread.of([timing.prefill_seconds for timing in found]),
            Spread.of([1 / timing.decode_seconds_per_token for timing in found]),
            *ratios(found, stock), *((None, None) if llamacpp is None else ratios(found, llamacpp)),
        )
        for name, found in times.items()
    ]


def ratios(found: Sequence[Timing], base: Sequence[Timing]) -> tuple[Spread, Spread]:
    """How many times as fast as ``base`` prefill and decoding were, round by round."""
    pairs = list(zip(base, found, strict=True))
    return (
        Spread.of([one.prefill_seconds / timing.prefill_seconds for one, timing in pairs]),
        Spread.of([one.decode_seconds_per_token / timing.decode_seconds_per_token for one, timing in pairs]),
    )


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown: medians, with the smallest and the largest."""
    heads = ["engine", "context", "prefill, s", "decode, tokens/s", "prefill, times stock", "decode, times stock"]
    if any(row.prefill_ratio_llamacpp for row in rows):
        heads += ["prefill, times llama.cpp", "decode, times llama.cpp"]
    lines = [line(heads), "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(line(cells(row)) for row in rows)])


def line(texts: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(texts)} |"


def cells(row: Row) -> list[str]:
    """A row's texts; those on llama.cpp only if it ran."""
    spreads = (row.prefill_ratio, row.decode_ratio, row.prefill_ratio_llamacpp, row.decode_ratio_llamacpp)
    return [
        row.engine, str(row.context), row.prefill_seconds.text(".3f"), row.decode_tokens_per_second.text(".1f"),
        *(spread.text(".2f") for spread in spreads if spread is not None),
    ]


def report(settings: Settings, peers: Peers, rows: Iterable[Row]) -> dict[str, Any]:
    """Everything that a run found, for JSON."""
    asked = asdict(settings) | {"folder": str(settings.folder), "work": str(settings.work)}
    return {
        "settings": asked, "machine": machine(), "versions": versions(),
        "notes": {engine.name: engine.note for engine in peers.engines},
        "missing": peers.missing, "refused": peers.refused, "logit_differences": peers.differences,
        "rows": [asdict(row) for row in rows],
    }
