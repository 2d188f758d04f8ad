"""Continuous batching: whoever joins, leaves or fails, each stream gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from builders import mod_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from modification import generate
from modification.batching import Batch
from modification.executor import Stock, executor_of
from modification.generate import prepare

BUDGET = 12


def alone(model, prompt, **asked):
    """The steps of a stream by itself."""
    return list(generate(model, prompt, max_new_tokens=BUDGET, **asked))


def run(batch, arrivals, leaving=None):
    """Step the batch, with streams joining at the rounds of ``arrivals`` and leaving at those of ``leaving``:
    what each got."""
    got = {id(stream): [] for _, stream in arrivals}
    for at in range(200):
        for when, stream in arrivals:
            if when == at:
                batch.join(stream)
            if (leaving or {}).get(id(stream)) == at:
                batch.leave(stream)
        for stream, found in batch.step():
            got[id(stream)].append(found)
        if not len(batch) and at >= max(when for when, _ in arrivals):
            return [got[id(stream)] for _, stream in arrivals]
    raise AssertionError("the batch came to no end")


def same(found, expected):
    """The same tokens, decisions, and cache sizes, and the very same scores."""
    assert [step.tokens.tolist() for step in found] == [step.tokens.tolist() for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(one.scores), torch.from_numpy(other.scores))
        assert one.prefill or (one.kv_stored, one.logprob) == (other.kv_stored, other.logprob)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 15), st.integers(1, 40), st.sampled_from([0.0, 0.5, 0.88, 1.0]),
        st.sampled_from([0.0, 0.9]), st.integers(0, 99),
    ),
    min_size=1, max_size=6,
)


@given(requests=REQUESTS, left=st.integers(0, 5), variant=st.sampled_from(["llama", "qwen2-window", "gpt2"]))
@settings(max_examples=40, deadline=None)
def test_each_gets_what_it_gets_alone(requests, left, variant):
    """Any arrivals, prompts, thresholds and samplings; one may leave early."""
    model = mod_model(variant)
    asked = [
        (when, tokens(1, length, seed=seed)[0], {"p": p, "temperature": temperature, "seed": seed})
        for when, length, p, temperature, seed in requests
    ]
    expected = [alone(model, prompt, **how) for _, prompt, how in asked]
    streams = [(when, prepare(model, prompt, max_new_tokens=BUDGET, **how)) for when, prompt, how in asked]
    leaver = streams[left % len(streams)]
    found = run(Batch(executor_of(model)), streams, {id(leaver[1]): leaver[0] + 5})
    for (_, stream), one, other in zip(streams, found, expected, strict=True):
        same(one, other[: len(one)] if stream is leaver[1] else other)
        assert stream.cache.nbytes().allocated == 0


class Failing(Stock):
    """Runs out of memory in the middle of a decode step, once the victim's layers are half written."""

    def __init__(self, model, victim, after):
        super().__init__(model, "test")
        self.victim, self.after = victim, after

    def _decode(self, given, caches, p):
        done = super()._decode(given, caches, p)
        if self.victim.cache in caches and self.after <= 0:
            for cache in caches:  # as if the last layers had not been reached
                for layer in cache.layers[-2:]:
                    layer.crop(-1)
            raise MemoryError("no more")
        self.after -= self.victim.cache in caches
        return done


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_a_failure_is_its_streams_alone(variant, after):
    """The others go on, token for token; the one that failed leaves with its error and holds no memory."""
    model = mod_model(variant)
    prompts = [tokens(1, 10 + at, seed=at)[0] for at in range(3)]
    expected = [alone(model, prompt, p=0.5) for prompt in prompts]
    streams = [prepare(model, prompt, p=0.5, max_new_tokens=BUDGET) for prompt in prompts]
    batch = Batch(Failing(model, streams[1], after))
    found = run(batch, [(0, stream) for stream in streams])
    assert isinstance(found[1][-1], MemoryError)
    assert streams[1].cache.nbytes().allocated == 0
    assert [step.tokens.tolist() for step in found[1][:-1]] == [s.tokens.tolist() for s in expected[1]][: 1 + after]
    for at in (0, 2):
        assert [s.tokens.tolist() for s in found[at]] == [s.tokens.tolist() for s in expected[at]]


def test_a_failing_prompt_and_a_failing_dial_are_their_own():
    """What goes wrong in a prefill, or in reading p, reaches nobody else."""
    model = mod_model("llama")
    good = prepare(model, tokens(1, 8)[0], p=0.3, max_new_tokens=BUDGET)
    calls = iter(range(100))
    late = prepare(model, tokens(1, 8)[0], p=lambda: 0.3 if next(calls) < 4 else 7.0, max_new_tokens=BUDGET)
    at_once = prepare(model, tokens(1, 8)[0], p=lambda: "high", max_new_tokens=BUDGET)
    found = run(Batch(executor_of(model)), [(0, at_once), (0, late), (0, good)])
    assert isinstance(found[0][0], ValueError)
    assert isinstance(found[1][-1], ValueError)
    assert len(found[2]) == BUDGET + 1
    assert not any(isinstance(step, Exception) for step in found[2])


def test_kept_caches_stay():
    """A stream over a cache of the caller's leaves it filled, for the next call."""
    model = mod_model("llama")
    cache = model.new_cache()
    stream = prepare(model, tokens(1, 8)[0], p=0.3, max_new_tokens=3, cache=cache)
    run(Batch(executor_of(model)), [(0, stream)])
    assert cache.get_seq_length() == 11


def test_output_that_is_no_number_is_an_error():
    """Broken weights give a sentence, greedy or sampled, and never a token."""
    model = mod_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for temperature in (0.0, 0.8):
        with pytest.raises(FloatingPointError, match="not a number"):
            alone(model, tokens(1, 8)[0], p=0.0, temperature=temperature, seed=1)
