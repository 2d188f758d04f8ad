"""Sentences and rows for people, from the engine's records. No tensors, no gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.tape import records


def loading_sentence(model: str, far: Any) -> str:
    """How far a load is: seconds, or what has come of a download."""
    if far.total and far.here < far.total:
        megabytes = f"{far.here / 1e6:,.1f} of {far.total / 1e6:,.1f} MB"
        return f"Fetching {model}: {megabytes}. Stop ends it, and keeps what is here."
    return f"Loading {model} … {far.seconds:.0f} s. Stop leaves it loading for later."


def waiting_sentence(ahead: int) -> str:
    """What a user in the queue reads."""
    if ahead == 0:
        return "Next in line: starting as soon as the model is free."
    return f"Waiting for the model: {ahead} ahead of you."


def snippet(request: Any, tape: str, source: str) -> str:
    """Python that makes a finished run again: the same model, prompt, seed, and p at every step.

    ``source``: the arguments of ``modification.load``.
    """
    changes: list[tuple[int, Any]] = []
    new = 0
    for record in records(tape):
        if record[0] != "c" or (record[5] == "p" and changes):
            continue
        p = tuple(record[2]) if isinstance(record[2], list) else record[2]
        if not changes or changes[-1][1] != p:
            changes.append((new if changes else -1, p))
        new += len(record) > 7  # only chosen tokens have a log-probability
    if len(changes) <= 1:
        dial = repr(changes[0][1]) if changes else "0.5"
        setup = ""
    else:
        dial = "moving"
        setup = _MOVING.format(changes=changes)
    return _SNIPPET.format(
        source=source, prompt=request.prompt.strip(), chat=request.chat, setup=setup, dial=dial,
        new_tokens=new, temperature=request.temperature, top_p=request.top_p, top_k=request.top_k,
        seed=request.seed,
    )


_MOVING = """
# p was moved while text streamed: from which new token on, and to what
changes = {changes}
steps = iter(range(-1, 1 << 30))  # -1 is the prompt


def moving():
    at = next(steps)
    return [p for start, p in changes if start <= at][-1]

"""
_SNIPPET = """import torch

import modification
from modification.loading import encode_prompt

model, tokenizer = modification.load({source})
ids = encode_prompt(tokenizer, {prompt!r}, chat={chat})
{setup}
steps = modification.generate(
    model, ids, p={dial}, max_new_tokens={new_tokens}, temperature={temperature}, top_p={top_p}, top_k={top_k},
    seed={seed},
)
tokens = [step.token for step in steps if not step.prefill]
print(tokenizer.decode(tokens, skip_special_tokens=True))
"""


def best_sentence(sweep: Any) -> str:
    """The largest p that costs no more than asked, as a sentence."""
    share = f"{100 * sweep.within:g}%"
    if sweep.best is None:
        return (
            f"**No p of the grid stays within {share}** of {sweep.parent} ({sweep.dense:.3f} nats/token, measured). "
            "Allow more, or add smaller thresholds."
        )
    best = sweep.best
    return (
        f"**p = {best.quality.p:g}** is the largest p within {share} of {sweep.parent}: loss {best.quality.loss:.3f} "
        f"against {sweep.dense:.3f} nats/token (measured), load {best.quality.load:.0%} (measured), KV "
        f"{best.kv:.0%} and compute {best.compute:.0%} of dense (counted)."
    )


def sweep_rows(sweep: Any) -> list[list[str]]:
    """A sweep as table rows."""
    return [
        [
            f"{one.quality.p:g}", f"{one.quality.load:.3f}", f"{one.quality.loss:.3f}",
            f"{one.quality.error:.3f}" if one.quality.error else "–",  # a single block has no spread
            f"{one.kv:.3f}", f"{one.compute:.3f}", f"{one.speed:.0f}",
        ]
        for one in sweep.points
    ]


def bench_rows(results: Sequence[Any]) -> list[list[str]]:
    """A bench as table rows."""
    return [
        [
            f"{r.context:,}", r.side, _cell(r.p, 3), f"{r.load_prompt:.2f}", f"{r.prefill_s:.4f}",
            f"{r.decode_tps:.1f}", f"{r.decode_spread:.1f}", _cell(r.peak_mb, 1), _cell(r.kv_stored_mb, 2),
            *(_cell(pair[at] if pair else None) for pair in (r.speed_up, r.ideal, r.efficiency) for at in (0, 1)),
        ]
        for r in results
    ]


def estimate_rows(found: Any) -> list[list[str]]:
    """An estimate as table rows, MoD against dense."""
    rows = [
        _both("weights, GB", found, "weights", 1e9), _both("keys and values, GB", found, "kv", 1e9),
        _both("activations, GB", found, "activations", 1e9), _both("memory in all, GB", found, "memory", 1e9),
        _both("prefill, TFLOP", found, "prefill_flops", 1e12),
        _both("decode step, GB read", found, "decode_bytes", 1e9),
        _both("prefill at the device's peak, s", found, "prefill_seconds", 1.0),
        _both("decode step at the peak, ms", found, "decode_seconds", 1e-3),
    ]
    bounds = [", ".join(side.bound) for side in (found.dense, found.mod)]
    return [*rows, ["bound by (prefill, decode)", *bounds, ""]]


def conversion_estimate(seconds: float, taken: float, free: int) -> str:
    """What a conversion will take, as a sentence."""
    line = f"About **{duration(seconds)}** and **{size(taken)}** of memory (estimated; {size(free)} are free)."
    return line if taken < free else f"{line} That does not fit: take fewer rows per step, or a smaller model."


def conversion_sentence(progress: Any) -> str:
    """Where a conversion stands."""
    if progress.ended:
        return progress.ended if progress.failed else f"{progress.ended}, in {duration(progress.seconds)}."
    if not progress.log:
        doing = "Reading the text and the model" if progress.steps else "Fitting the routers"
        return f"{doing} … {duration(progress.seconds)}"
    last = progress.log[-1]
    left = "" if progress.left is None else f", about {duration(progress.left)} left (estimated)"
    return (
        f"Step {last['step']:,} of {progress.steps:,}: loss {last['cross_entropy']:.3f} nats/token, load "
        f"{last['load']:.0%} (measured){left}"
    )


def memory_sentence(taken: int, free: int) -> str:
    """What loading a model takes, against what is free."""
    fits = "It fits." if taken <= free else "It does not fit: take a smaller model, or 8-bit or 4-bit weights."
    return f"Loading needs about {size(taken)} (estimated); {size(free)} are free (measured). {fits}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def size(count: float) -> str:
    """Bytes with a fitting unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _both(label: str, found: Any, name: str, unit: float) -> list[str]:
    dense, mod = (getattr(side, name) / unit for side in (found.dense, found.mod))
    return [label, f"{dense:.4g}", f"{mod:.4g}", _cell(found.times(name))]
