"""Speed and memory on the clock and in the allocator: dense and routed alternate inside one run.

A round prefills prompts and decodes given tokens after them, so that every side does the same work whatever
it would have written; the next token is chosen each time all the same. The dense parent is offered twice, as
transformers' own ``generate`` and as our engine at p = 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from modification.cache import RaggedCache
from modification.executor import Executor
from modification.generate import generate_batch
from modification.measure.cost import ModelShape
from modification.measure.memory import Peak

CALIBRATION_TOKENS = 1024
CALIBRATION_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Timing:
    """One round of one side.

    Attributes:
        prefill: seconds until the prompts of all rows were in the cache.
        first_token: seconds until every row's first new token was chosen.
        decode: seconds per decode step (a token of each row).
        peak: bytes of memory above idle at the highest; None where it can't be measured.
        stored, allocated: bytes of keys and values at the end; 0 for the stock side.
        load: share of (MoD layer, token) pairs that ran in the prompt, and in decoding.
        flops: counted for the prompts.
        traffic: bytes read per decode step, counted; mean over the steps.
    """

    prefill: float
    first_token: float
    decode: float
    peak: int | None
    stored: int = 0
    allocated: int = 0
    load: tuple[float, float] = (1.0, 1.0)
    flops: int = 0
    traffic: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What every side does: prompts [B, T] and the tokens [B, S] that follow them."""

    prompts: Tensor
    follow: Tensor

    @classmethod
    def random(cls, vocabulary: int, batch: int, context: int, steps: int, device: torch.device) -> Work:
        """Scattered ids, the same each time."""
        generator = torch.Generator().manual_seed(context * 31 + batch)
        ids = torch.randint(vocabulary, (batch, context + steps), generator=generator).to(device)
        return cls(ids[:, :context], ids[:, context:])


def time_engine(executor: Executor, model: Any, work: Work, p: float) -> Timing:
    """One round of our engine at threshold ``p``."""
    shape, rows = ModelShape.of(model), len(work.prompts)
    caches = [model.new_cache() for _ in range(rows)]
    follow = work.follow.T.tolist()
    with Peak(model.device) as peak:
        start = _now(model.device)
        done = [executor.prefill(ids, cache, p) for ids, cache in zip(work.prompts, caches, strict=True)]
        prefilled = _now(model.device)
        for part in done:
            part.logits[0].argmax().item()
        first = _now(model.device)
        routed = []
        for tokens in follow:
            step = executor.decode(tokens, caches, [p] * rows)
            step.logits.argmax(-1).tolist()
            routed.append(step.routed)
        end = _now(model.device)
    sizes = [cache.nbytes() for cache in caches]
    ran = np.stack([part.routed for part in done], axis=1)  # [M, B, T]
    return Timing(
        prefilled - start, first - start, (end - first) / len(follow), peak.bytes,
        sum(size.stored for size in sizes), sum(size.allocated for size in sizes),
        (float(ran.mean()), float(np.mean(routed))),
        sum(shape.prefill_flops(ran.shape[2], ran[:, row].sum(1).tolist()) for row in range(rows)),
        _traffic(shape, model, ran, np.array(routed)),
    )


def time_dense(executor: Executor, model: Any, work: Work) -> Timing:
    """One round of the engine as the dense parent: an executor without routers, over caches without them."""
    entry_bytes = model.new_cache().entry_bytes
    caches = [RaggedCache(model.windows, (), entry_bytes) for _ in work.prompts]
    with Peak(model.device) as peak:
        start = _now(model.device)
        for ids, cache in zip(work.prompts, caches, strict=True):
            executor.prefill(ids, cache, 0.0)
        first = _now(model.device)
        for tokens in work.follow.T.tolist():
            executor.decode(tokens, caches, [0.0] * len(caches)).logits.argmax(-1).tolist()
        end = _now(model.device)
    return Timing(first - start, first - start, (end - first) / work.follow.shape[1], peak.bytes)


def time_stream(model: Any, work: Work) -> Timing:
    """One round through :func:`generate_batch` at p = 0, every Step made and read: trace and stream on."""
    steps = work.follow.shape[1]
    with Peak(model.device) as peak:
        start = _now(model.device)
        stream = generate_batch(model, list(work.prompts), p=0.0, max_new_tokens=steps, stop=())
        for _ in work.prompts:
            next(stream)
        first = _now(model.device)
        for _ in stream:
            pass
        end = _now(model.device)
    return Timing(first - start, first - start, (end - first) / steps, peak.bytes)


def time_stock(parent: Any, work: Work) -> Timing:
    """One round of the dense parent under ``transformers.generate``, greedy, with its usual cache."""
    clock, steps = _Clock(parent.device), work.follow.shape[1]
    with Peak(parent.device) as peak:
        start = _now(parent.device)
        parent.generate(
            work.prompts, attention_mask=torch.ones_like(work.prompts), max_new_tokens=steps + 1,
            min_new_tokens=steps + 1, do_sample=False, stopping_criteria=StoppingCriteriaList([clock]),
        )
    first = clock.times[0] - start
    return Timing(first, first, (clock.times[-1] - clock.times[0]) / steps, peak.bytes)


def threshold_for(load: float, executor: Executor, model: Any, prompt: Tensor) -> float:
    """The p at which this prompt [T] reaches a load of its MoD layers; by its own scores, a few times over."""
    if load >= 1:
        return 0.0
    ids, p, tried = prompt[:CALIBRATION_TOKENS], 0.0, dict[float, float]()
    for _ in range(CALIBRATION_ROUNDS):
        cache = model.new_cache()
        done = executor.prefill(ids, cache, p)
        cache.reset()
        tried[p] = abs(float(done.routed.mean()) - load)
        # A skipped block changes later scores, so the quantile is a fixed point to be found, not a formula.
        p = float(np.clip(np.quantile(done.scores, 1 - load), 0.0, 1.0))
    return min(tried, key=lambda value: tried[value])


def alternate(sides: dict[str, Callable[[], Timing]], rounds: int) -> dict[str, list[Timing]]:
    """Rounds in which every side runs once, in turn; a first one warms up and is thrown away."""
    found: dict[str, list[Timing]] = {name: [] for name in sides}
    for at in range(rounds + 1):
        for name, side in sides.items():
            timing = side()
            if at:
                found[name].append(timing)
    return found


def median(timings: Sequence[Timing], field: str) -> tuple[float, float]:
    """Median of a field over rounds, and half the range between its quartiles."""
    values = [getattr(timing, field) for timing in timings]
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(high - low) / 2


def _traffic(shape: ModelShape, model: Any, ran: npt.NDArray[np.bool_], routed: npt.NDArray[np.bool_]) -> float:
    """Mean bytes per decode step; prompts' decisions ran [M, B, T], steps' decisions routed [S, M, B]."""
    first = model.family.decoder_layers(model)[0]
    layer_bytes = sum(weight.nbytes for name, weight in first.named_parameters() if not name.startswith("router."))
    rows, context = ran.shape[1:]
    entries = np.full((shape.depth, rows), context, np.int64)
    mod = list(shape.mod_layers)
    entries[mod] = ran.sum(2)
    total = 0
    for step in routed:
        entries += 1
        entries[mod] += step.astype(np.int64) - 1
        total += shape.decode_bytes(model.dtype.itemsize, entries, step, layer_bytes)
    return total / len(routed)


class _Clock(StoppingCriteria):
    """Notes when each token was chosen; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(_now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
