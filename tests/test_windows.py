"""Cost and memory with sliding windows: what is counted is what tokens meet, and what the caches hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from builders import WINDOW, mod_model, tokens
from hypothesis import given
from hypothesis import strategies as st

from app.tape import Piece, Tape, summary, tape_of_trace
from modification.executor import Stock, executor_of
from modification.measure.cost import CostMeter, ModelShape, layer_flops, pairs
from modification.measure.estimate import estimate, kv_bytes
from modification.measure.speed import _met
from modification.trace import RoutingTrace, Step

SHAPE = ModelShape(
    4, (1, 2), layer_weights=(1000, 1000, 700, 300), head_weights=500, attention_width=8, router_weights=10,
    entry_width=4, windows=(3, 5, None, None),
)
runs = st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=30)


def step(routed):
    """A step in which tokens [N, M] ran so."""
    ran = np.array(routed, bool).T
    count = ran.shape[1]
    return Step(np.arange(count), np.zeros(count, np.float32), ran.astype(np.float32), ran, 0.5, 0, 0, 0, 0.1)


def seen(flags, column, window):
    """Stored columns that a token sees, itself included, one by one."""
    return sum(bool(flags[c]) for c in range(column + 1) if window is None or column - c < window)


@given(tokens_=st.integers(1, 60), window=st.sampled_from([None, 1, 4, 17, 100]))
def test_pairs_are_those_of_each_token_by_itself(tokens_, window):
    """With a window or without."""
    assert pairs(tokens_, window) == sum(seen([1] * tokens_, column, window) for column in range(tokens_))


@given(prompt=runs, later=runs, keep=st.booleans())
def test_a_meter_counts_what_tokens_meet(prompt, later, keep):
    """Of any decisions, in any steps: the pairs that one by one are there."""
    shape = dataclasses.replace(SHAPE, keep=keep)
    meter, ran = CostMeter(shape), np.array([*prompt, *later], bool)
    meter.add(step(prompt))
    for token in later:
        meter.add(step([token]))
    total = len(ran)
    dense = sum(layer_flops(shape, at, total, pairs(total, window)) for at, window in enumerate(shape.windows))
    assert meter.dense == dense + (1 + len(later)) * 2 * shape.head_weights
    routed = sum(layer_flops(shape, layer, total, pairs(total, shape.window(layer))) for layer in (0, 3))
    for at, layer in enumerate(shape.mod_layers):
        stored = np.ones(total, bool) if keep else ran[:, at]
        met = sum(seen(stored, column, shape.window(layer)) for column in range(total) if ran[column, at])
        routed += layer_flops(shape, layer, int(ran[:, at].sum()), met)
    assert meter.routed - (meter.dense - dense) - routed == 2 * total * 2 * 10


@given(prompt=runs, later=runs)
def test_entries_of_decode_steps_are_those_that_a_token_meets(prompt, later):
    """What bytes per step are counted from: a row's entries in each layer."""
    found = _met(SHAPE, np.array(prompt, bool).T, np.array(later, bool))
    ran = np.array([*prompt, *later], bool)
    flags = {0: np.ones(len(ran)), 1: ran[:, 0], 2: ran[:, 1], 3: np.ones(len(ran))}
    for at in range(len(later)):
        for layer, stored in flags.items():
            assert found[at, layer] == seen(stored, len(prompt) + at, SHAPE.windows[layer])


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window", "gemma3_text-window"])
@pytest.mark.parametrize("load", [None, 1.0])
def test_estimated_entries_are_those_that_caches_hold(variant, load):
    """Ours at p = 0 less room to grow, and the stock one: all of a window but one entry."""
    model = mod_model(variant)
    ids, shape = tokens(1, 8 * WINDOW), ModelShape.of(model)
    if load is None:
        held = Stock(model, "test")
        cache = model.new_cache()
        held.prefill(ids[0], cache, 0.0)
        assert kv_bytes(shape, ids.shape[1], 1, None, 4) == cache.nbytes().dense
        return
    cache = model.new_cache()
    executor = Stock(model, "test")
    executor.prefill(ids[0, : 4 * WINDOW], cache, 0.0)
    for token in ids[0, 4 * WINDOW :].tolist():
        executor.decode([token], [cache], [0.0])
    assert kv_bytes(shape, ids.shape[1], 1, load, 4) == pytest.approx(cache.nbytes().stored * 17 / 16, rel=0.02)


def test_estimated_memory_has_room_for_the_chunk_in_hand():
    """A prompt's entries are all held until it is through all layers, though the window is short."""
    model, ids, high = mod_model("mistral-window"), tokens(1, 30 * WINDOW)[0], []
    cache, shape = model.new_cache(), ModelShape.of(model)
    advance = cache.advance_all
    cache.advance_all = lambda *args: (high.append(cache.nbytes().allocated), cache.__dict__.update(sizes=None),
                                       advance(*args))
    executor_of(model).prefill(ids, cache, 0.0)
    settled, most = (kv_bytes(shape, len(ids), 1, 1.0, 4, high_) for high_ in (False, True))
    columns = 4 * len(ids) * len(model.mod_layers)
    assert settled < high[0] == pytest.approx(most + columns * 17 / 16, rel=0.02)
    found = estimate(model.config, context=len(ids), load=1.0, dtype=torch.float32).mod
    assert found.kv + found.activations > most


def test_a_window_bounds_what_a_long_context_costs():
    """Past it, where all layers have one, neither keys and values nor a decode step's cost grow."""
    config = mod_model("mistral-window", max_position_embeddings=4096).config
    short, long = (estimate(config, context=context, dtype=torch.float32) for context in (1024, 4096))
    for side in ("dense", "mod"):
        one, other = getattr(short, side), getattr(long, side)
        assert (one.kv, one.decode_bytes, one.decode_flops) == (other.kv, other.decode_bytes, other.decode_flops)
        assert other.prefill_flops < 4.1 * one.prefill_flops


def test_a_trace_notes_windows_and_is_counted_by_them():
    """A recorded run shows the saving that was counted when it ran."""
    trace = RoutingTrace(4, (1, 2), info={"shape": dataclasses.asdict(SHAPE)})
    tape, made = Tape(SHAPE, "m"), [step([[True, False]] * 9), step([[False, True]]), step([[True, True]])]
    for one in made:
        trace.append(one, ["x"] * len(one.tokens))
        tape.add(one, [Piece("x")] * len(one.tokens))
    tape.end("")
    again = tape_of_trace(RoutingTrace.from_json(trace.to_json()))
    saved = summary(tape.text)["compute_saved"]
    assert summary(again)["compute_saved"] == saved != 0
    full = Tape(dataclasses.replace(SHAPE, windows=()), "m")
    for one in made:
        full.add(one, [Piece("x")] * len(one.tokens))
    full.end("")
    assert summary(full.text)["compute_saved"] != saved


@pytest.mark.parametrize("windows", [[3], [3, 0, None, None], [3, "x", 1, 1], 7, [[1], 2, 3, 4]])
def test_odd_windows_in_a_trace_are_refused(windows):
    """Before anything is drawn."""
    trace = RoutingTrace(4, (1, 2), info={"shape": {**dataclasses.asdict(SHAPE), "windows": windows}})
    trace.append(step([[True, False]] * 3), ["x"] * 3)
    with pytest.raises((ValueError, TypeError)):
        tape_of_trace(trace)
