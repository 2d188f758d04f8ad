"""What an engine is, what a run asks of it, and the one that others are compared with: transformers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

FloatArray = npt.NDArray[np.float32]

QUANTISED = ("q8_0", "q4_0")  # how the names of engines with such weights end
CHECK = (24, 8)  # tokens of the check: a prompt, then single ones


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was asked for."""

    folder: Path
    contexts: tuple[int, ...] = (512, 2048)
    new_tokens: int = 64
    rounds: int = 5
    threads: int = 2
    engines: tuple[str, ...] = ("llamacpp", "ort")
    loads: tuple[float, ...] = (1.0, 0.5, 0.25)
    dtype: str = "f32"
    quantised: bool = False
    work: Path = Path("runs/peers")

    @property
    def room(self) -> int:
        """Tokens that the longest run holds."""
        return max(*self.contexts, sum(CHECK)) + self.new_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run took."""

    prefill_seconds: float
    decode_seconds_per_token: float


class Unsupported(Exception):
    """An engine can't run this, for the reason given."""


class Engine(ABC):
    """Something that runs token ids through a model.

    Attributes:
        name: as it stands in the table; unique.
        note: for people: how it was set up; read at the end.
        vouched_by: name of the engine whose logits speak for this one's; empty if none do.
    """

    name: str
    note: str = ""
    vouched_by: str = ""

    @abstractmethod
    def run(self, prompt_ids: list[int], follow_ids: list[int]) -> Timing:
        """Time the prompt, to the last token's logits, and then each of the tokens that follow, one by one."""


class Fed(Engine):
    """An engine that is fed ids, and whose logits can be checked.

    Attributes:
        kind: type of its weights, a key of ``gather.LIMITS``.
    """

    kind: str

    @abstractmethod
    def reset(self, room: int) -> None:
        """Forget everything; at most ``room`` tokens will come."""

    @abstractmethod
    def feed(self, ids: list[int]) -> None:
        """Run these after what was fed, and be done when it returns."""

    @abstractmethod
    def last_logits(self) -> FloatArray:
        """Logits [V] of the last token fed."""

    def run(self, prompt_ids: list[int], follow_ids: list[int]) -> Timing:
        """Time a prompt and the tokens that follow."""
        self.reset(len(prompt_ids) + len(follow_ids))
        started = time.perf_counter()
        self.feed(prompt_ids)
        prefilled = time.perf_counter()
        for token in follow_ids:
            self.feed([token])
        ended = time.perf_counter()
        return Timing(prefilled - started, (ended - prefilled) / len(follow_ids))

    def logits(self, prompt_ids: list[int], follow_ids: list[int]) -> FloatArray:
        """Logits [1 + len(follow_ids), V] after the prompt and after each token that follows."""
        self.reset(len(prompt_ids) + len(follow_ids))
        rows = []
        for ids in (prompt_ids, *([token] for token in follow_ids)):
            self.feed(ids)
            rows.append(self.last_logits().copy())
        return np.stack(rows)


class Stock(Fed):
    """Transformers' own forward with its growing cache."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.name, self.kind = stock_name(dtype), dtype
        self.note = f"{model.config._attn_implementation} attention, DynamicCache"
        self._model = model

    def reset(self, room: int) -> None:
        """A fresh cache."""
        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> None:
        """One forward."""
        out = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = out.logits

    def last_logits(self) -> FloatArray:
        """Of the last forward."""
        found: FloatArray = self._logits[0, -1].float().numpy()
        return found


def stock_name(dtype: str) -> str:
    """What ratios are taken to."""
    return f"transformers {dtype}"


def random_ids(vocabulary: int, prompt: int, follow: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it."""
    ids = np.random.default_rng(seed).integers(vocabulary, size=prompt + follow).tolist()
    return ids[:prompt], ids[prompt:]
