"""MoDConfig: frozen, validated, with errors that name the value and the bound."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modification import MoDConfig

indices = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)
configs = st.builds(
    MoDConfig,
    p=st.floats(0, 1),
    layers=st.one_of(st.sampled_from(["inner", "interleaved"]), indices),
    gate=st.sampled_from(["straight_through", "paper"]),
    anchors=st.integers(0, 100),
    kv=st.sampled_from(["evict", "keep"]),
    dial=st.lists(st.floats(0.001, 0.999), max_size=20).map(sorted),
)


def test_defaults_are_the_documented_ones():
    """p 0.5, inner layers, straight-through gate, one anchor, evicted keys and values."""
    config = MoDConfig()
    assert (config.p, config.layers, config.gate, config.anchors, config.kv) == (
        0.5, "inner", "straight_through", 1, "evict",
    )


def test_a_config_is_frozen():
    """No field can be set after construction."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoDConfig().p = 0.1


@given(configs)
def test_a_config_survives_json(config):
    """to_dict, JSON and from_dict give the same config, and equal configs hash alike."""
    again = MoDConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@given(st.floats(allow_nan=True).filter(lambda p: not 0 <= p <= 1))
def test_p_outside_its_bounds_is_named(p):
    """Every float outside [0, 1], NaN and the infinities included, is refused by value and bound."""
    with pytest.raises(ValueError, match=r"p=.*number from 0 to 1") as caught:
        MoDConfig(p=p)
    assert repr(p) in str(caught.value)


@pytest.mark.parametrize("p", ["0.5", None, True, [0.5], math.nan])
def test_p_must_be_a_number(p):
    """Text, nothing, booleans and lists are no thresholds."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        MoDConfig(p=p)


@settings(max_examples=40)
@given(st.one_of(st.integers(max_value=-1), st.floats(), st.booleans(), st.text(), st.none()))
def test_anchors_must_be_a_count(anchors):
    """Negative numbers, fractions, booleans and text are refused, with the bound."""
    with pytest.raises(ValueError, match=r"anchors=.*0 or more"):
        MoDConfig(anchors=anchors)


@pytest.mark.parametrize("field", ["gate", "kv", "layers"])
@given(value=st.text(max_size=12))
def test_a_wrong_choice_is_named_with_the_right_ones(field, value):
    """Gate, kv and layer rules outside their choices are refused, with the choices."""
    right = {"gate": "straight_through, paper", "kv": "evict, keep", "layers": "inner, interleaved"}[field]
    if value in right.split(", "):
        return
    with pytest.raises(ValueError, match=right) as caught:
        MoDConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("layers", [[], (), [1, 1], [-1], [1.0], [True], ["1"], None, 3, {1, 2}])
def test_wrong_layer_indices_are_named(layers):
    """Empty, repeated, negative or non-integer indices are refused."""
    with pytest.raises(ValueError, match=r"layers="):
        MoDConfig(layers=layers)


@given(indices)
def test_indices_are_kept_sorted(layers):
    """The order in which indices are given doesn't matter."""
    assert MoDConfig(layers=layers).layers == tuple(sorted(layers))


@given(st.integers(3, 80))
def test_layer_rules_pick_what_they_say(depth):
    """Inner: all but first and last; interleaved: every other one from layer 1."""
    assert MoDConfig(layers="inner").layer_indices(depth) == tuple(i for i in range(depth) if 0 < i < depth - 1)
    assert MoDConfig(layers="interleaved").layer_indices(depth) == tuple(i for i in range(depth) if i % 2)


def test_an_index_beyond_the_model_is_named():
    """The error says the index and the bound."""
    with pytest.raises(ValueError, match=r"index 7 is not in 0\.\.4"):
        MoDConfig(layers=[1, 7]).layer_indices(5)


@pytest.mark.parametrize(("layers", "depth"), [("inner", 2), ("inner", 1), ("interleaved", 1)])
def test_a_rule_that_leaves_no_layer_is_refused(layers, depth):
    """A MoD model has at least one MoD layer."""
    with pytest.raises(ValueError, match="leaves no layer"):
        MoDConfig(layers=layers).layer_indices(depth)


def test_unknown_fields_are_named():
    """from_dict doesn't pass over what it doesn't know."""
    with pytest.raises(ValueError, match="capacity, topk"):
        MoDConfig.from_dict({"p": 0.5, "topk": 3, "capacity": 1})


@pytest.mark.parametrize("values", [None, [], "p", 0.5])
def test_settings_that_are_no_dictionary_are_refused(values):
    """A damaged config file gives a sentence."""
    with pytest.raises(ValueError, match="must be a dictionary"):
        MoDConfig.from_dict(values)


@pytest.mark.parametrize("dial", [[0.5, 0.2], [0.0, 0.5], [0.5, 1.0], [0.5, float("nan")], ["a"], 0.5, [True]])
def test_a_dial_that_does_not_rise_between_0_and_1_is_refused(dial):
    with pytest.raises(ValueError, match="dial"):
        MoDConfig(dial=dial)
