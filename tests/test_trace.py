"""RoutingTrace: columns, loads and JSON. numpy only."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modification.trace import RoutingTrace, Step


def step(count=1, layers=2, p=0.5, seed=0, prefill=False):
    """A step of random gates whose decisions follow the rule."""
    noise = np.random.default_rng(seed)
    scores = noise.random((layers, count), dtype=np.float32).round(4)
    return Step(
        tokens=noise.integers(0, 97, count), logprobs=np.full(count, np.nan if prefill else -1.25, np.float32),
        scores=scores, routed=scores >= p, p=p, kv_stored=10 + seed, kv_allocated=20 + seed, kv_dense=30 + seed,
        seconds=0.25, prefill=prefill,
    )


def trace(lengths=(4, 1, 1), layers=2):
    """A prompt and some tokens."""
    made = RoutingTrace(layers + 2, tuple(range(1, layers + 1)), info={"model": "tiny", "p": 0.5})
    for at, count in enumerate(lengths):
        texts = [f"t{at}.{place}" for place in range(count)]
        made.append(step(count, layers, 0.1 * at, at, prefill=at == 0), texts)
    return made


def test_columns_are_the_steps_side_by_side():
    """Tokens, gates, decisions and thresholds line up, one column per token."""
    made = trace()
    assert made.tokens.shape == (6,)
    assert made.scores.shape == made.routed.shape == (2, 6)
    assert made.p.tolist() == pytest.approx([0.0] * 4 + [0.1, 0.2])
    assert np.array_equal(made.routed, made.scores >= made.p.astype(np.float32))


def test_load_is_the_share_of_pairs_that_ran():
    """Counted over all layers and tokens, not averaged over steps."""
    made = trace((5, 1))
    assert made.load == pytest.approx(made.routed.mean())
    assert made.steps[1].load == pytest.approx(made.routed[:, 5].mean())


def test_a_step_s_last_token_is_its_token():
    """So is its log-probability."""
    one = step(3)
    assert one.token == one.tokens[-1]
    assert one.logprob == -1.25


def test_json_keeps_alternatives_and_thresholds_of_their_own():
    """What a step may have beside its decisions."""
    made = trace()
    rich = dataclasses.replace(made.steps[1], likely=(3, 7), likely_logprobs=(-0.5, -1.25), layer_p=(0.25, 0.75))
    made.steps[1] = rich
    back = RoutingTrace.from_json(made.to_json())
    assert back.steps[1].likely == (3, 7)
    assert back.steps[1].likely_logprobs == (-0.5, -1.25)
    assert back.steps[1].layer_p == (0.25, 0.75)
    assert back.steps[2].likely == () == back.steps[2].layer_p


def test_an_empty_trace_has_no_columns_and_full_load():
    """Nothing was skipped."""
    made = RoutingTrace(4, (1, 2))
    assert made.tokens.shape == (0,)
    assert made.scores.shape == made.routed.shape == (2, 0)
    assert made.load == 1.0
    assert RoutingTrace.from_json(made.to_json()).to_json() == made.to_json()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4))
def test_a_trace_survives_json(lengths, layers):
    """Every field comes back, numbers with their types."""
    made = trace(lengths, layers)
    again = RoutingTrace.from_json(made.to_json())
    assert (again.depth, again.mod_layers, again.texts, again.info) == (
        made.depth, made.mod_layers, made.texts, made.info,
    )
    assert np.array_equal(again.tokens, made.tokens)
    assert np.allclose(again.scores, made.scores, atol=1e-4)
    assert np.array_equal(again.routed, made.routed)
    assert np.array_equal(again.p, made.p)
    for ours, theirs in zip(again.steps, made.steps, strict=True):
        assert np.allclose(ours.logprobs, theirs.logprobs, equal_nan=True, atol=1e-4)
        assert ours.tokens.dtype == np.int64
        assert ours.routed.dtype == np.bool_
        assert (ours.kv_stored, ours.kv_allocated, ours.kv_dense, ours.seconds, ours.prefill) == (
            theirs.kv_stored, theirs.kv_allocated, theirs.kv_dense, theirs.seconds, theirs.prefill,
        )
    assert again.to_json() == made.to_json()


def test_json_is_strict():
    """No NaN in the text: any JSON reader takes it."""
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(trace().to_json(), parse_constant=refuse)


def damaged(change):
    """The JSON of a trace after ``change`` to its values."""
    values = json.loads(trace().to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "3", '"trace"', "{}",
        damaged(lambda v: v.update(format=99)),
        damaged(lambda v: v.update(depth="deep")),
        damaged(lambda v: v.update(steps=None)),
        damaged(lambda v: v.update(steps=[3])),
        damaged(lambda v: v["texts"].pop()),
        damaged(lambda v: v["steps"][0].pop("scores")),
        damaged(lambda v: v["steps"][0]["scores"].pop()),
        damaged(lambda v: v["steps"][0]["scores"][0].pop()),
        damaged(lambda v: v["steps"][0]["routed"].pop()),
        damaged(lambda v: v["steps"][0]["logprobs"].pop()),
        damaged(lambda v: v["steps"][0].update(tokens=[])),
        damaged(lambda v: v["steps"][0].update(tokens=5)),
        damaged(lambda v: v["steps"][0].update(kv=[1, 2])),
        damaged(lambda v: v["steps"][0].update(p="half")),
        damaged(lambda v: v.update(mod_layers=[1])),
    ],
)
def test_damaged_json_is_refused_with_a_sentence(text):
    """Whatever is wrong, one kind of error that says it is no trace."""
    with pytest.raises(ValueError, match="not a routing trace"):
        RoutingTrace.from_json(text)


def test_collect_takes_all_steps():
    """From any iterator."""
    made = RoutingTrace.collect((step(seed=at) for at in range(3)), 4, [1, 2])
    assert len(made.steps) == 3
    assert made.mod_layers == (1, 2)
