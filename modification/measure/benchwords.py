"""What a bench found, in words: the table, what the rest costs, how decoding slows down, what missed or spreads far."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from modification.measure.bench import BARE, DENSE, LOAD, PLAIN, Result
from modification.measure.speed import FAR

UNSTEADY = 0.25  # of a median: a spread beyond it is told


def table(results: Sequence[Result]) -> str:
    """A Markdown table: medians ± half the interquartile range of rounds; measured but the ideal, which is counted."""
    lines = [
        "| context | batch | side | load prompt / decode | prefill s | first token s | decode tokens/s | peak MB "
        "(estimated) | KV stored / allocated MB | ideal prefill / decode (counted) | speed-up | efficiency |",
        "|" + "---|" * 12,
    ]
    lines += [
        f"| {r.context:,} | {r.batch} | {r.side} | {r.load_prompt:.2f} / {r.load_decode:.2f} "
        f"| {r.prefill_s:.3f} ± {r.prefill_spread:.3f} | {r.first_token_s:.3f} ± {r.first_token_spread:.3f} "
        f"| {r.decode_tps:.1f} ± {r.decode_spread:.1f} | {_number(r.peak_mb)} ({_number(r.estimated_mb)}) "
        f"| {_pair((r.kv_stored_mb, r.kv_allocated_mb), 1)} | {_pair(r.ideal)} | {_pair(r.speed_up)} "
        f"| {_pair(r.efficiency)} |"
        for r in results
    ]
    return "\n".join(lines)


def overheads(results: Sequence[Result]) -> list[str]:
    """What routers and bookkeeping, and of that trace and stream, cost at p = 0, from the medians of all rounds."""
    lines, sides = [], {PLAIN: "routers and all bookkeeping", BARE: "trace and stream"}
    by = {(result.context, result.batch, result.side): result for result in results}
    for (context, batch, side), bare in by.items():
        whole = by.get((context, batch, DENSE))
        if side in sides and whole is not None:
            decode, prefill = bare.decode_tps / whole.decode_tps - 1, whole.prefill_s / bare.prefill_s - 1
            lines.append(
                f"context {context:,}, batch {batch}: {sides[side]} cost {decode:+.1%} of decoding, {prefill:+.1%} of "
                "prefill (measured, p = 0)"
            )
    return lines


def missed(results: Sequence[Result]) -> list[str]:
    """Loads that no threshold reaches, as where few scores lie far apart."""
    return [
        f"context {result.context:,}, batch {result.batch}: {result.side} was asked for; the nearest that a p reaches "
        f"on this prompt is {result.load_prompt:.3f}"
        for result in results
        if result.side.startswith(LOAD) and abs(result.load_prompt - float(result.side.removeprefix(LOAD))) > FAR
    ]


def unsteady(results: Sequence[Result]) -> list[str]:
    """Figures that spread so far over the rounds that a median says little, as on a machine that others use."""
    return [
        f"context {result.context:,}, batch {result.batch}: {what} of {result.side} spreads by {spread / figure:.0%} "
        "of its median: other work may have been in the way, so measure again when there is none"
        for result in results
        for what, figure, spread in (
            ("prefill", result.prefill_s, result.prefill_spread), ("decoding", result.decode_tps, result.decode_spread),
        )
        if spread > UNSTEADY * figure
    ]


def growth(results: Sequence[Result]) -> list[str]:
    """How decoding slows down with context: seconds per token of context, routed over dense: ideally the load."""
    lines = []
    for batch in sorted({result.batch for result in results}):
        slopes = {}
        for side in dict.fromkeys(result.side for result in results):
            rows = [result for result in results if (result.batch, result.side) == (batch, side)]
            if len({result.context for result in rows}) > 1 and rows[0].p is not None:
                slopes[side] = np.polyfit([r.context for r in rows], [batch / r.decode_tps for r in rows], 1)[0]
        lines += [
            f"batch {batch}: seconds a token of context adds to a decode step, {side} / dense: "
            f"{slope / slopes[DENSE]:.2f} (measured)"
            for side, slope in slopes.items() if side != DENSE and slopes[DENSE] > 0
        ]
    return lines


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.exists()) else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _pair(values: Sequence[float | None] | None, digits: int = 2) -> str:
    return "-" if values is None or values[0] is None else " / ".join(_number(value, digits) for value in values)
