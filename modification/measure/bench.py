"""Dense against routed over contexts, batches and loads: what the clock and the allocator say, against the ideal.

Ideal is counted work, that of our engine at p = 0 over that at the load: FLOPs for the prompt, bytes read for decoding.
Efficiency is the speed-up that arrived over the ideal one; 1 means that all that routing saves is on the clock.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modification.architectures import refuse
from modification.config import MoDConfig
from modification.executor import executor_of
from modification.executor.choose import fast_executor
from modification.measure.estimate import devices, estimate
from modification.measure.onpaper import on_paper
from modification.measure.speed import (
    Timing,
    Work,
    alternate,
    median,
    threshold_for,
    time_bare,
    time_engine,
    time_stock,
)
from modification.model import convert, restore

STOCK, COMPILED, DENSE = "stock generate", "stock generate, compiled", "engine, p = 0"
PLAIN, BARE = "engine without routers", "engine, p = 0, no trace or stream"
SCATTER = 2.0  # spread of random routers' logits: scores then cover (0, 1)
_MB = 1e6
LOAD = "load "  # how the side of a load is called


@dataclass(frozen=True, slots=True)
class Result:
    """One side at one setting; medians over rounds, each with half the range between its quartiles.

    Attributes:
        side: stock generate, the engine at p = 0, or the engine at a load.
        load_prompt, load_decode: reached, share of (MoD layer, token) pairs.
        prefill_s, first_token_s, decode_tps: seconds, seconds, new tokens per second over the batch.
        peak_mb: memory above idle; None where it can't be measured.
        kv_stored_mb, kv_allocated_mb: keys and values at the end; None for the stock side.
        estimated_mb: keys, values and activations as the estimator foretells them for the load that was reached.
        ideal, speed_up, efficiency: of (prefill, decode); work over our engine's at p = 0, time over the faster dense
            side's, and the latter over the former; None for dense sides.
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
    first_token_spread: float
    decode_tps: float
    decode_spread: float
    peak_mb: float | None
    kv_stored_mb: float | None
    kv_allocated_mb: float | None
    estimated_mb: float | None = None
    ideal: tuple[float, float] | None = None
    speed_up: tuple[float, float] | None = None
    efficiency: tuple[float, float] | None = None


def random_pair(config: PreTrainedConfig, dtype: torch.dtype, layers: Any = "inner") -> tuple[Any, Any]:
    """A dense model of that shape with random weights, and its MoD version with scattered routers.

    Raises:
        ValueError: there is no such model, or it can't be routed.
    """
    refuse(config, "this model")
    on_paper(config)  # a config that doesn't add up is told at once
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parent = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model: Any = convert(copy.deepcopy(parent), MoDConfig(layers=layers))
        scatter(model)
    return parent, model


def scatter(model: Any) -> None:
    """Give a MoD model random routers whose scores cover (0, 1)."""
    for index in model.mod_layers:
        router = model.family.decoder_layers(model)[index].router
        torch.nn.init.normal_(router.weight, std=SCATTER / model.config.hidden_size**0.5)
        torch.nn.init.zeros_(router.bias)


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model inside a MoD one, as a copy."""
    return restore(copy.deepcopy(model))


def bench(
    model: Any, parent: Any, *, contexts: Sequence[int], batches: Sequence[int], loads: Sequence[float],
    new_tokens: int, rounds: int = 5, stock: bool = True, compiled: bool = False, overheads: bool = False,
    ragged: bool = False, say: Callable[[str], None] = lambda line: None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure every combination; all sides of one alternate.

    Args:
        model, parent: a MoD model and the dense one to compare with.
        contexts: prompt lengths in tokens.
        loads: of the MoD layers, 0 to 1; p is found for each on the prompt itself.
        stock: whether to time transformers' generate too (slow over long contexts).
        compiled: whether to time it with a static cache and compiled as well.
        overheads: whether to time the engine without routers, and without its trace and stream.
        ragged: whether the prompts of a batch have different lengths, from a context down to half of it.
        say: told what is being measured.
        tell: told how many rounds are done, before each timing; whatever it raises ends the bench.

    Raises:
        ValueError: a value out of bounds, before anything runs.
    """
    check_asked(contexts, batches, loads, new_tokens, rounds)
    _check(model, contexts, new_tokens)
    found: list[Result] = []
    for context in contexts:
        for batch in batches:
            where = f"context {context:,}, batch {batch}"
            say(f"{where}: {rounds} rounds")
            setting = Setting(model, parent, context, batch, new_tokens, stock, compiled, overheads, ragged)
            found += setting.measure(loads, rounds, functools.partial(_tell_round, tell, where, rounds))
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """One context and batch, and the sides that alternate there."""

    model: Any
    parent: Any
    context: int
    batch: int
    new_tokens: int
    stock: bool
    compiled: bool
    overheads: bool
    ragged: bool

    def measure(
        self, loads: Sequence[float], rounds: int, tell: Callable[[int], None] = lambda done: None
    ) -> list[Result]:
        """Time all sides and work out the routed ones' speed-up over the faster dense one."""
        model, executor = self.model, executor_of(self.model)
        work = Work.random(
            model.config.vocab_size, self.batch, self.context, self.new_tokens, model.device, self.ragged
        )
        p = {f"{LOAD}{load:g}": threshold_for(load, executor, model, work.prompts) for load in loads if load < 1}
        sides = self._dense_sides(work)
        for name, threshold in {DENSE: 0.0, **p}.items():
            sides[name] = functools.partial(time_engine, executor, model, work, threshold)
        timings = alternate(sides, rounds, tell)
        rivals = [timings[name] for name in (STOCK, COMPILED, DENSE) if name in timings]
        found = []
        for name, rows in timings.items():
            result = _result(self.context, self.batch, name, {DENSE: 0.0, **p}.get(name), rows)
            result = self._foretold(result, work.tokens // self.batch)
            found.append(_compared(result, timings[DENSE][0], rows, rivals) if name in p else result)
        return found

    def _dense_sides(self, work: Work) -> dict[str, Callable[[], Timing]]:
        sides: dict[str, Callable[[], Timing]] = {}
        if self.stock:
            sides[STOCK] = functools.partial(time_stock, self.parent, work)
        if self.compiled:
            sides[COMPILED] = functools.partial(time_stock, self.parent, work, compiled=True)
        if self.overheads and executor_of(self.model).name == "fast":
            plain = fast_executor(self.model, routed=False)
            sides[PLAIN] = functools.partial(time_bare, plain, self.model, work, 0.0, ())
        if self.overheads:
            mod_layers = self.model.mod_layers
            sides[BARE] = functools.partial(time_bare, executor_of(self.model), self.model, work, 0.0, mod_layers)
        return sides

    def _foretold(self, result: Result, tokens: int) -> Result:
        """The memory that the estimator expects for our engine's sides; prompts have so many ``tokens`` on average."""
        if result.p is None:
            return result
        try:
            side = estimate(
                self.model.config, context=tokens + self.new_tokens, batch=self.batch, load=result.load_prompt,
                dtype=self.model.dtype, layers=self.model.mod_layers,
                device=devices()["cpu-2-cores"] if self.model.device.type == "cpu" else None,
            ).mod
        except ValueError:  # a family that can't be followed on paper; what was measured counts
            return result
        return dataclasses.replace(result, estimated_mb=(side.kv + side.activations) / _MB)


def _tell_round(tell: Callable[[str], None], where: str, rounds: int, done: int) -> None:
    tell(f"{where}: {done} of {rounds}")


def _result(context: int, batch: int, side: str, p: float | None, timings: list[Timing]) -> Result:
    (prefill, prefill_spread), (step, step_spread) = median(timings, "prefill"), median(timings, "decode")
    first, first_spread = median(timings, "first_token")
    one, ours = timings[0], p is not None
    peaks = [timing.peak for timing in timings if timing.peak is not None]
    return Result(
        context, batch, side, p, *one.load, prefill, prefill_spread, first, first_spread,
        batch / step, batch / step * step_spread / step, max(peaks) / _MB if peaks else None,
        one.stored / _MB if ours else None, one.allocated / _MB if ours else None,
    )


def _compared(result: Result, dense: Timing, routed: list[Timing], rivals: list[list[Timing]]) -> Result:
    """With speed-up and efficiency over the faster dense side: medians of the ratios within each round."""
    ideal = dense.flops / routed[0].flops, dense.traffic / routed[0].traffic
    faster = _faster("prefill", routed, rivals), _faster("decode", routed, rivals)
    efficiency = faster[0] / ideal[0], faster[1] / ideal[1]
    return dataclasses.replace(result, ideal=ideal, speed_up=faster, efficiency=efficiency)


def _faster(part: str, routed: list[Timing], rivals: list[list[Timing]]) -> float:
    """How many times faster than the rival that is faster on the whole."""
    best = min(rivals, key=lambda rows: median(rows, part)[0])
    ratios = [getattr(rival, part) / getattr(ours, part) for rival, ours in zip(best, routed, strict=True)]
    return float(np.median(ratios))


def check_asked(
    contexts: Sequence[int], batches: Sequence[int], loads: Sequence[float], new_tokens: int, rounds: int
) -> None:
    """What can be told without a model.

    Raises:
        ValueError: a number out of bounds.
    """
    counts = {"contexts": contexts, "batch": batches, "new tokens": [new_tokens], "rounds": [rounds]}
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} {list(values)}: give whole numbers of 1 or more")
    if not loads or not all(0 <= load <= 1 for load in loads):
        raise ValueError(f"loads {list(loads)}: give numbers from 0 to 1")


def _check(model: Any, contexts: Sequence[int], new_tokens: int) -> None:
    if model.mod_config.kv != "evict":
        raise ValueError(f"bench counts what eviction saves; this model has kv={model.mod_config.kv!r}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(contexts) + new_tokens > limit:
        raise ValueError(
            f"context {max(contexts)} and {new_tokens} new tokens are more than the model's context of {limit}: "
            f"ask for at most {limit - new_tokens}"
        )
