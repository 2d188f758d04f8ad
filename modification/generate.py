"""Token ids in, a stream of Steps out; p is read at every step.

Each row has a cache of its own; closing the iterator frees it. How the tokens go through the model is the
executor's affair. Other decoding methods (beams, guessing ahead) go through the model's own ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modification.architectures import entry_bytes
from modification.batching import Stream, run
from modification.cache import RaggedCache
from modification.config import Threshold, check_thresholds
from modification.executor import executor_of
from modification.model import MoDModel, check_cache
from modification.sampling import Sampler
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
    stream = prepare(
        model, input_ids, p=p, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed, stop=stop, alternatives=alternatives, cache=cache,
    )
    return (step for _, step in run(executor_of(model), [stream]))


def prepare(
    model: Any, input_ids: Tensor | Sequence[int], *, p: Threshold | Callable[[], Threshold], max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None,
    stop: Collection[int] | None = None, alternatives: int = 0, cache: RaggedCache | None = None,
) -> Stream:
    """What :func:`generate` would run, checked but not begun: to be put into a ``Batch`` with others.

    Raises:
        ValueError: a value out of bounds.
    """
    _check_model(model)
    return Stream(
        _prompt(model, input_ids, max_new_tokens), model.new_cache() if cache is None else _own(model, cache),
        _dial(p, len(model.mod_layers)), max_new_tokens,
        Sampler(temperature, top_p, top_k, seed, model.device, alternatives),
        frozenset(_end_tokens(model) if stop is None else stop), keep=cache is not None,
    )


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

    Each row is what :func:`generate` gives for its prompt alone (bit for bit with the CPU kernels and the stock layers;
    elsewhere a product of many rows may round otherwise), and stops by itself; rows of unlike lengths need no padding.
    A step's ``seconds`` are those of the whole batch.

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
    streams = [
        prepare(
            model, prompt, p=dial, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed, stop=stop,
        )
        for prompt, dial in zip(prompts, dials, strict=True)
    ]
    return run(executor_of(model), streams)


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
