"""RaggedCache: lengths, bytes and growth, and the stock cache operations that decoding methods rely on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from builders import ALL, FEW, WINDOW, assert_close, dense_model, in_chunks, mod_model, padded, safe_threshold, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modification import MoDConfig, RaggedCache, generate
from modification.cache import GrowingLayer, RaggedLayer, margin
from modification.executor import executor_of
from modification.storage import KINDS, Buffer, Row

few_families = pytest.mark.parametrize("variant", FEW)
every_kv = pytest.mark.parametrize("kv", ["evict", "keep"])


def filled(model, ids, p, **call):
    """A cache that has seen ids [B, T]."""
    cache = model.new_cache()
    model(ids, past_key_values=cache, p=p, **call)
    return cache


# Bytes


@pytest.mark.parametrize("variant", ALL)
def test_dense_bytes_are_what_the_dense_parent_stores(variant):
    """Counted on the dense model's own cache, windows included; at p = 0 a model without windows stores as much."""
    dense, model, ids = dense_model(variant), mod_model(variant), tokens(2)
    parent = dense(ids, past_key_values=DynamicCache(config=dense.config), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in parent.layers)
    assert filled(model, ids, 0.0).nbytes().dense == held
    if "window" not in variant:
        assert filled(model, ids, 0.0).nbytes().stored == held
    assert filled(model, ids, 0.6).nbytes().dense == held


@every_kv
def test_stored_bytes_are_the_entries_times_their_size(kv):
    """Two dense layers hold every token, MoD layers what ``lengths`` says."""
    model, ids = mod_model("llama", MoDConfig(kv=kv)), tokens(3)
    cache = filled(model, ids, 0.5)
    entries = 2 * ids.numel() + sum(sum(rows) for rows in cache.lengths().values())
    assert cache.nbytes().stored == entries * cache.entry_bytes
    assert cache.nbytes().stored < cache.nbytes().dense or kv == "keep"


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("prompt", [1, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_allocated_bytes_stay_within_a_tenth_of_stored(p, prompt, batch):
    """From 64 tokens on, at every step of growth token by token."""
    model, ids = mod_model("llama"), tokens(batch, 110)
    cache, start = model.new_cache(), 0
    for end in range(prompt, 111):
        model(ids[:, start:end], past_key_values=cache, p=p)
        start = end
        size = cache.nbytes()
        assert size.stored <= size.allocated
        if end >= 64:
            assert size.allocated <= 1.1 * size.stored


def test_an_empty_cache_holds_nothing():
    """No bytes, no length, before the first call and after reset."""
    model = mod_model("llama")
    cache = model.new_cache()
    for _ in range(2):
        assert (cache.nbytes().stored, cache.nbytes().allocated, cache.nbytes().dense) == (0, 0, 0)
        assert cache.get_seq_length() == 0
        model(tokens(2), past_key_values=cache, p=0.5)
        assert cache.get_seq_length() == 14
        cache.reset()


def test_the_sequence_length_counts_skipped_tokens_too():
    """Every layer reports the tokens seen, stored or not."""
    model = mod_model("llama", MoDConfig(anchors=0))
    cache = filled(model, tokens(2), 1.0)
    assert [layer.get_seq_length() for layer in cache.layers] == [14] * 5
    assert cache.get_mask_sizes(3, 2) == (17, 0)
    assert sum(map(sum, cache.lengths().values())) == 0


# Crop, reorder, select, repeat: equal to recomputation


@few_families
@every_kv
@pytest.mark.parametrize("removed", [1, 5, 13])
def test_crop_is_never_having_seen_the_tokens(variant, kv, removed):
    """After crop(-n) another continuation gives the logits of a fresh pass."""
    model, ids = mod_model(variant, MoDConfig(kv=kv)), tokens(2)
    kept = ids.shape[1] - removed
    other = torch.cat([ids[:, :kept], tokens(2, 6, seed=8)], 1)
    p = safe_threshold(model, other)
    cache = filled(model, ids, p)
    cache.crop(-removed)
    assert cache.get_seq_length() == kept
    assert cache.lengths() == filled(model, ids[:, :kept], p).lengths()
    assert cache.nbytes().stored == filled(model, ids[:, :kept], p).nbytes().stored
    assert_close(model(other[:, kept:], past_key_values=cache, p=p).logits, model(other, p=p).logits[:, kept:])


def test_crop_of_everything_leaves_an_empty_cache():
    """The cache serves a new text as a fresh one would."""
    model, ids = mod_model("llama"), tokens(2)
    cache = filled(model, tokens(2, 9, seed=3), 0.5)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    assert cache.nbytes().stored == 0
    assert_close(model(ids, past_key_values=cache, p=0.5).logits, model(ids, p=0.5).logits)


def test_crop_of_nothing_changes_nothing():
    """crop(0) is a no-op."""
    model, ids = mod_model("llama"), tokens(2)
    cache = filled(model, ids, 0.5)
    before = cache.lengths()
    cache.crop(0)
    assert cache.get_seq_length() == 14
    assert cache.lengths() == before


def test_a_positive_crop_is_refused():
    """The stock contract: tokens to remove, as a negative number."""
    with pytest.raises(ValueError, match="negative number"):
        filled(mod_model("llama"), tokens(2), 0.5).crop(3)


@few_families
@every_kv
@pytest.mark.parametrize("order", [[1, 0, 2], [2, 2, 0], [1], [0, 1, 2, 2, 1]])
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
def test_chosen_rows_are_those_rows_recomputed(variant, kv, order, operation):
    """Any order, repeats and omissions, on a padded batch; rows chosen twice then grow apart."""
    model = mod_model(variant, MoDConfig(kv=kv))
    batch = padded([tokens(1, length, at)[0] for at, length in enumerate((9, 4, 7))], "left")
    mask, position_ids = batch["attention_mask"], batch["position_ids"]
    cache = model.new_cache()
    model(**batch, past_key_values=cache, p=0.5)
    getattr(cache, operation)(torch.tensor(order))
    longer = torch.cat([batch["input_ids"][order], tokens(len(order), 3, seed=8)], 1)
    longer_mask = torch.cat([mask[order], torch.ones(len(order), 3, dtype=torch.long)], 1)
    places = torch.cat([position_ids[order], position_ids[order, -1:] + torch.arange(1, 4)], 1)
    whole = model(longer, attention_mask=longer_mask, position_ids=places, p=0.5).logits[:, 9:]
    for at in range(3):
        end = 10 + at
        piece = model(
            longer[:, end - 1 : end], attention_mask=longer_mask[:, :end], position_ids=places[:, end - 1 : end],
            past_key_values=cache, p=0.5,
        )
        assert_close(piece.logits[:, 0], whole[:, at])


@few_families
def test_repeated_rows_are_those_rows_recomputed(variant):
    """batch_repeat_interleave(2): each row twice, side by side."""
    model, ids = mod_model(variant), tokens(2)
    cache = filled(model, ids, 0.5)
    cache.batch_repeat_interleave(2)
    longer = torch.cat([ids.repeat_interleave(2, 0), tokens(4, 2, seed=8)], 1)
    assert_close(model(longer[:, 14:], past_key_values=cache, p=0.5).logits, model(longer, p=0.5).logits[:, 14:])


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"])
def test_operations_work_where_no_token_was_stored(operation):
    """At p = 1 without anchors MoD layers hold nothing; rows can be chosen, repeated and cropped all the same."""
    model, ids = mod_model("llama", MoDConfig(anchors=0)), tokens(2)
    cache = filled(model, ids, 1.0)
    operand = {"batch_repeat_interleave": 2, "crop": -1}.get(operation, torch.tensor([1, 0]))
    getattr(cache, operation)(operand)
    kept = {
        "batch_repeat_interleave": ids.repeat_interleave(2, 0), "crop": ids[:, :-1],
    }.get(operation, ids[[1, 0]])
    longer = torch.cat([kept, tokens(len(kept), 2, seed=8)], 1)
    new = model(longer[:, kept.shape[1] :], past_key_values=cache, p=0.3).logits
    fresh = filled(model, kept, 1.0)
    assert_close(new, model(longer[:, kept.shape[1] :], past_key_values=fresh, p=0.3).logits)


def test_a_copied_cache_grows_on_its_own():
    """deepcopy shares nothing."""
    model, ids = mod_model("llama"), tokens(2)
    cache = filled(model, ids, 0.5)
    other = copy.deepcopy(cache)
    before = cache.lengths()
    model(tokens(2, 5, seed=4), past_key_values=other, p=0.0)
    assert cache.lengths() == before
    assert cache.get_seq_length() == 14
    assert other.get_seq_length() == 19


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_is_written_where_it_lies(again):
    """Whatever decodes, and writes by address: a copy goes on as the original would have, and leaves it alone."""
    model, ids = mod_model("llama"), tokens(1, 20)[0]
    cache = model.new_cache()
    list(generate(model, ids, p=0.5, max_new_tokens=6, cache=cache))
    cache.owner = None  # a reference to the model
    other, before = again(cache), [store.keys.clone() for layer in cache.layers for store in layer.stores()]
    executor = executor_of(model)
    found = [executor.decode([token], [other], [0.5]).logits for token in (3, 4, 5)]
    assert all(map(torch.equal, before, (store.keys for layer in cache.layers for store in layer.stores())))
    expected = [executor.decode([token], [cache], [0.5]).logits for token in (3, 4, 5)]
    assert all(map(torch.equal, found, expected))
    assert other.lengths() == cache.lengths()


def test_chosen_rows_keep_the_room_to_grow():
    """Reordering a batch's rows, as beams do at every token, leaves no growth for the next one to make."""
    buffer, entries = Buffer(), torch.randn(3, 2, 40, 4)
    buffer.append(entries, -entries)
    capacity = buffer.capacity
    buffer.take_rows(torch.tensor([2, 2, 0]))
    assert (buffer.capacity, buffer.length) == (capacity, 40)
    assert torch.equal(buffer.keys, entries[[2, 2, 0]])
    assert torch.equal(buffer.values, -entries[[2, 2, 0]])


def test_a_row_on_a_device_moves_on_that_device():
    """Whatever its next entries come from; kernels that write by address are told not to."""
    row, entries = Row(), torch.empty(2, 20, 4, device="meta")
    row.add(entries, entries, torch.empty(20, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="another device"):
        row.make_place(torch.empty(2, 0, 4))
    row.drop(15)
    assert {part.device.type for part in (row.keys, row.values, row.columns)} == {"meta"}
    assert row.kind not in KINDS.values()


def test_entries_that_gradients_go_through_keep_them(gradients):
    """A store that grows is no cut in the graph."""
    row, columns = Row(), torch.arange(20, dtype=torch.int32)
    first = torch.randn(2, 20, 4, requires_grad=True)
    row.add(first, first, columns)
    row.add(first.detach(), first.detach(), columns)
    row.keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))


# Misuse


def test_a_batch_of_another_size_is_refused():
    """The error names both sizes."""
    model = mod_model("llama", MoDConfig(layers=[0, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match="holds a batch of 2, not of 3"):
        model(tokens(3), past_key_values=filled(model, tokens(2), 0.0), p=0.0)


def test_a_ragged_layer_is_not_written_behind_the_model_s_back():
    """The base model alone carries no routing; the error says to call the model."""
    model = mod_model("llama")
    with pytest.raises(RuntimeError, match="call the model"):
        model.model(tokens(1), past_key_values=model.new_cache(), use_cache=True)


def test_layers_are_ragged_where_they_route():
    """Dense layers grow, MoD layers are ragged."""
    cache = RaggedCache([None] * 4, (1, 2), 128)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, RaggedLayer, RaggedLayer, GrowingLayer]
    assert cache.lengths() == {1: [], 2: []}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_growing_layer_returns_what_concatenation_would(sizes):
    """Whatever the pieces, and with little room to spare."""
    layer, parts = GrowingLayer(), []
    for at, size in enumerate(sizes):
        keys = torch.randn(2, 3, size, 4, generator=torch.Generator().manual_seed(at))
        parts.append(keys)
        stored, values = layer.update(keys, -keys)
        assert torch.equal(stored, torch.cat(parts, 2))
        assert torch.equal(values, -stored)
    held, allocated = layer.buffer.nbytes()
    assert held == 2 * stored.nbytes
    assert held <= allocated <= held * 17 / 16


def test_chunks_of_any_size_store_the_same():
    """Lengths don't depend on how the tokens came."""
    model, ids = mod_model("llama"), tokens(2)
    lengths = [in_chunks(model, ids, sizes, p=0.5)["cache"].lengths() for sizes in ([14], [1] * 14, [3, 11])]
    assert lengths[0] == lengths[1] == lengths[2]


@pytest.mark.parametrize("change", ["nothing", "crop", "settle", "prefill", "stock", "reset", "another row"])
def test_sizes_that_are_kept_are_those_counted(change):
    """Whatever happens between two tokens, and as buffers grow."""
    model = mod_model("llama")
    executor, cache, ids = executor_of(model), model.new_cache(), tokens(1, 30)[0]
    executor.prefill(ids, cache, 0.4)
    for at in range(60):
        executor.decode([at % 90], [cache], [0.1 * (at % 10)])
        if at == 20:
            {
                "nothing": lambda: None, "crop": lambda: cache.crop(-7), "settle": cache.settle,
                "prefill": lambda: executor.prefill(ids, cache, 0.7), "reset": cache.reset,
                "stock": lambda: model(ids[None], past_key_values=cache, p=0.5),
                "another row": lambda: cache.batch_select_indices(torch.tensor([0])),
            }[change]()
        if change == "stock" and at >= 20:
            break
        counted = [store.nbytes() for layer in cache.layers for store in layer.stores()]
        found = cache.nbytes()
        assert (found.stored, found.allocated) == tuple(map(sum, zip(*counted, strict=True)))


# Sliding windows


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_window_bounds_what_is_kept(variant, p):
    """Token by token far past the window: no more than the window and a margin, allocated within a tenth of that."""
    model, ids = mod_model(variant), tokens(2, 160)
    cache = model.new_cache()
    for at in range(160):
        model(ids[:, at : at + 1], past_key_values=cache, p=p)
    most = WINDOW - 1 + margin(WINDOW)
    for index, layer in enumerate(cache.layers):
        if cache.windows[index] is None:
            assert layer.floor == 0
            continue
        lengths = layer.lengths() if isinstance(layer, RaggedLayer) else [layer.buffer.length]
        assert all(length <= most for length in lengths)
        assert p or lengths == [most] * len(lengths)
        room = sum(store.nbytes()[1] for store in layer.stores())
        assert room <= (most + 2) * 2 * (cache.entry_bytes + 4)
    assert cache.get_seq_length() == 160


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window"])
def test_dropping_what_left_the_window_changes_no_logits(variant):
    """Pieces over a cache that drops against all at once, which drops nothing."""
    model, ids = mod_model(variant), tokens(2, 90)
    p = safe_threshold(model, ids)
    whole = model(ids, p=p, use_cache=False).logits
    for sizes in ([90], [30, 30, 30], [1] * 90, [70] + [1] * 20):
        assert_close(in_chunks(model, ids, sizes, p=p)["logits"], whole)


@pytest.mark.parametrize("sizes", [[1] * 160, [50, 3, 40, 1, 1, 30] + [1] * 35])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_on_a_device_columns_are_not_looked_at(sizes, p, monkeypatch):
    """Dropped by what the host has counted: as exactly where tokens come one by one, later by a piece at most."""
    model, ids = mod_model("mistral-window"), tokens(2, sum(sizes))
    expected = in_chunks(model, ids, sizes, p=p)
    monkeypatch.setattr(Row, "on_host", False)
    found = in_chunks(model, ids, sizes, p=p)
    assert_close(found["logits"], expected["logits"])
    for ours, theirs in zip(found["cache"].layers, expected["cache"].layers, strict=True):
        for row, other in zip(ours.stores(), theirs.stores(), strict=True):
            assert other.length <= row.length < other.length + max(sizes)
            assert max(sizes) > 1 or row.length == other.length


def test_a_row_on_a_device_that_steps_back_forgets_no_entry(monkeypatch):
    """Cropped, settled or copied, what it drops afterwards is what columns say."""
    monkeypatch.setattr(Row, "on_host", False)
    row = Row()
    for at in range(0, 40, 2):
        row.add(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([at]))
        row.mark(at + 1)
    row.drop_before(7)
    assert row.columns[0] == 8
    row.crop(30)
    row.settle(25)
    assert row.columns[-1] == 24
    other = row.copy()
    for one, end in ((row, 26), (other, 13)):
        one.add(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([26]))
        one.mark(27)
        one.drop_before(end)
        assert one.columns[0] == (26 if end == 26 else 14)
    row.drop_before(99)
    assert row.length == 0


def test_a_window_can_step_back_by_its_margin_and_no_further():
    """Within it as if the tokens had never been; beyond it refused, and nothing is lost."""
    model, ids = mod_model("mistral-window"), tokens(1, 90)
    cache = filled(model, ids, 0.4)
    cache.crop(-margin(WINDOW))
    again = model(ids[:, 90 - margin(WINDOW) :], past_key_values=cache, p=0.4)
    whole = model(ids, p=0.4, use_cache=False)
    assert_close(again.logits, whole.logits[:, 90 - margin(WINDOW) :])
    before = cache.nbytes()
    with pytest.raises(ValueError, match=rf"sliding window of {WINDOW}.*back by {margin(WINDOW)} at most"):
        cache.crop(-margin(WINDOW) - 1)
    assert cache.nbytes() == before
    assert cache.get_seq_length() == 90
