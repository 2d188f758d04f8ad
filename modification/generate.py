"""Token ids in, a stream of Steps out; p is read at every step.

One row, one cache, owned by the iterator: closing it frees the cache. Batches and the other decoding
methods go through the model's own ``generate``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modification.config import check_threshold
from modification.model import MoDModel
from modification.trace import Step


def generate(
    model: Any,
    input_ids: Tensor | Sequence[int],
    *,
    p: float | Callable[[], float],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Collection[int] | None = None,
) -> Iterator[Step]:
    """Stream a continuation of one prompt.

    The first step is the prompt's prefill; each further one is a token, chosen from the step before
    and then run through the model. Ends after a stop token (which is yielded) or ``max_new_tokens``.

    Args:
        model: a MoD model.
        input_ids: the prompt, [T] or [1, T].
        p: threshold, or a function read at every step.
        temperature: 0 is greedy.
        top_p, top_k: keep the likeliest tokens of this mass, or this many (0: all).
        seed: makes sampling repeatable.
        stop: token ids that end the text; by default the model's end-of-sequence tokens.

    Raises:
        ValueError: a value out of bounds, at the call itself and not at the first step.
    """
    if not isinstance(model, MoDModel):
        raise ValueError(f"{type(model).__name__} is not a MoD model: convert(model) first, or load() it")
    ids = _prompt(model, input_ids, max_new_tokens)
    read_p = p if callable(p) else _constant(p)
    choose = Sampler(temperature, top_p, top_k, seed, model.device)
    ends = frozenset(_end_tokens(model) if stop is None else stop)
    return _stream(model, ids, read_p, max_new_tokens, choose, ends)


class Sampler:
    """Chooses the next token from logits [V]: greedy, or by temperature with top-k and top-p."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int | None, device: torch.device) -> None:
        if not 0.0 <= temperature <= 10.0:
            raise ValueError(f"temperature={temperature!r}: must be a number from 0 (greedy) to 10")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p!r}: must be above 0 and at most 1")
        if top_k < 0:
            raise ValueError(f"top_k={top_k!r}: must be 0 (all tokens) or more")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """A token id and its log-probability under the unaltered distribution."""
        logprobs = torch.log_softmax(logits.float(), -1)
        if self.temperature == 0.0:
            token = int(logprobs.argmax())
        else:
            token = int(torch.multinomial(self._weights(logprobs / self.temperature), 1, generator=self.generator))
        return token, float(logprobs[token])

    def _weights(self, scores: Tensor) -> Tensor:
        if 0 < self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        weights = torch.softmax(scores, -1)
        if self.top_p < 1.0:
            ordered, order = weights.sort(descending=True)
            # Keep a token while the mass before it is still short of top_p.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            weights = torch.zeros_like(weights).scatter(0, order, ordered)
        return weights


def _stream(
    model: Any, ids: Tensor, read_p: Callable[[], float], budget: int, choose: Sampler, ends: frozenset[int]
) -> Iterator[Step]:
    cache = model.new_cache()
    try:
        start = time.perf_counter()
        logprob, tokens = float("nan"), ids
        for index in range(budget + 1):
            threshold = check_threshold(read_p())
            with torch.inference_mode():
                out = model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, p=threshold, output_router_scores=True,
                    logits_to_keep=1,
                )
                scores = torch.cat(out.router_scores).cpu().numpy()
                routed = torch.cat(out.routed).cpu().numpy()
            size = cache.nbytes()
            count = tokens.shape[1]
            now = time.perf_counter()
            yield Step(
                tokens[0].cpu().numpy(), np.full(count, logprob, np.float32), scores, routed, threshold,
                size.stored, size.allocated, size.dense, now - start, prefill=index == 0,
            )
            if index == budget or (index and int(tokens[0, -1]) in ends):
                return
            start = time.perf_counter()
            token, logprob = choose(out.logits[0, -1])
            tokens = torch.tensor([[token]], device=ids.device)
    finally:
        cache.reset()


def _prompt(model: Any, input_ids: Tensor | Sequence[int], budget: int) -> Tensor:
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"input_ids of shape {tuple(ids.shape)}: give one row, or use model.generate for batches")
    tokens, vocabulary = ids.shape[1], model.config.vocab_size
    if not tokens:
        raise ValueError("the prompt is empty: give at least one token")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"input_ids holds a token outside 0..{vocabulary - 1}")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"max_new_tokens={budget!r}: must be a whole number, 0 or more")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens + budget > context:
        raise ValueError(
            f"the prompt has {tokens} tokens and max_new_tokens is {budget}: together more than the model's context "
            f"of {context}; shorten the prompt or ask for at most {max(0, context - tokens)} new tokens"
        )
    return ids


def _constant(p: float) -> Callable[[], float]:
    value = check_threshold(p)
    return lambda: value


def _end_tokens(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}
