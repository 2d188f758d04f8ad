"""Choosing the next token from logits: greedy, or by temperature with top-k and top-p."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_NUCLEUS = 256  # tokens looked at first for top-p
_BROKEN = "the model's output is not a number (NaN): its weights are damaged, or its numbers outgrew their type"


class Choice(NamedTuple):
    """A chosen token, its log-probability under the unaltered distribution, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    likely: tuple[int, ...] = ()
    likely_logprobs: tuple[float, ...] = ()


class Sampler:
    """Chooses the next token from logits [V]: greedy, or by temperature with top-k and top-p."""

    def __init__(
        self, temperature: float, top_p: float, top_k: int, seed: int | None, device: torch.device,
        alternatives: int = 0,
    ) -> None:
        if not 0.0 <= temperature <= 10.0:
            raise ValueError(f"temperature={temperature!r}: must be a number from 0 (greedy) to 10")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p!r}: must be above 0 and at most 1")
        if top_k < 0:
            raise ValueError(f"top_k={top_k!r}: must be 0 (all tokens) or more")
        if alternatives < 0:
            raise ValueError(f"alternatives={alternatives!r}: must be 0 (none) or more")
        self.alternatives = alternatives
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @property
    def greedy(self) -> bool:
        """Whether all it wants to know is the likeliest token."""
        return self.temperature == 0.0 and not self.alternatives

    def settle(self, token: int, logprob: float) -> Choice:
        """What a greedy one chooses, the likeliest token being known."""
        if math.isnan(logprob):
            raise FloatingPointError(_BROKEN)
        return Choice(token, logprob)

    def __call__(self, logits: Tensor) -> Choice:
        """Choose from logits [V]; the distribution is altered for the choice alone."""
        logprobs, ids = torch.log_softmax(logits.float(), -1), None
        if self.temperature == 0.0:
            token = _likeliest(logprobs)
        else:
            weights, ids = self._candidates((logprobs - logprobs.max()) / self.temperature)
            if not math.isfinite(float(weights.sum())):
                raise FloatingPointError(_BROKEN)
            place = torch.multinomial(weights, 1, generator=self.generator)
            token = int(place if ids is None else ids[place])
        if math.isnan(logprob := logprobs[token].item()):
            raise FloatingPointError(_BROKEN)
        if not self.alternatives:
            return Choice(token, logprob)
        count = min(self.alternatives, len(logprobs))
        best = logprobs.topk(count).indices if ids is None or len(ids) < count else ids[:count]
        return Choice(token, logprob, tuple(best.tolist()), tuple(logprobs[best].tolist()))

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of the tokens that may be chosen, and their ids; None where these are all, in order."""
        weights, vocabulary = torch.softmax(scores, -1), len(scores)
        limited = 0 < self.top_k < vocabulary
        if not limited and self.top_p == 1.0:
            return weights, None
        count = self.top_k if limited else min(_NUCLEUS, vocabulary)
        while True:  # the likeliest few usually hold top_p of the mass: sorting all would cost as much as a layer
            best, ids = weights.topk(count)
            mass = best / best.sum() if limited else best
            # Keep a token while the mass before it is still short of top_p.
            kept = mass.cumsum(-1) - mass < self.top_p
            if limited or count == vocabulary or not bool(kept[-1]):
                return best.masked_fill(~kept, 0.0), ids
            count = min(vocabulary, 16 * count)


def _likeliest(scores: Tensor) -> int:
    """The place of the largest of [V]. On a CPU, numpy finds it in a fraction of torch's time."""
    return int(scores.numpy().argmax() if scores.device.type == "cpu" else scores.argmax())
