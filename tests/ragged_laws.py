"""What test_ragged.py runs in a process of its own, where Triton's interpreter takes the place of a GPU."""

from __future__ import annotations

import pytest
import torch
from builders import TOLERANCE, mod_model, safe_threshold, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from modification.executor import ragged
from modification.executor.blocks import attend, blocks_of
from modification.executor.fast import Fast
from modification.storage import Buffer, Row

LLAMA_SHAPED = ("llama", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3")


def filled(store, groups, head, length, noise, dtype):
    """A store with so many entries, of every other column where it keeps columns."""
    keys, values = (torch.randn(groups, length, head, generator=noise).to(dtype) for _ in range(2))
    if isinstance(store, Row):
        store.add(keys, values, 2 * torch.arange(length, dtype=torch.int32))
    else:
        store.append(keys[None], values[None])
    return store


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=2, max_size=4), groups=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]), head=st.sampled_from([8, 24]), window=st.sampled_from([None, 5, 400]),
    routed=st.booleans(), dropped=st.integers(0, 3), seed=st.integers(0, 99),
)
def test_rows_at_once_are_rows_one_by_one(lengths, groups, group, head, window, routed, dropped, seed):
    """Any lengths, key heads, windows; entries at the front dropped or not; what is stored afterwards too."""
    noise = torch.Generator().manual_seed(seed)
    rows, heads = len(lengths), groups * group
    stores = [filled(Row() if routed else Buffer(), groups, head, n, noise, torch.float32) for n in lengths]
    for store in stores:
        store.drop(min(dropped, store.length))
    q, k, v = (torch.randn(rows, many, head, generator=noise).transpose(0, 1) for many in (heads, groups, groups))
    own = [2 * n if routed else n for n in lengths]
    expected = []
    for at, (store, column) in enumerate(zip(stores, own, strict=True)):
        held = (store.keys, store.values) if routed else (store.keys[0], store.values[0])
        keys, values = (torch.cat([past, new[:, at : at + 1]], 1) for past, new in zip(held, (k, v), strict=True))
        before = store.columns if routed else torch.arange(column - store.length, column)
        columns = torch.cat([before, torch.tensor([column])])
        expected.append((attend(q[:, at : at + 1], keys, values, columns, window), keys, values, columns))
    found = ragged.RaggedAttention(groups, head, torch.float32, q.device)(q, k, v, stores, own, window)
    torch.testing.assert_close(found, torch.cat([one[0] for one in expected]), **TOLERANCE[torch.float32])
    for store, (_, keys, values, columns) in zip(stores, expected, strict=True):
        assert torch.equal(store.keys.reshape(keys.shape), keys)
        assert torch.equal(store.values.reshape(values.shape), values)
        assert not routed or torch.equal(store.columns.long(), columns.long())


@pytest.mark.parametrize("variant", LLAMA_SHAPED)
@pytest.mark.parametrize("near", [0.2, 0.5, 0.8])
def test_a_batch_is_its_rows(variant, near):
    """Models: logits, decisions and caches of rows of unlike length, each with its own p; past the window too."""
    model = mod_model(variant)
    layers, config = blocks_of(model), model.config
    heads = config.num_attention_heads, config.num_key_value_heads
    together = ragged.ragged_attention(*heads, layers[0].head, model.dtype, model.device)
    p = [safe_threshold(model, tokens(1, 30), near), 0.0, 1.0]
    prompts = [tokens(seed, length)[0] for seed, length in ((1, 30), (2, 3), (3, 17))]

    def passes(executor):
        caches = [model.new_cache() for _ in prompts]
        for ids, cache, one in zip(prompts, caches, p, strict=True):
            executor.prefill(ids, cache, one)
        return [executor.decode([step, step + 1, step + 2], caches, p) for step in range(12)], caches

    found, ours = passes(Fast(model, layers, None, "test", together=together))
    expected, theirs = passes(Fast(model, layers, None, "test"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, **TOLERANCE[torch.float32])
        assert (one.routed == other.routed).all()
    assert [cache.lengths() for cache in ours] == [cache.lengths() for cache in theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_tried_before_it_is_used(dtype, monkeypatch):
    """What it gives on rows made for it is held against attention row by row. (The interpreter has no bfloat16.)"""
    device = torch.device("cpu")
    ragged.ragged_attention(4, 2, 16, dtype, device)
    monkeypatch.setattr(ragged, "attend", lambda *given: attend(*given) + 0.1)
    with pytest.raises(RuntimeError, match=r"differs by 0\.1"):
        ragged.ragged_attention(4, 2, 16, dtype, device)


def test_what_autocast_made_is_cast():
    """Keys and values come in a store's own type, whatever the type they are given in."""
    noise = torch.Generator().manual_seed(0)
    stores = [filled(Row(), 1, 8, length, noise, torch.float16) for length in (4, 6)]
    q = torch.randn(1, 2, 8, generator=noise)
    ragged.RaggedAttention(1, 8, torch.float16, q.device)(q, q.half(), q, stores, [8, 12], None)
    for at, store in enumerate(stores):
        assert torch.equal(store.keys[:, -1], q[:, at].half())
        assert torch.equal(store.values[:, -1], q[:, at].half())


def test_a_store_of_another_type_is_refused():
    """By address, wrong bytes would be written."""
    rows = [filled(Row(), 1, 8, 4, torch.Generator(), torch.bfloat16) for _ in range(2)]
    q = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="keys of another type"):
        ragged.RaggedAttention(1, 8, torch.float32, q.device)(q, q, q, rows, [4, 4], None)
