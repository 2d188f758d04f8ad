"""Dense against routed over contexts, batches and loads: what the clock and the allocator say, against the ideal.

Ideal is counted work: the dense parent's FLOPs over the routed ones for the prompt, bytes read for decoding.
Efficiency is the speed-up that arrived over the ideal one; 1 means that all that routing saves is on the clock.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modification.config import MoDConfig
from modification.executor import executor_of
from modification.measure.speed import Timing, Work, alternate, median, threshold_for, time_engine, time_stock
from modification.model import convert, restore

STOCK, DENSE = "stock generate", "engine, p = 0"
SCATTER = 2.0  # spread of random routers' logits: scores then cover (0, 1)
_MB = 1e6


@dataclass(frozen=True, slots=True)
class Result:
    """One side at one setting; medians over rounds, each with half the range between its quartiles.

    Attributes:
        side: stock generate, the engine at p = 0, or the engine at a load.
        load_prompt, load_decode: reached, share of (MoD layer, token) pairs.
        prefill_s, first_token_s, decode_tps: seconds, seconds, new tokens per second over the batch.
        peak_mb: memory above idle; None where it can't be measured.
        kv_stored_mb, kv_allocated_mb: keys and values at the end; None for the stock side.
        ideal, speed_up, efficiency: of (prefill, decode), over the faster dense side; None for dense sides.
    """

    context: int
    batch: int
    side: str
    p: float | None
    load_prompt: float
    load_decode: float
    prefill_s: float
    prefill_spread: float
    first_token_s: float
    decode_tps: float
    decode_spread: float
    peak_mb: float | None
    kv_stored_mb: float | None
    kv_allocated_mb: float | None
    ideal: tuple[float, float] | None = None
    speed_up: tuple[float, float] | None = None
    efficiency: tuple[float, float] | None = None


def random_pair(config: PreTrainedConfig, dtype: torch.dtype, layers: Any = "inner") -> tuple[Any, Any]:
    """A dense model of that shape with random weights, and its MoD version with scattered routers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parent = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model: Any = convert(copy.deepcopy(parent), MoDConfig(layers=layers))
        for index in model.mod_layers:
            router = model.family.decoder_layers(model)[index].router
            torch.nn.init.normal_(router.weight, std=SCATTER / config.hidden_size**0.5)
            torch.nn.init.zeros_(router.bias)
    return parent, model


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model inside a MoD one, as a copy."""
    return restore(copy.deepcopy(model))


def bench(
    model: Any, parent: Any, *, contexts: Sequence[int], batches: Sequence[int], loads: Sequence[float],
    new_tokens: int, rounds: int = 5, say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure every combination; all sides of one alternate.

    Args:
        model, parent: a MoD model and the dense one to compare with.
        contexts: prompt lengths in tokens.
        loads: of the MoD layers, 0 to 1; p is found for each on the prompt itself.
        say: told what is being measured.

    Raises:
        ValueError: a value out of bounds, before anything runs.
    """
    _check(model, contexts, batches, loads, new_tokens, rounds)
    found: list[Result] = []
    for context in contexts:
        for batch in batches:
            say(f"context {context:,}, batch {batch}: {rounds} rounds")
            found += _setting(model, parent, context, batch, loads, new_tokens, rounds)
    return found


def _setting(
    model: Any, parent: Any, context: int, batch: int, loads: Sequence[float], new_tokens: int, rounds: int
) -> list[Result]:
    executor = executor_of(model)
    work = Work.random(model.config.vocab_size, batch, context, new_tokens, model.device)
    p = {f"load {load:g}": threshold_for(load, executor, model, work.prompts[0]) for load in loads if load < 1}
    sides: dict[str, Callable[[], Timing]] = {STOCK: lambda: time_stock(parent, work)}
    for name, threshold in {DENSE: 0.0, **p}.items():
        sides[name] = functools.partial(time_engine, executor, model, work, threshold)
    timings = alternate(sides, rounds)
    best = tuple(min(median(timings[name], part)[0] for name in (STOCK, DENSE)) for part in ("prefill", "decode"))
    dense = timings[DENSE][0]
    return [
        _result(context, batch, name, {DENSE: 0.0, **p}.get(name), timings[name], dense, best if name in p else None)
        for name in sides
    ]


def _result(
    context: int, batch: int, side: str, p: float | None, timings: list[Timing], dense: Timing,
    best: tuple[float, ...] | None,
) -> Result:
    (prefill, prefill_spread), (step, step_spread) = median(timings, "prefill"), median(timings, "decode")
    one, stock = timings[0], side == STOCK
    peaks = [timing.peak for timing in timings if timing.peak is not None]
    result = Result(
        context, batch, side, p, *one.load, prefill, prefill_spread, median(timings, "first_token")[0], batch / step,
        batch / step * step_spread / step, max(peaks) / _MB if peaks else None, None if stock else one.stored / _MB,
        None if stock else one.allocated / _MB,
    )
    if best is None:
        return result
    ideal = dense.flops / one.flops, dense.traffic / one.traffic
    faster = best[0] / prefill, best[1] / step
    efficiency = faster[0] / ideal[0], faster[1] / ideal[1]
    return dataclasses.replace(result, ideal=ideal, speed_up=faster, efficiency=efficiency)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.exists()) else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def table(results: Sequence[Result]) -> str:
    """A Markdown table; all figures measured but the ideal, which is counted."""
    lines = [
        "| context | batch | side | load prompt / decode | prefill s | first token s | decode tokens/s | peak MB "
        "| KV stored / allocated MB | ideal prefill / decode (counted) | speed-up | efficiency |",
        "|" + "---|" * 12,
    ]
    lines += [
        f"| {r.context:,} | {r.batch} | {r.side} | {r.load_prompt:.2f} / {r.load_decode:.2f} "
        f"| {r.prefill_s:.3f} ± {r.prefill_spread:.3f} | {r.first_token_s:.3f} "
        f"| {r.decode_tps:.1f} ± {r.decode_spread:.1f} | {_number(r.peak_mb)} "
        f"| {_pair((r.kv_stored_mb, r.kv_allocated_mb), 1)} | {_pair(r.ideal)} | {_pair(r.speed_up)} "
        f"| {_pair(r.efficiency)} |"
        for r in results
    ]
    return "\n".join(lines)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _pair(values: Sequence[float | None] | None, digits: int = 2) -> str:
    return "-" if values is None or values[0] is None else " / ".join(_number(value, digits) for value in values)


def _check(
    model: Any, contexts: Sequence[int], batches: Sequence[int], loads: Sequence[float], new_tokens: int, rounds: int
) -> None:
    counts = {"contexts": contexts, "batch": batches, "new tokens": [new_tokens], "rounds": [rounds]}
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} {list(values)}: give whole numbers of 1 or more")
    if not loads or not all(0 <= load <= 1 for load in loads):
        raise ValueError(f"loads {list(loads)}: give numbers from 0 to 1")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(contexts) + new_tokens > limit:
        raise ValueError(
            f"context {max(contexts)} and {new_tokens} new tokens are more than the model's context of {limit}: "
            f"ask for at most {limit - new_tokens}"
        )
