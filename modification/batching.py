"""Streams of one model that are decoded together: each with its own prompt, cache, threshold, sampler and stop.

``Batch`` lets streams join and leave between tokens (continuous batching). What a stream gets does not depend on the
others: prompts go through alone, in the same chunks as ever, and decoding gives a row the same bits in any batch where
the compiled kernels or the stock layers do it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modification.cache import RaggedCache
from modification.config import Threshold, check_thresholds
from modification.executor import Executor, Pass
from modification.sampling import Choice, Sampler
from modification.trace import Step


class Stream:
    """One row of a generation.

    Args:
        ids: the prompt, [T].
        cache: what is held of earlier tokens, and will be of these.
        read_p: the threshold, read at every step.
        budget: new tokens at most.
        choose: picks tokens.
        ends: token ids after which it stops.
        keep: leave the cache as it is at the end, for another call.
    """

    def __init__(
        self, ids: Tensor, cache: RaggedCache, read_p: Callable[[], Threshold], budget: int, choose: Sampler,
        ends: frozenset[int], keep: bool = False,
    ) -> None:
        self.ids, self.cache, self.read_p, self.choose, self.ends = ids, cache, read_p, choose, ends
        self.left, self.keep = budget, keep
        self.whole = True  # false while the cache is being written: one that was left half written is of no use
        self.last: tuple[Pass, int] | None = None  # and this row's place in it
        self.choice = Choice(-1, float("nan"))

    def threshold(self) -> Threshold:
        """p as it is now."""
        return check_thresholds(self.read_p(), len(self.cache.mod_layers))

    def prefill(self, executor: Executor) -> Iterator[Step | None]:
        """Run what the cache doesn't hold of the prompt: None after each chunk but the last, then the step."""
        start, p = time.perf_counter(), self.threshold()
        self.whole = False
        fresh = self.ids[_reusable(self.cache, self.ids.tolist()) :]
        done = list[Pass]()
        for part in executor.chunks(fresh, self.cache, p):
            done.append(part)
            if sum(one.scores.shape[1] for one in done) < len(fresh):
                yield None
        scores, routed = (np.concatenate([getattr(part, name) for part in done], 1) for name in ("scores", "routed"))
        self.last, self.whole = (done[-1], 0), True
        yield self._step(fresh.cpu().numpy(), scores, routed, p, start, prefill=True)

    @property
    def ended(self) -> bool:
        """Whether a stop token came or the budget is spent."""
        return self.left == 0 or self.choice.token in self.ends

    def pick(self) -> int:
        """Choose the next token from the last logits."""
        assert self.last is not None
        done, row = self.last
        known = self.choose.greedy and done.likeliest  # logits are not even looked at then
        self.choice = self.choose.settle(*done.likeliest[row]) if known else self.choose(done.logits[row])
        self.left -= 1
        return self.choice.token

    def accept(self, done: Pass, row: int, p: Threshold, start: float) -> Step:
        """Take this row's share of a decode step."""
        self.last, one, self.whole = (done, row), slice(row, row + 1), True
        return self._step(np.array([self.choice.token]), done.scores[:, one], done.routed[:, one], p, start)

    def _step(
        self, tokens: Any, scores: Any, routed: Any, p: Threshold, start: float, prefill: bool = False
    ) -> Step:
        size, choice = self.cache.nbytes(), self.choice
        mean, layer_p = (sum(p) / len(p), p) if isinstance(p, tuple) else (p, ())
        # np.full is Python's, and takes its time where caches are cold.
        return Step(
            tokens, np.array((choice.logprob,) * len(tokens), np.float32), scores, routed, mean, size.stored,
            size.allocated, size.dense, time.perf_counter() - start, prefill, layer_p, choice.likely,
            choice.likely_logprobs,
        )


def run(executor: Executor, streams: Sequence[Stream]) -> Iterator[tuple[int, Step]]:
    """Prompts row by row, then all rows that go on, one token each at a time: pairs of row and step."""
    try:
        for row, stream in enumerate(streams):
            *_, step = stream.prefill(executor)
            assert step is not None
            yield row, step
        while going := [(row, stream) for row, stream in enumerate(streams) if not stream.ended]:
            start = time.perf_counter()
            for _, stream in going:
                stream.pick()
            steps = _decode(executor, [stream for _, stream in going], start)
            for (row, stream), step in zip(going, steps, strict=True):
                if stream.ended and not stream.keep:
                    stream.cache.reset()
                yield row, step
    finally:
        for stream in streams:
            if not (stream.keep and stream.whole):
                stream.cache.reset()


class Batch:
    """Streams that join and leave between tokens.

    One thread may use it at a time. A stream that fails (out of memory, say) leaves with its error; the others go on
    as if it had never been there.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._waiting: deque[tuple[Stream, Iterator[Step | None]]] = deque()
        self._going: list[Stream] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._going)

    def join(self, stream: Stream) -> None:
        """Its prompt is run as soon as those before it are through."""
        self._waiting.append((stream, stream.prefill(self.executor)))

    def leave(self, stream: Stream) -> None:
        """Take a stream out and free its cache, unless it is kept."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] is not stream)
        self._going = [one for one in self._going if one is not stream]
        if not (stream.keep and stream.whole):
            stream.cache.reset()

    def step(self) -> list[tuple[Stream, Step | Exception]]:
        """One token of every stream that goes on, and one chunk of the first waiting prompt: what came of it.

        A stream has at most one event a step.
        """
        return [*self._advance(), *self._prefill()]

    def _prefill(self) -> Iterator[tuple[Stream, Step | Exception]]:
        if not self._waiting:
            return
        stream, chunks = self._waiting[0]
        try:
            found = next(chunks)
        except Exception as error:  # whatever it was, it is this stream's alone
            yield self._failed(stream, error)
            return
        if found is not None:
            self._waiting.popleft()
            if not stream.ended:
                self._going.append(stream)
            elif not stream.keep:
                stream.cache.reset()
            yield stream, found

    def _advance(self) -> Iterator[tuple[Stream, Step | Exception]]:
        start, picked = time.perf_counter(), list[Stream]()
        for stream in self._going:
            try:
                stream.pick()
                picked.append(stream)
            except Exception as error:
                yield self._failed(stream, error)
        if not picked:
            return
        try:
            steps: list[Step | Exception] = [*_decode(self.executor, picked, start)]
        except Exception as error:
            steps = [self._alone(stream, start, error) for stream in picked]
        for stream, step in zip(picked, steps, strict=True):
            if isinstance(step, Exception):
                yield self._failed(stream, step)
                continue
            if stream.ended:
                self._going.remove(stream)
                if not stream.keep:
                    stream.cache.reset()
            yield stream, step

    def _alone(self, stream: Stream, start: float, error: Exception) -> Step | Exception:
        """A stream's share of a step that failed, tried without the others; the error if it fails again."""
        try:
            stream.cache.settle()
            return _decode(self.executor, [stream], start)[0]
        except Exception as again:
            return again

    def _failed(self, stream: Stream, error: Exception) -> tuple[Stream, Exception]:
        self.leave(stream)
        stream.cache.reset()
        return stream, error


def _decode(executor: Executor, streams: Sequence[Stream], start: float) -> list[Step]:
    """The tokens that the streams have picked, through the model together."""
    thresholds = [stream.threshold() for stream in streams]
    for stream in streams:
        stream.whole = False
    done = executor.decode([stream.choice.token for stream in streams], [one.cache for one in streams], thresholds)
    return [stream.accept(done, at, thresholds[at], start) for at, stream in enumerate(streams)]


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
