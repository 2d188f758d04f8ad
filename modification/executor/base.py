"""What an executor is, and the one that works for every model: the model's own forward."""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modification.cache import RaggedCache
from modification.config import Threshold

CHUNK = 2048  # prompt tokens that go through the layers together: bounds the memory of activations


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What a call reports.

    Attributes:
        outputs: the logits, or memory [B * V] that holds them; compiled kernels make float32 of any type's.
        scores: router gates per MoD layer, [M, N] for N tokens or rows.
        routed: whether they ran there, [M, N].
        likeliest: each row's likeliest token and its log-probability, B of them, where they were found on the way.
    """

    outputs: Tensor | ctypes.Array[ctypes.c_float]
    scores: npt.NDArray[np.float32]
    routed: npt.NDArray[np.bool_]
    likeliest: Sequence[tuple[int, float]] = ()

    @property
    def logits(self) -> Tensor:
        """Of the last token (prefill, B = 1) or of each row's token (decode), [B, V]."""
        if isinstance(self.outputs, Tensor):
            return self.outputs
        # No sooner: a decode step has little time for torch, and greedy choice needs none of it.
        return torch.frombuffer(self.outputs, dtype=torch.float32).view(self.scores.shape[1], -1)


class Executor(ABC):
    """Runs prompts and tokens through one model. Each row of a batch has a cache and a threshold of its own, which
    may differ from one MoD layer to the next.

    Attributes:
        name: ``"fast"`` or ``"stock"``.
        short_end: whether a prompt's results in the last layer are those of its last token alone.
        note: which path runs and why, for people.
    """

    name: ClassVar[str]
    short_end: ClassVar[bool] = False
    note: str

    @torch.inference_mode()
    def prefill(self, ids: Tensor, cache: RaggedCache, p: Threshold) -> Pass:
        """Tokens [T] of one row after what its cache holds; in chunks, with the same logits as at once."""
        done = list(self.chunks(ids, cache, p))
        scores = np.concatenate([part.scores for part in done], axis=1)
        return Pass(done[-1].logits, scores, np.concatenate([part.routed for part in done], axis=1))

    def chunks(self, ids: Tensor, cache: RaggedCache, p: Threshold) -> Iterator[Pass]:
        """The same, chunk by chunk; the last one's logits are the prompt's."""
        while len(ids):
            part, ids = ids.tensor_split([self.chunk_tokens(cache.get_seq_length())])
            with torch.inference_mode():
                found = self._chunk(part, cache, p, not len(ids))
            cache.tokens.extend(part.tolist())
            yield found

    def chunk_tokens(self, past: int) -> int:
        """Most tokens that go through the layers together after so many."""
        return CHUNK

    def decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        """One token of each of B rows."""
        done = self._decode(tokens, caches, p)
        for token, cache in zip(tokens, caches, strict=True):
            cache.tokens.append(token)
        return done

    @abstractmethod
    def _chunk(self, ids: Tensor, cache: RaggedCache, p: Threshold, last: bool) -> Pass:
        """One chunk of a prompt; its logits matter only if it is the ``last``."""

    @abstractmethod
    def _decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        """The same; sees to it itself that torch notes no gradients (entering that mode takes time)."""


class Stock(Executor):
    """Every family, quantised and spread models included: transformers' layers, row by row."""

    name = "stock"

    def __init__(self, model: Any, why: str) -> None:
        self.model, self.note = model, f"stock transformers layers: {why}"

    def chunk_tokens(self, past: int) -> int:
        """Fewer the more they attend to, see :func:`stock_chunk`."""
        return stock_chunk(past, self.model.windows, self.model.config._attn_implementation)

    def _chunk(self, ids: Tensor, cache: RaggedCache, p: Threshold, last: bool) -> Pass:
        out = self.model(
            input_ids=ids[None], past_key_values=cache, use_cache=True, p=[p] if isinstance(p, tuple) else p,
            output_router_scores=True, logits_to_keep=1,
        )
        return Pass(out.logits[:, -1], torch.cat(out.router_scores).cpu().numpy(), torch.cat(out.routed).cpu().numpy())

    @torch.inference_mode()
    def _decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        rows = [
            self._chunk(torch.tensor([token], device=self.model.device), cache, threshold, True)
            for token, cache, threshold in zip(tokens, caches, p, strict=True)
        ]
        scores, routed = (np.concatenate([getattr(row, name) for row in rows], axis=1) for name in ("scores", "routed"))
        return Pass(torch.cat([row.logits for row in rows]), scores, routed)


def stock_chunk(past: int, windows: Sequence[int | None], kernel: str) -> int:
    """Tokens that the stock layers take at once after ``past``, so that what grows with tokens times keys is bounded:
    masks, and in eager attention scores of all heads."""
    reach = past if None in windows else min(past, max(window for window in windows if window))
    pairs = CHUNK * CHUNK * (1 if kernel == "eager" else 4)
    return min(CHUNK, max(1, int(math.sqrt(reach * reach / 4 + pairs) - reach / 2)))
