"""Keys and values of several rows: attended to where they lie, and the padded tensor where something asks for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from builders import assert_close, mod_model, padded, safe_threshold, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import repeat_kv

from modification import slots
from modification.slots import Entries


def entries(lengths, new, seed=0, fillers=False):
    """Entries of rows with ``lengths`` past tokens and ``new`` ones, some of them ``fillers``; a mask that hides what
    they lack, and both whole."""
    rows, heads, width, past = len(lengths), 2, 8, max(lengths)
    dice = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, heads, past + new, width, generator=dice)
    mask = torch.zeros(rows, 1, new, past + new, dtype=torch.bool)
    for at, length in enumerate(lengths):
        whole[at, :, length:past] = 0
        mask[at, ..., :length] = torch.rand(new, length, generator=dice) < 0.7
        mask[at, ..., past:] = torch.ones(new, new).tril().bool()
    stored = torch.ones(rows, new, dtype=torch.bool)
    if fillers:
        stored[:, 1:] = torch.rand(rows, new - 1, generator=dice) < 0.5
        mask[..., past:] &= stored[:, None, None]
    parts = [
        torch.cat([whole[at, :, :length], whole[at, :, past:][:, stored[at]]], 1) for at, length in enumerate(lengths)
    ]
    return Entries(parts, past, whole[:, :, past:], stored if fillers else None), mask, whole


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(1, 3), st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=60)
def test_attention_row_by_row_is_that_over_the_padded_tensor(lengths, new, groups, fillers):
    """Whatever a mask hides besides, and with several queries for each head of keys."""
    lengths = [*lengths, 5]  # one has a past
    keys, mask, all_keys = entries(lengths, new, fillers=fillers)
    values, _, all_values = entries(lengths, new, fillers=fillers)
    assert torch.equal(keys.padded(), all_keys)
    queries = torch.randn(len(lengths), 2 * groups, new, 8, generator=torch.Generator().manual_seed(2))
    options = {"attn_mask": mask, "scale": 0.3, "enable_gqa": groups > 1}
    found = F.scaled_dot_product_attention(queries, keys, values, **options)
    assert_close(found, F.scaled_dot_product_attention(queries, all_keys, all_values, **options))


def test_anything_else_gets_one_tensor():
    """What eager attention does with keys, and what a library may ask of them."""
    keys, _, whole = entries([2, 5, 0], 1)
    queries = torch.randn(3, 2, 1, 8)
    assert torch.equal(torch.matmul(queries, keys.transpose(2, 3)), queries @ whole.transpose(2, 3))
    assert torch.equal(queries @ keys.mT, queries @ whole.mT)
    assert torch.equal(keys[:, None], whole[:, None])
    assert torch.equal(repeat_kv(keys, 3).padded(), repeat_kv(whole, 3))
    assert repeat_kv(keys, 3).shape == repeat_kv(whole, 3).shape
    assert torch.equal(keys[:, :, None, :, :].flatten(), whole.flatten())
    wide, sizes = whole[:, :, None].expand(3, 2, 2, 6, 8), (3, 2, 2, 6, 8)
    for spread in (keys[:, :, None, :, :].expand(*sizes), keys[:, :, None, :, :].expand(sizes)):
        assert spread.shape == wide.shape
        assert torch.equal(spread.reshape(3, 2, -1), wide.reshape(3, 2, -1))
        assert torch.equal(spread.flatten(1, 2), wide.flatten(1, 2))
        assert torch.equal(spread.reshape((3, 4, 6, 8)).padded(), wide.reshape(3, 4, 6, 8))
    assert torch.equal(torch.cat([keys, keys], 1), torch.cat([whole, whole], 1))


def test_masks_that_are_no_row_s_own_take_the_padded_tensor():
    """One for all rows, and one without rows; and no mask with the kernel's own rule."""
    keys, _, whole = entries([2, 5, 0], 2)
    queries = torch.randn(3, 2, 2, 8)
    for mask in (torch.randn(1, 1, 2, 7), torch.randn(2, 7), None):
        found = F.scaled_dot_product_attention(queries, keys, keys, mask, 0.0, mask is None)
        assert_close(found, F.scaled_dot_product_attention(queries, whole, whole, mask, 0.0, mask is None))
    assert torch.equal(torch.cat([keys.padded()]), whole)
    assert (keys.shape, keys.dtype, keys.device, keys.ndim) == (whole.shape, whole.dtype, whole.device, 4)


@pytest.mark.parametrize("sizes", [(1, 1), (4,), (3, 1)])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_going_on_with_a_batch_copies_no_row(variant, sizes, monkeypatch):
    """Rows with unlike pasts and unlike numbers of new tokens that run, by the stock call; each is what it is alone."""
    model, rows = mod_model(variant), [tokens(1, length)[0] for length in (9, 14, 6)]
    p = [safe_threshold(model, row[None], near) for row, near in zip(rows, (0.5, 0.3, 0.7), strict=True)]
    batch = padded([row[: -sum(sizes)] for row in rows], "left")
    cache, mask, left = model.new_cache(), batch["attention_mask"], sum(sizes)
    model(**batch, past_key_values=cache, p=torch.tensor(p))
    monkeypatch.setattr(slots, "_stack", None)
    for size in sizes:
        mask = F.pad(mask, (0, size), value=1)
        places = (mask.cumsum(1) - 1)[:, -size:]
        new = torch.stack([row[len(row) - left : len(row) - left + size] for row in rows])
        out = model(new, attention_mask=mask, position_ids=places, past_key_values=cache, p=torch.tensor(p))
        left -= size
    for at, row in enumerate(rows):
        assert_close(out.logits[at], model(row[None], p=p[at]).logits[0, -sizes[-1] :])


@pytest.mark.parametrize("routing", ["gathered", "masked"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "bloom", "phi3"])
def test_columns_that_a_later_mask_hides_are_seen_no_more(variant, routing):
    """As in a batch of chats of which one answer ended early: what ran behind its end is hidden from the next turn."""
    model, rows = mod_model(variant), [tokens(1, length, seed=length)[0] for length in (9, 14)]
    filler, new, options = torch.tensor([[3, 4], [5, 6]]), torch.tensor([[11, 12], [13, 14]]), {"routing": routing}
    batch, cache = padded(rows, "left"), model.new_cache()
    model(**batch, past_key_values=cache, p=0.0, **options)
    ran = F.pad(batch["attention_mask"], (0, 2), value=1)
    model(filler, attention_mask=ran, position_ids=(ran.cumsum(1) - 1)[:, -2:], past_key_values=cache, p=0.0, **options)
    hidden = ran.clone()
    hidden[0, -2:] = 0
    mask = F.pad(hidden, (0, 2), value=1)
    places = (mask.cumsum(1) - 1)[:, -2:]
    out = model(new, attention_mask=mask, position_ids=places, past_key_values=cache, p=0.0, **options).logits
    for at, row in enumerate((rows[0], torch.cat([rows[1], filler[1]]))):
        assert_close(out[at], model(torch.cat([row, new[at]])[None], p=0.0).logits[0, -2:])
