"""This project's engines: the MoD model at p = 0, which must agree with the dense one, and at lower loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers.engine import Engine, Fed, FloatArray, Settings, Timing
from benchmarks.peers.files import load
from modification import MoDConfig, MoDModel, convert
from modification.executor import executor_of
from modification.measure.bench import dense_twin, scatter
from modification.measure.speed import threshold_for


class MoD(Fed):
    """The model through its executor, one cache per run.

    Args:
        model: a MoD one.
        dtype: of its weights.
        p: its threshold; at 0 every token runs everywhere.

    Attributes:
        routed: which tokens ran, [M, T] and then [M, 1] per call since the last reset.
    """

    def __init__(self, model: Any, dtype: str, p: float = 0.0) -> None:
        self.name, self.kind, self.p = our_name(dtype, 1.0), dtype, p
        self.model, self.executor = model, executor_of(model)
        self.note = f"{self.executor.note}; p = {p:g}"
        self.routed: list[npt.NDArray[np.bool_]] = []

    def reset(self, room: int) -> None:
        """A fresh cache, which grows."""
        self._cache = self.model.new_cache()
        self.routed = []

    def feed(self, ids: list[int]) -> None:
        """One prefill, or one step of decoding."""
        if len(ids) > 1:
            done = self.executor.prefill(torch.tensor(ids), self._cache, self.p)
        else:
            done = self.executor.decode(ids, [self._cache], [self.p])
        self._logits = done.logits
        self.routed.append(done.routed)

    def last_logits(self) -> FloatArray:
        """Of the last call."""
        found: FloatArray = self._logits[0].float().numpy()
        return found


class Routed(Engine):
    """The same at a load below 1, by a threshold found on each prompt before the clock starts.

    Args:
        dense: the engine at p = 0.
        load: share of (MoD layer, token) pairs to run.
    """

    def __init__(self, dense: MoD, load: float) -> None:
        self.name, self.vouched_by, self.load = our_name(dense.kind, load), dense.name, load
        self._inner = MoD(dense.model, dense.kind)
        self._thresholds: dict[tuple[int, ...], float] = {}
        self._reached: dict[int, str] = {}

    def run(self, prompt_ids: list[int], follow_ids: list[int]) -> Timing:
        """Time it at its threshold, and note the loads that came of it in prompt and decoding."""
        inner = self._inner
        inner.p = self._threshold(prompt_ids)
        timing = inner.run(prompt_ids, follow_ids)
        prompt, decode = inner.routed[0].mean(), np.mean(inner.routed[1:])
        context = len(prompt_ids)
        self._reached[context] = f"context {context}: p = {inner.p:.4f}, load {prompt:.2f} (decode {decode:.2f})"
        self.note = "; ".join((inner.executor.note, *self._reached.values()))
        return timing

    def _threshold(self, prompt_ids: list[int]) -> float:
        key = tuple(prompt_ids)
        if key not in self._thresholds:
            prompt = torch.tensor(prompt_ids)
            self._thresholds[key] = threshold_for(self.load, self._inner.executor, self._inner.model, [prompt])
        return self._thresholds[key]


def our_name(dtype: str, load: float) -> str:
    """What an engine at this load is called."""
    return f"MoDification {dtype}, load {load:g}"


def load_pair(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The folder's model, dense and as a MoD one; the one that the folder does not hold is made from the other."""
    model = load(folder, dtype)
    return (dense_twin(model), model) if isinstance(model, MoDModel) else (model, scattered(model))


def scattered(dense: Any) -> Any:
    """A dense model's MoD version whose routers' scores cover (0, 1); random, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = convert(copy.deepcopy(dense), MoDConfig())
        scatter(model)
    return model


def our_engines(model: Any, settings: Settings) -> list[Engine]:
    """At load 1, whose logits vouch for the rest, and at each lower load asked for."""
    dense = MoD(model, settings.dtype)
    return [dense, *(Routed(dense, load) for load in settings.loads if load < 1)]
