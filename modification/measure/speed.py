"""Speed and memory on the clock and in the allocator: dense and routed alternate inside one run.

A round prefills prompts and decodes after them, as a user would: through the engine's own stream, with its Steps
made and read, against transformers' own ``generate``. The engine's next tokens are given, after one was chosen all
the same, so that a model with random weights doesn't repeat one token and one route. The dense parent is offered
twice, as stock ``generate`` (compiled too, where that is asked for) and as our engine at p = 0.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

from modification.architectures import entry_bytes
from modification.batching import Stream, run
from modification.cache import RaggedCache
from modification.executor import Executor
from modification.measure.cost import ModelShape
from modification.measure.memory import Peak
from modification.sampling import Choice, Sampler
from modification.trace import Step

CALIBRATION_TOKENS = 1024
NEAR = 0.01  # a load this near to the one asked for is hit
FAR = 0.02  # a load this far off was missed


@dataclass(frozen=True, slots=True)
class Timing:
    """One round of one side.

    Attributes:
        prefill: seconds until the prompts of all rows were in the cache; on the stock side with the choice of the
            first new token, which can't be told apart.
        first_token: seconds until every row's first new token was chosen.
        decode: seconds per decode step (a token of each row).
        peak: bytes of memory above idle at the highest; None where it can't be measured.
        stored, allocated: bytes of keys and values at the end; 0 for the stock side.
        load: share of (MoD layer, token) pairs that ran in the prompt, and in decoding.
        flops: counted for the prompts, as the executor runs them.
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
    """What every side does: a prompt [T] a row, the longest first, and the tokens [B, S] that follow them."""

    prompts: tuple[Tensor, ...]
    follow: Tensor

    @classmethod
    def random(
        cls, vocabulary: int, batch: int, context: int, steps: int, device: torch.device, ragged: bool = False
    ) -> Work:
        """Scattered ids, the same each time; ``ragged``, rows have from the whole ``context`` down to half of it."""
        generator = torch.Generator().manual_seed(context * 31 + batch)
        ids = torch.randint(vocabulary, (batch, context + steps), generator=generator).to(device)
        shorter = context / (2 * max(1, batch - 1)) if ragged else 0.0
        prompts = (row[: context - int(at * shorter)] for at, row in enumerate(ids[:, :context]))
        return cls(tuple(prompts), ids[:, context:])

    @property
    def tokens(self) -> int:
        """Prompt tokens of all rows."""
        return sum(len(ids) for ids in self.prompts)


class Given(Sampler):
    """Chooses greedily, then says what it was told to say."""

    def __init__(self, tokens: list[int], device: torch.device) -> None:
        super().__init__(0.0, 1.0, 0, 0, device)
        self.tokens, self.first = iter(tokens), 0.0

    def __call__(self, logits: Tensor) -> Choice:
        return self._given(super().__call__(logits))

    def settle(self, token: int, logprob: float) -> Choice:
        return self._given(super().settle(token, logprob))

    def _given(self, choice: Choice) -> Choice:
        self.first = self.first or time.perf_counter()
        return Choice(next(self.tokens), choice.logprob)


def time_engine(executor: Executor, model: Any, work: Work, p: float) -> Timing:
    """One round of our engine at threshold ``p``, streamed with its trace."""
    steps = work.follow.shape[1]
    rows: list[list[Step]] = [[] for _ in work.prompts]
    with Peak(model.device) as peak:
        start = _now(model.device)
        given = [Given(tokens.tolist(), model.device) for tokens in work.follow]
        streams = [
            Stream(ids, model.new_cache(), lambda: p, steps, choose, frozenset(), keep=True)
            for ids, choose in zip(work.prompts, given, strict=True)
        ]
        stream = run(executor, streams)
        for row, step in itertools.islice(stream, len(streams)):
            rows[row].append(step)
        first = _now(model.device)
        for row, step in stream:
            rows[row].append(step)
        end = _now(model.device)
    ran = [row[0].routed for row in rows]  # [M, T] a row
    routed = np.stack([np.concatenate([row[at].routed for row in rows], axis=1) for at in range(1, steps + 1)])
    shape = ModelShape.of(model)
    return Timing(
        first - start, max(choose.first for choose in given) - start, (end - first) / steps, peak.bytes,
        sum(row[-1].kv_stored for row in rows),
        sum(row[-1].kv_allocated for row in rows), (float(np.concatenate(ran, axis=1).mean()), float(routed.mean())),
        sum(shape.prefill_flops(row.shape[1], row.sum(1).tolist(), _end(executor, shape, row)) for row in ran),
        _traffic(shape, model, ran, routed),
    )


def time_bare(executor: Executor, model: Any, work: Work, p: float, mod_layers: Sequence[int]) -> Timing:
    """One round of the executor alone: no Steps, no log-probabilities, the likeliest token read and dropped."""
    size = entry_bytes(model.config, model.dtype)
    caches = [RaggedCache(model.windows, mod_layers, size) for _ in work.prompts]
    with Peak(model.device) as peak:
        start = _now(model.device)
        for ids, cache in zip(work.prompts, caches, strict=True):
            executor.prefill(ids, cache, p)
        first = _now(model.device)
        for tokens in work.follow.T.tolist():
            done = executor.decode(tokens, caches, [p] * len(caches))
            _ = done.likeliest or done.logits.argmax(-1).tolist()
        end = _now(model.device)
    return Timing(first - start, first - start, (end - first) / work.follow.shape[1], peak.bytes)


def time_stock(parent: Any, work: Work, compiled: bool = False) -> Timing:
    """One round of the dense parent under ``transformers.generate``, greedy, with its usual cache, ending by length.

    Shorter prompts are filled up on the left, as it asks for. ``compiled``, its cache is a static one, and decoding
    goes through ``torch.compile`` (in the first call, which takes a while).
    """
    options: dict[str, Any] = {}
    if compiled:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # on its own, generate compiles on accelerators alone
        options = {"cache_implementation": "static", "compile_config": compile_config}
    real = [torch.ones_like(ids) for ids in work.prompts]
    prompts, mask = (pad_sequence(rows, batch_first=True, padding_side="left") for rows in (list(work.prompts), real))
    clock, steps = _Clock(parent.device), work.follow.shape[1]
    ends, parent.generation_config.eos_token_id = parent.generation_config.eos_token_id, None
    try:
        with Peak(parent.device) as peak:
            start = _now(parent.device)
            parent.generate(
                prompts, attention_mask=mask, max_new_tokens=steps + 1, do_sample=False, **options,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
    finally:
        parent.generation_config.eos_token_id = ends
    first = clock.times[0] - start
    return Timing(first, first, (clock.times[-1] - clock.times[0]) / steps, peak.bytes)


def threshold_for(load: float, executor: Executor, model: Any, prompts: Sequence[Tensor]) -> float:
    """The p at which prompts [T] reach a load of their MoD layers: sought on the first one's beginning, then on all."""
    if load >= 1:
        return 0.0

    def miss(p: float, rows: Sequence[Tensor]) -> float:
        ran = 0.0
        for ids in rows:
            cache = model.new_cache()
            ran += float(executor.prefill(ids, cache, p).routed.mean()) * len(ids)
            cache.reset()
        return ran / sum(len(ids) for ids in rows) - load

    beginning = [prompts[0][:CALIBRATION_TOKENS]]
    p = _bisect(functools.partial(miss, rows=beginning), 0.0, 1.0, 12)
    of_all = functools.cache(functools.partial(miss, rows=prompts))  # a prefill of everything each
    if sum(len(ids) for ids in prompts) > len(beginning[0]) and abs(of_all(p)) > NEAR:
        p = _bisect(of_all, max(0.0, p - 0.1), min(1.0, p + 0.1), 4)
        if abs(of_all(p)) > FAR:  # the first one's beginning is unlike the rest
            p = _bisect(of_all, 0.0, 1.0, 10)
    return p


def _bisect(miss: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """The p that was tried with the least miss; load falls with p, near enough."""
    tried = dict[float, float]()
    for _ in range(steps):
        p = (low + high) / 2
        tried[p] = miss(p)
        if abs(tried[p]) <= NEAR:
            break
        low, high = (p, high) if tried[p] > 0 else (low, p)
    return min(tried, key=lambda value: abs(tried[value]))


def alternate(
    sides: dict[str, Callable[[], Timing]], rounds: int, tell: Callable[[int], None] = lambda done: None
) -> dict[str, list[Timing]]:
    """Rounds in which every side runs once, a different one first each time; a round to warm up is thrown away.

    ``tell`` is called before every timing with the number of rounds that count so far.
    """
    found: dict[str, list[Timing]] = {name: [] for name in sides}
    names = list(sides)
    for at in range(rounds + 1):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            tell(max(0, at - 1))
            timing = sides[name]()
            if at:
                found[name].append(timing)
    return found


def median(timings: Sequence[Timing], field: str) -> tuple[float, float]:
    """Median of a field over rounds, and half the range between its quartiles."""
    values = [getattr(timing, field) for timing in timings]
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(high - low) / 2


def _traffic(
    shape: ModelShape, model: Any, ran: Sequence[npt.NDArray[np.bool_]], routed: npt.NDArray[np.bool_]
) -> float:
    """Mean bytes per decode step; prompts' decisions ran [M, T] a row, steps' decisions routed [S, M, B]."""
    layer_bytes = [_weight_bytes(layer) for layer in model.family.decoder_layers(model)]
    entries = np.stack([_met(shape, row, routed[:, :, at]) for at, row in enumerate(ran)], axis=-1)
    steps = zip(entries, routed, strict=True)
    total = sum(shape.decode_bytes(model.dtype.itemsize, met, step, layer_bytes) for met, step in steps)
    return total / len(routed)


def _end(executor: Executor, shape: ModelShape, ran: npt.NDArray[np.bool_]) -> float | None:
    """What :meth:`ModelShape.prefill_flops` asks of a prompt's decisions [M, T]."""
    if not executor.short_end:
        return None
    return float(ran[-1, -1]) if shape.depth - 1 in shape.mod_layers else 1.0


def _weight_bytes(layer: Any) -> tuple[float, float]:
    """Of a layer's weights but its experts, and of all its experts, which come stacked, [E, ., .]."""
    sizes = {False: 0.0, True: 0.0}
    for name, weight in layer.named_parameters():
        if not name.startswith("router."):
            sizes[weight.dim() == 3] += weight.nbytes
    return sizes[False], sizes[True]


def _met(shape: ModelShape, ran: npt.NDArray[np.bool_], routed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Entries that a row's tokens meet at each step if they run, their own included: decisions of the prompt [M, T] and
    of the steps [S, M] -> [S, depth]."""
    prompt, columns = ran.shape[1], ran.shape[1] + len(routed)
    stored = np.ones((shape.depth, columns), np.int64)
    stored[list(shape.mod_layers)] = np.concatenate([ran, routed.T], axis=1)
    ever = np.concatenate([np.zeros((shape.depth, 1), np.int64), stored.cumsum(1)], axis=1)  # before each column
    starts = [[max(0, column + 1 - (shape.window(layer) or columns)) for column in range(prompt, columns)]
              for layer in range(shape.depth)]
    met: npt.NDArray[np.int64] = (ever[:, prompt + 1 :] - np.take_along_axis(ever, np.array(starts), 1)).T
    return met


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
