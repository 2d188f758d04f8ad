"""Keys that are there in part: the scores' own arithmetic, without their gradient's memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from builders import assert_close

from modification.presence import Presence


def drawn(dtype=torch.float32, heads=4):
    """Queries, keys and values of two rows, keys' weights with some at 1, and which key each query may see."""
    noise = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, count, 9, 16, generator=noise).to(dtype).requires_grad_() for count in
                         (4, heads, heads))
    weights = torch.where(torch.rand(2, 9, generator=noise) < 0.5, 1.0, torch.rand(2, 9, generator=noise) + 0.01)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.rand(2, 1, 9, 9, generator=noise) < 0.8)
    return query, key, value, weights.requires_grad_(), mask | torch.eye(9, dtype=torch.bool)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("heads", [4, 2])
def test_it_is_an_added_mask(heads, scale, gradients):
    """Values and all gradients; grouped heads and a scale of one's own too."""
    query, key, value, weights, mask = drawn(heads=heads)
    asked = {"scale": scale, "enable_gqa": heads < 4}
    bias = torch.where(mask, weights.log()[:, None, None, :], -torch.inf)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **asked)
    with Presence(weights.log()):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **asked)
        assert torch.equal(torch.exp(torch.zeros(3)), torch.ones(3))  # all else is as it was
    assert_close(found, expected)
    inputs = (query, key, value, weights)
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)),
                            strict=True):
        assert_close(ours, theirs)


def test_whole_keys_change_nothing_and_absent_ones_are_hidden(gradients):
    query, key, value, _, mask = drawn()
    whole, there = torch.zeros(2, 9), torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(3)) < 0.7
    with Presence(whole):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close(found, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    own = torch.eye(9, dtype=torch.bool)
    with Presence(torch.where(there[:, 0, 0], 0.0, -30.0)):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    hidden = F.scaled_dot_product_attention(query, key, value, attn_mask=mask & (there | own))
    assert_close(found[:, :, there[:, 0, 0].all(0)], hidden[:, :, there[:, 0, 0].all(0)])


def test_half_precision_stays_so(gradients):
    query, key, value, weights, mask = drawn(torch.bfloat16)
    bias = torch.where(mask, weights.log()[:, None, None, :], -torch.inf).bfloat16()
    with Presence(weights.log()):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert found.dtype == torch.bfloat16
    assert_close(found, F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
