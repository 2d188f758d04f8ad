"""What a threshold costs and what it saves, on one text: loss against load, cache, compute and speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modification.executor import executor_of
from modification.measure.cost import ModelShape
from modification.measure.quality import Quality, evaluate

_TIMED_TOKENS = 2048
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Point:
    """A threshold's two sides.

    Attributes:
        quality: loss and load, measured.
        kv: keys and values stored, as a share of the dense parent's, counted.
        compute: FLOPs of the prompt's pass, as a share of the dense parent's, counted.
        speed: tokens per second of prefill, measured: the median of three passes.
    """

    quality: Quality
    kv: float
    compute: float
    speed: float


def point(model: Any, blocks: npt.NDArray[np.int32], p: float) -> Point:
    """Evaluate a MoD model at ``p`` over blocks [N, T] of token ids."""
    quality = evaluate(model, blocks, p)
    return Point(quality, *shares(model, quality, blocks.shape[1]), speed(model, blocks, p))


def shares(model: Any, quality: Quality, width: int) -> tuple[float, float]:
    """KV stored and FLOPs of a prompt of ``width`` tokens, as shares of the dense parent's; counted."""
    shape = ModelShape.of(model)
    held = {layer: shape.visible(layer, width) for layer in range(shape.depth)}
    skipped = sum(
        held[layer] * (1 - load) for layer, load in zip(shape.mod_layers, quality.layer_loads, strict=True)
    )
    kv = 1.0 if shape.keep else 1 - skipped / sum(held.values())
    ran = [round(load * width) for load in quality.layer_loads]
    return kv, shape.prefill_flops(width, ran) / shape.prefill_flops(width)


def largest_within(points: Sequence[Point], dense_loss: float, share: float) -> Point | None:
    """The largest p up to which the loss stays within ``share`` (0.02: 2%) of the dense parent's; None if none does."""
    found = None
    for one in sorted(points, key=lambda one: one.quality.p):
        if one.quality.loss > dense_loss * (1 + share):
            break
        found = one
    return found


def speed(model: Any, blocks: npt.NDArray[np.int32], p: float) -> float:
    """Tokens per second of prefill on the first blocks, measured: the median of three passes."""
    executor = executor_of(model)
    rows = blocks[: max(1, _TIMED_TOKENS // blocks.shape[1])]
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for ids in rows:
            cache = model.new_cache()
            executor.prefill(torch.from_numpy(ids.astype(np.int64)).to(model.device), cache, p)
            cache.reset()
        times.append(time.perf_counter() - start)
    return rows.size / float(np.median(times))
