"""Token ids in, a stream of Steps out; p is read at every step.

Each row has a cache of its own; closing the iterator frees it. How the tokens go through the model is the
executor's affair. Other decoding methods (beams, guessing ahead) go through the model's own ``generate``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modification.architectures import entry_bytes
from modification.cache import RaggedCache
from modification.config import Threshold, check_thresholds
from modification.executor import Executor, Pass, executor_of
from modification.model import MoDModel, check_cache
from modification.trace import Step


def generate(
    model: Any,
    input_ids: Tensor | Sequence[int],
    *,
    p: Threshold | Callable[[], Threshold],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Collection[int] | None = None,
    alternatives: int = 0,
    cache: RaggedCache | None = None,
) -> Iterator[Step]:
    """Stream a continuation of one prompt.

    The first step is the prompt's prefill; each further one is a token, chosen from the step before
    and then run through the model. Ends after a stop token (which is yielded) or ``max_new_tokens``.

    Args:
        model: a MoD model.
        input_ids: the prompt, [T] or [1, T].
        p: threshold, or a tuple with one for each MoD layer, or a function that gives either, read at every step.
        temperature: 0 is greedy.
        top_p, top_k: keep the likeliest tokens of this mass, or this many (0: all).
        seed: makes sampling repeatable.
        stop: token ids that end the text; by default the model's end-of-sequence tokens.
        alternatives: with each token, note this many of the likeliest ones (``Step.likely``).
        cache: one from ``model.new_cache()``, to be kept for the next call: what it holds of this prompt is not
            run again (with the decisions made then), and the first step has the remaining tokens alone. Without
            it a cache is made and freed.

    Raises:
        ValueError: a value out of bounds, at the call itself and not at the first step.
    """
    _check_model(model)
    stream = Stream(
        _prompt(model, input_ids, max_new_tokens), model.new_cache() if cache is None else _own(model, cache),
        _dial(p, len(model.mod_layers)), max_new_tokens,
        Sampler(temperature, top_p, top_k, seed, model.device, alternatives),
        frozenset(_end_tokens(model) if stop is None else stop),
    )
    return (step for _, step in run(executor_of(model), [stream], keep=cache is not None))


def generate_batch(
    model: Any,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    p: float | Sequence[Threshold] | Callable[[], Threshold],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Collection[int] | None = None,
) -> Iterator[tuple[int, Step]]:
    """Stream continuations of several prompts together: pairs of (row, step).

    Each row is what :func:`generate` gives for its prompt alone, and stops by itself; rows of unlike lengths
    need no padding. A step's ``seconds`` are those of the whole batch.

    Args:
        model: a MoD model.
        prompts: one per row, [T] each.
        p: one threshold, one per row (each a number, or a tuple with one for each MoD layer), or a function read
            at every step.
        seed: the same for every row.
        max_new_tokens, temperature, top_p, top_k, stop: as in :func:`generate`.

    Raises:
        ValueError: a value out of bounds, at the call itself.
    """
    _check_model(model)
    dials = _dials(p, len(prompts), len(model.mod_layers))
    ends = frozenset(_end_tokens(model) if stop is None else stop)
    streams = [
        Stream(
            _prompt(model, prompt, max_new_tokens), model.new_cache(), dial, max_new_tokens,
            Sampler(temperature, top_p, top_k, seed, model.device), ends,
        )
        for prompt, dial in zip(prompts, dials, strict=True)
    ]
    return run(executor_of(model), streams, keep=False)


_NUCLEUS = 256  # tokens looked at first for top-p


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

    def __call__(self, logits: Tensor) -> Choice:
        """Choose; the distribution is altered for the choice alone."""
        logprobs, ids = torch.log_softmax(logits.float(), -1), None
        if self.temperature == 0.0:
            token = int(logprobs.argmax())
        else:
            weights, ids = self._candidates(logprobs / self.temperature)
            place = torch.multinomial(weights, 1, generator=self.generator)
            token = int(place if ids is None else ids[place])
        if not self.alternatives:
            return Choice(token, float(logprobs[token]))
        count = min(self.alternatives, len(logprobs))
        best = logprobs.topk(count).indices if ids is None or len(ids) < count else ids[:count]
        return Choice(token, float(logprobs[token]), tuple(best.tolist()), tuple(logprobs[best].tolist()))

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


class Stream:
    """One row of a generation: its tokens, cache, threshold and sampler."""

    def __init__(
        self, ids: Tensor, cache: RaggedCache, read_p: Callable[[], Threshold], budget: int, choose: Sampler,
        ends: frozenset[int],
    ) -> None:
        self.ids, self.cache, self.read_p, self.choose, self.ends = ids, cache, read_p, choose, ends
        self.left = budget
        self.logits: Tensor | None = None
        self.choice = Choice(-1, float("nan"))

    def threshold(self) -> Threshold:
        """p as it is now."""
        return check_thresholds(self.read_p(), len(self.cache.mod_layers))

    def prefill(self, executor: Executor, p: Threshold) -> Step:
        """Run what the cache doesn't hold of the prompt."""
        start = time.perf_counter()
        fresh = self.ids[_reusable(self.cache, self.ids.tolist()) :]
        done = executor.prefill(fresh, self.cache, p)
        self.logits = done.logits[0]
        return self._step(fresh.cpu().numpy(), done.scores, done.routed, p, start, prefill=True)

    @property
    def ended(self) -> bool:
        """Whether a stop token came or the budget is spent."""
        return self.left == 0 or self.choice.token in self.ends

    def pick(self) -> int:
        """Choose the next token from the last logits."""
        assert self.logits is not None
        self.choice = self.choose(self.logits)
        self.left -= 1
        return self.choice.token

    def accept(self, done: Pass, row: int, p: Threshold, start: float) -> Step:
        """Take this row's share of a decode step."""
        self.logits, one = done.logits[row], slice(row, row + 1)
        return self._step(np.array([self.choice.token]), done.scores[:, one], done.routed[:, one], p, start)

    def _step(
        self, tokens: Any, scores: Any, routed: Any, p: Threshold, start: float, prefill: bool = False
    ) -> Step:
        size, choice = self.cache.nbytes(), self.choice
        mean, layer_p = (sum(p) / len(p), p) if isinstance(p, tuple) else (p, ())
        return Step(
            tokens, np.full(len(tokens), choice.logprob, np.float32), scores, routed, mean, size.stored,
            size.allocated, size.dense, time.perf_counter() - start, prefill, layer_p, choice.likely,
            choice.likely_logprobs,
        )


def run(executor: Executor, streams: Sequence[Stream], keep: bool) -> Iterator[tuple[int, Step]]:
    """Prompts row by row, then all rows that go on, one token each at a time. ``keep``: leave caches as they are."""
    whole = True  # false while caches are being written: one that was left half written is of no use
    try:
        for row, stream in enumerate(streams):
            p, whole = stream.threshold(), False
            step = stream.prefill(executor, p)
            whole = True
            yield row, step
        while going := [(row, stream) for row, stream in enumerate(streams) if not stream.ended]:
            start = time.perf_counter()
            thresholds = [stream.threshold() for _, stream in going]
            tokens = [stream.pick() for _, stream in going]
            whole = False
            done = executor.decode(tokens, [stream.cache for _, stream in going], thresholds)
            whole = True
            for at, (row, stream) in enumerate(going):
                step = stream.accept(done, at, thresholds[at], start)
                if stream.ended and not keep:
                    stream.cache.reset()
                yield row, step
    finally:
        if not (keep and whole):
            for stream in streams:
                stream.cache.reset()


def _reusable(cache: RaggedCache, ids: list[int]) -> int:
    """Prompt tokens that the cache holds already; it is cut back to them. The last token always runs anew."""
    same = 0
    for held, given in zip(cache.tokens, ids[:-1], strict=False):
        if held != given:
            break
        same += 1
    try:
        if same < len(cache.tokens):
            cache.crop(same - len(cache.tokens))
    except ValueError:  # what a sliding window dropped can't come back: start anew
        cache.reset()
        return 0
    return same


def _prompt(model: Any, input_ids: Tensor | Sequence[int], budget: int) -> Tensor:
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"input_ids of shape {tuple(ids.shape)}: give one row, or use generate_batch")
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
    return ids[0]


def _check_model(model: Any) -> None:
    if not isinstance(model, MoDModel):
        raise ValueError(f"{type(model).__name__} is not a MoD model: convert(model) first, or load() it")


def _own(model: Any, cache: object) -> RaggedCache:
    check_cache(cache)
    assert isinstance(cache, RaggedCache)
    size = entry_bytes(model.config, model.dtype)
    if cache.owner is None or cache.owner() is not model or cache.entry_bytes != size:
        raise ValueError("the cache belongs to another model, or to this one in another dtype: give model.new_cache()")
    if len(cache.tokens) != cache.get_seq_length():
        raise ValueError("the cache was filled by another call: give one that model.new_cache() made")
    return cache


def _dials(
    p: float | Sequence[Threshold] | Callable[[], Threshold], rows: int, layers: int
) -> list[Callable[[], Threshold]]:
    if not rows:
        raise ValueError("prompts is empty: give at least one")
    if isinstance(p, Sequence):
        if len(p) != rows:
            raise ValueError(f"p has {len(p)} values for a batch of {rows}: give one number, or one per row")
        return [_dial(value, layers) for value in p]
    return [_dial(p, layers)] * rows


def _dial(p: Threshold | Callable[[], Threshold], layers: int) -> Callable[[], Threshold]:
    if callable(p):
        return p
    value = check_thresholds(p, layers)
    return lambda: value


def _end_tokens(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}
