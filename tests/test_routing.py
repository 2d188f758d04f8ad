"""Router, threshold rule, straight-through gate and the gather/scatter of routed tokens, on tensors by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modification import MoDConfig
from modification.routing import Router, RoutingCall, bend, select, straight_through

masks = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows
        )
    )
).map(torch.tensor)


def _call(p, **changes):
    return RoutingCall(MoDConfig(), torch.tensor([[p]]), "gathered", torch.arange(4), **changes)


@settings(max_examples=60)
@given(masks)
def test_scatter_after_gather_changes_routed_tokens_only(run):
    """What went in comes back where it was taken from; fillers never touch a skipped token."""
    x = torch.arange(run.numel() * 3, dtype=torch.float32).view(*run.shape, 3)
    chosen = select(run)
    if chosen is None:
        assert not run.any()
        return
    block = chosen.gather(x)
    assert torch.equal(chosen.scatter(x, block), x)
    assert torch.equal(chosen.scatter(x, -block - 1), torch.where(run[..., None], -x - 1, x))


@settings(max_examples=60)
@given(masks)
def test_a_selection_holds_routed_tokens_first_and_in_order(run):
    """Rows without a routed token are left out; the others start with theirs, in order, none twice."""
    chosen = select(run)
    assert (chosen is None) == (not run.any())
    if chosen is None:
        return
    assert chosen.rows.tolist() == run.any(1).nonzero().flatten().tolist()
    assert chosen.counts == run.sum(1)[chosen.rows].tolist()
    assert chosen.index.shape[1] == max(chosen.counts)
    for row, places, count in zip(chosen.rows.tolist(), chosen.index.tolist(), chosen.counts, strict=True):
        assert places[:count] == run[row].nonzero().flatten().tolist()
        assert len(set(places)) == len(places)
    full = chosen.filled is None
    assert full == (min(chosen.counts) == max(chosen.counts))
    if not full:
        assert chosen.filled.sum(1).tolist() == chosen.counts


def test_gather_reads_a_shared_first_row():
    """Positions and rotary tables of shape [1, T] serve every row."""
    chosen = select(torch.tensor([[True, False, True], [False, True, True]]))
    assert chosen.gather(torch.tensor([[10, 11, 12]])).tolist() == [[10, 12], [11, 12]]


def test_a_token_runs_from_its_threshold_on():
    """The rule is g >= p: equal runs, just below skips."""
    gate = torch.tensor([[0.5, 0.5 - 1e-6, 0.0, 1.0]])
    assert _call(0.5).decide(1, gate).tolist() == [[True, False, False, True]]
    assert _call(0.0).decide(1, gate).all()


def test_a_broken_router_opens_its_gate():
    """A NaN must not lose its token: the gate is 1, so that the token runs at every p."""
    router = Router(4, bias=0.0)
    router.weight.data.fill_(float("nan"))
    gate = torch.sigmoid(router(torch.randn(2, 3, 4)))
    assert gate.eq(1).all()
    assert _call(1.0).decide(1, gate).all()


def test_anchors_run_and_padding_never_does():
    """Anchors beat the score, padding beats both."""
    gate = torch.tensor([[0.9, 0.1, 0.1, 0.9]])
    anchored = torch.tensor([[True, True, False, False]])
    valid = torch.tensor([[False, True, True, True]])
    assert _call(0.5, anchored=anchored, valid=valid).decide(1, gate).tolist() == [[False, True, False, True]]


def test_decisions_are_recorded_only_on_request():
    """A call that doesn't ask keeps nothing."""
    silent, asked = _call(0.5), _call(0.5, record=True)
    for call in (silent, asked):
        call.decide(3, torch.full((1, 4), 0.7))
    assert not silent.scores
    assert not silent.routed
    assert asked.routed[3].all()


def test_the_router_scores_the_normalised_state(gradients):
    """sigma(W rms_norm(x) + b), computed by hand; scaling x changes nothing."""
    router = Router(8, 2.0)
    x = torch.randn(2, 3, 8)
    normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    expected = normed @ router.weight[0] + router.bias
    torch.testing.assert_close(router(x), expected)
    torch.testing.assert_close(router(100 * x), expected, atol=1e-4, rtol=1e-4)
    assert router(x.bfloat16()).dtype == torch.float32


def test_autocast_leaves_the_score_alone():
    """Mixed precision gives the very same score."""
    router, x = Router(8, 2.0), torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert torch.equal(mixed, router(x))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_straight_through_is_zero_with_the_slope_of_a_shifted_sigmoid(p, gradients):
    """Value 0 everywhere; gradient s(1 - s) at s = sigma(logit - logit p), finite at both ends of p."""
    logit = torch.tensor([[-3.0, 0.0, 4.0]], requires_grad=True)
    zero = straight_through(logit, torch.tensor([[p]]))
    assert torch.equal(zero, torch.zeros(1, 3))
    zero.sum().backward()
    bounded = min(max(p, 1e-4), 1 - 1e-4)
    s = torch.sigmoid(logit.detach() - torch.logit(torch.tensor(bounded)))
    torch.testing.assert_close(logit.grad, s * (1 - s), atol=1e-6, rtol=1e-3)
    assert logit.grad.isfinite().all()


# The dial


@settings(max_examples=200)
@given(dial=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12), gates=st.lists(st.floats(0, 1), min_size=1))
def test_the_dial_bends_scores_and_keeps_their_order(dial, gates):
    """Rising from 0 to 1, k / (n + 1) at the k-th knot."""
    dial = sorted(torch.tensor(dial).unique().tolist())
    knots, gates = torch.tensor(dial), torch.tensor(gates).sort().values
    bent = bend(gates, knots)
    assert (bent.diff() >= -1e-6).all()
    assert ((bent >= 0) & (bent <= 1)).all()
    assert bend(torch.tensor([0.0, 1.0]), knots).tolist() == [0.0, 1.0]
    torch.testing.assert_close(bend(knots, knots), torch.arange(1, len(dial) + 1) / (len(dial) + 1))
