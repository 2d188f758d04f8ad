"""The fast executor: the same logits, decisions and caches as the stock layers, whatever does the arithmetic."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from builders import (
    DEPTH,
    REPO,
    TOLERANCE,
    VOCABULARY,
    assert_close,
    dense_model,
    kernels,
    mod_model,
    routers,
    safe_threshold,
    save_folder,
    threads_set,
    tokens,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modification import MoDConfig, RaggedCache, generate, generate_batch, load
from modification.executor import Stock, base, blocks, executor_of, native
from modification.executor import fast as executing
from modification.executor.blocks import blocks_of
from modification.executor.choose import choose, fast_executor
from modification.executor.fast import Fast
from modification.executor.native import NativeDecoder
from modification.measure.bench import dense_twin

LLAMA_SHAPED = ("llama", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3")
DECODERS = ("native", "torch")
every_family = pytest.mark.parametrize("variant", LLAMA_SHAPED)
every_decoder = pytest.mark.parametrize("decoder", DECODERS)


def fast(model, decoder="native", compiled=False):
    """The fast executor, decoding with the kernels or in torch."""
    layers = blocks_of(model)
    if decoder == "torch":
        return Fast(model, layers, None, "test", compiled)
    return Fast(model, layers, NativeDecoder(model, layers, kernels()), "test")


def run(executor, model, ids, prompt, p, cache=None):
    """Prefill of ``prompt`` tokens, then the rest one by one: logits [T - prompt + 1, V], scores and routed [M, T]."""
    cache = model.new_cache() if cache is None else cache
    passes = [executor.prefill(ids[:prompt], cache, p)]
    passes += [executor.decode([int(token)], [cache], [p]) for token in ids[prompt:]]
    logits = torch.cat([part.logits for part in passes]).float()
    scores, routed = (np.concatenate([getattr(part, name) for part in passes], 1) for name in ("scores", "routed"))
    return logits, scores, routed, cache


def same(found, expected, dtype=torch.float32):
    """Equal logits, scores, decisions, and entries in every layer."""
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE[dtype])
    torch.testing.assert_close(torch.from_numpy(found[1]), torch.from_numpy(expected[1]), **TOLERANCE[dtype])
    assert np.array_equal(found[2], expected[2])
    assert found[3].lengths() == expected[3].lengths()
    assert found[3].get_seq_length() == expected[3].get_seq_length()


@every_decoder
@every_family
@pytest.mark.parametrize("near", [0.0, 0.5, 0.9])
def test_fast_equals_stock(variant, decoder, near):
    """Prefill and decode, at loads from all to few; past the sliding window too."""
    model, ids = mod_model(variant), tokens(1, 40)
    p = safe_threshold(model, ids, near) if near else 0.0
    same(run(fast(model, decoder), model, ids[0], 25, p), run(Stock(model, "test"), model, ids[0], 25, p))


@every_decoder
@pytest.mark.parametrize("variant", ["llama", "qwen2-window"])
def test_fast_equals_stock_in_bf16(variant, decoder):
    """Within the tolerance of the type, every token running."""
    model, ids = mod_model(variant, dtype=torch.bfloat16), tokens(1, 40)
    same(
        run(fast(model, decoder), model, ids[0], 25, 0.0), run(Stock(model, "test"), model, ids[0], 25, 0.0),
        torch.bfloat16,
    )


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("anchors", [0, 3])
def test_a_routed_last_layer_gives_the_last_tokens_result(variant, anchors, monkeypatch):
    """Whether that token runs there or not, in chunks too; what follows finds all keys and values."""
    model, ids = mod_model(variant, MoDConfig(layers=(1, DEPTH - 1), anchors=anchors)), tokens(1, 40)
    ended = set()
    for p in (0.0, safe_threshold(model, ids), *([1.0] if anchors else [])):  # some entries in every layer
        for length in range(22, 29, 2 if p == 0.0 else 1):
            some = ids[0, : length + 2]
            expected = run(Stock(model, "test"), model, some, length, p)
            ended.add(bool(expected[2][-1, length - 1]))
            for decoder, size in itertools.product(DECODERS, (7, 100)):
                with monkeypatch.context() as chunked:
                    chunked.setattr(base, "CHUNK", size)
                    same(run(fast(model, decoder), model, some, length, p), expected)
    assert ended == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_head_is_the_model_s(dtype):
    """Norm and vocabulary, of one row and of several."""
    model, noise = mod_model("llama", dtype=dtype), torch.Generator().manual_seed(0)
    for rows in (1, 5):
        x = torch.randn(rows, model.config.hidden_size, generator=noise).to(dtype)
        found = fast(model).native.head(x)
        assert found.dtype == torch.float32
        assert_close(found.to(dtype), model.lm_head(model.model.norm(x)))


def test_rows_that_grow_at_unlike_times_are_each_what_they_are_alone():
    """Bit for bit, over enough steps for all to grow; bytes are those that a count finds."""
    model, lengths = mod_model("llama"), (5, 37, 90)
    executor, given = fast(model), tokens(1, 60)[0].tolist()
    caches, alone = ([model.new_cache() for _ in lengths] for _ in range(2))
    for row, length in enumerate(lengths):
        for cache in (caches[row], alone[row]):
            executor.prefill(tokens(1, length, seed=row)[0], cache, 0.5)
    for token in given:
        found = executor.decode([token] * 3, caches, [0.5] * 3)
        for row, cache in enumerate(alone):
            assert torch.equal(found.logits[row], executor.decode([token], [cache], [0.5]).logits[0])
    for cache in caches:
        kept, cache.sizes = cache.nbytes(), None
        assert cache.nbytes() == kept


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window"])
def test_decoding_goes_on_after_a_step_back(variant):
    """Tokens taken back are run again as if they had not been."""
    model, ids = mod_model(variant), tokens(1, 60)[0]
    executor, cache, other = fast(model), model.new_cache(), model.new_cache()
    executor.prefill(ids[:20], cache, 0.5)
    for token in ids[20:50].tolist():
        executor.decode([token], [cache], [0.5])
    cache.crop(-6)
    executor.prefill(ids[:20], other, 0.5)
    for token in ids[20:44].tolist():
        executor.decode([token], [other], [0.5])
    for token in ids[44:].tolist():
        found, expected = (executor.decode([token], [one], [0.5]) for one in (cache, other))
        assert torch.equal(found.logits, expected.logits)


def test_rope_that_is_changed_is_noticed():
    """Frequencies changed in place, as some do for longer contexts: the kernels take the new ones."""
    model, ids = mod_model("llama"), tokens(1, 30)
    before = executor_of(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert executor_of(model) is not before
    same(run(executor_of(model), model, ids[0], 20, 0.0), run(Stock(model, "test"), model, ids[0], 20, 0.0))


def test_two_rows_with_one_cache_are_refused():
    """They would be written to the same place."""
    model = mod_model("llama")
    cache, executor = model.new_cache(), fast(model)
    executor.prefill(tokens(1, 9)[0], cache, 0.0)
    with pytest.raises(ValueError, match="each its own"):
        executor.decode([1, 2], [cache, cache], [0.0, 0.0])


def test_kernels_write_no_entry_amid_those_of_another_type():
    """A cache that was filled in float32 is refused in bfloat16, and left as it was."""
    model, ids = mod_model("llama"), tokens(1, 20)[0]
    cache = model.new_cache()
    fast(model).prefill(ids, cache, 0.0)
    before = cache.lengths()
    with pytest.raises(ValueError, match="keys of another type"):
        fast(mod_model("llama", dtype=torch.bfloat16)).decode([1], [cache], [0.0])
    assert cache.lengths() == before


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_kernels_read_no_token_that_is_not_there(token):
    """It is named, and the cache left as it was."""
    model, ids = mod_model("llama"), tokens(1, 20)[0]
    cache = model.new_cache()
    executor = fast(model)
    executor.prefill(ids, cache, 0.0)
    with pytest.raises(IndexError, match=str(token)):
        executor.decode([token], [cache], [0.0])
    assert cache.get_seq_length() == 20


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (8, 8)]), head=st.sampled_from([8, 16, 24, 64, 80, 128]),
    width=st.sampled_from([24, 48, 72, 168]), inner=st.sampled_from([24, 37, 96]), rows=st.integers(1, 10),
    threads=st.integers(1, 4), seed=st.integers(0, 9),
)
@example(heads=(4, 2), head=64, width=48, inner=96, rows=9, threads=3, seed=0)
@settings(max_examples=40)
def test_kernels_are_the_torch_arithmetic(heads, head, width, inner, rows, threads, seed):
    """Any widths, head counts, rows of unlike lengths and threads: each row as in torch, alone."""
    model = mod_model(
        "llama", seed=seed, hidden_size=width, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        head_dim=head, intermediate_size=inner, attention_bias=bool(seed % 2),
    )
    by_kernels, by_torch = fast(model), fast(model, "torch")
    prompts = [tokens(1, 3 + 7 * row, seed=row)[0] for row in range(rows)]
    caches, alone = ([model.new_cache() for _ in prompts] for _ in range(2))
    for at, prompt in enumerate(prompts):
        by_kernels.prefill(prompt, caches[at], 0.0)
        by_torch.prefill(prompt, alone[at], 0.0)
    with threads_set(threads):
        found = by_kernels.decode(list(range(rows)), caches, [0.0] * rows)
    for row in range(rows):
        expected = by_torch.decode([row], [alone[row]], [0.0])
        scale = expected.logits.abs().max()  # wide models have logits above the order of 1 that tolerances are for
        assert_close(found.logits[row] / scale, expected.logits[0] / scale)
        keys = [cache.layers[1].row().keys for cache in (caches[row], alone[row])]
        assert_close(*keys)


@given(
    heads=st.sampled_from([(2, 1), (6, 3)]), head=st.sampled_from([8, 64]), width=st.sampled_from([48, 72]),
    inner=st.sampled_from([37, 96]), half=st.booleans(), threads=st.integers(1, 4), seed=st.integers(0, 9),
    lengths=st.lists(st.integers(1, 700), min_size=2, max_size=10),
)
@settings(max_examples=25)
def test_a_row_gets_the_same_bits_whoever_shares_its_batch(heads, head, width, inner, half, threads, seed, lengths):
    """So that a user's text does not depend on who else writes; nor on the number of threads."""
    model = mod_model(
        "llama", seed=seed, dtype=torch.bfloat16 if half else torch.float32, hidden_size=width, head_dim=head,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], intermediate_size=inner,
        max_position_embeddings=1024,
    )
    executor, thresholds = fast(model), [0.0, 0.9] * 5
    caches = [[model.new_cache() for _ in lengths] for _ in range(2)]
    for at, length in enumerate(lengths):
        for cache in (caches[0][at], caches[1][at]):
            executor.prefill(tokens(1, length, seed=at)[0], cache, 0.0)
    rows = range(len(lengths))
    with threads_set(threads):
        together = executor.decode(list(rows), caches[0], thresholds[: len(rows)])
    for row in rows:
        alone = executor.decode([row], [caches[1][row]], [thresholds[row]])
        assert torch.equal(together.logits[row], alone.logits[0])
        assert np.array_equal(together.scores[:, row], alone.scores[:, 0])


def test_long_rows_are_split_over_threads_and_joined():
    """Heads whose keys fall to several threads, over many blocks of keys."""
    model, ids = mod_model("llama", max_position_embeddings=2048), tokens(1, 901)
    expected = run(fast(model, "torch"), model, ids[0], 900, 0.0)
    for threads in (1, 2, 3, 5):
        with threads_set(threads):
            same(run(fast(model), model, ids[0], 900, 0.0), expected)


@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_without_routers_it_is_the_dense_parent(variant):
    """The same weights, no decisions: what a bench calls the dense engine."""
    model, ids = mod_model(variant), tokens(1, 30)
    cache = RaggedCache(model.windows, (), model.new_cache().entry_bytes)
    logits, scores, routed, _ = run(fast_executor(model, routed=False), model, ids[0], 20, 0.5, cache)
    assert_close(logits, dense_twin(model)(ids).logits[0, 19:])
    assert scores.shape == routed.shape == (0, 30)


@pytest.mark.parametrize("how", ["native", "torch", "stock"])
def test_the_default_type_changes_nothing(how):
    """Loading a model sets torch's default type for the whole process; runs of others go on meanwhile."""
    model = mod_model("llama")
    executor = Stock(model, "test") if how == "stock" else fast(model, how)

    def made():
        cache = model.new_cache()
        first = executor.prefill(tokens(1, 9)[0], cache, 0.5)
        later = [executor.decode([token], [cache], [0.5]) for token in (3, 5, 7)]
        return [(one.logits.clone(), one.scores, one.routed) for one in (first, *later)]

    before = made()
    torch.set_default_dtype(torch.bfloat16)
    try:
        during = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for (logits, scores, routed), (again, scores_again, routed_again) in zip(before, during, strict=True):
        assert torch.equal(logits, again)
        assert np.array_equal(scores, scores_again)
        assert np.array_equal(routed, routed_again)


def test_torch_compile_changes_nothing():
    """The path for CUDA, on a CPU."""
    model, ids = mod_model("llama"), tokens(1, 12)
    p = safe_threshold(model, ids)
    same(run(fast(model, "torch", compiled=True), model, ids[0], 8, p), run(fast(model, "torch"), model, ids[0], 8, p))


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gpt2"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_prompt_in_chunks_is_the_prompt_at_once(variant, size, monkeypatch):
    """Whatever the chunk."""
    model, ids = mod_model(variant), tokens(1, 30)
    executor, p = choose(model), safe_threshold(model, ids)
    whole = run(executor, model, ids[0], 30, p)
    monkeypatch.setattr(base, "CHUNK", size)
    same(run(executor, model, ids[0], 30, p), whole)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_pieces_is_the_layer_at_once(variant, dtype, monkeypatch):
    """However few tokens go through its products together, to however many they are filled up, and whichever way."""
    model, ids = mod_model(variant, dtype=dtype), tokens(1, 60)
    p = safe_threshold(model, ids) if dtype == torch.float32 else 0.0
    expected = run(Stock(model, "test"), model, ids[0], 50, p)
    for direct, size in itertools.product((False, True), (1, 3, 16)):
        monkeypatch.setattr(executing, "direct_pays", lambda kind, direct=direct: direct)
        monkeypatch.setattr(executing, "PIECE", size)
        same(run(fast(model), model, ids[0], 50, p), expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "decoder", "few"),
    [(torch.float32, "native", True), (torch.bfloat16, "torch", True), (torch.bfloat16, "native", False)],
)
def test_few_numbers_of_rows_occur(dtype, decoder, few, monkeypatch):
    """Where oneDNN compiles products for each of them, and keeps these; our own products take any number as it is."""
    monkeypatch.setattr(executing, "direct_pays", lambda kind: True)
    executor = fast(mod_model("llama", dtype=dtype), decoder)
    x, counts = torch.arange(4096.0)[:, None], set()
    for count in range(1, 2049):
        for chosen in (None, torch.arange(1, 2 * count, 2)):
            pieces = executor._pieces(count, chosen)
            rows = [piece.of(x) for piece in pieces]
            counts |= {len(part) for part in rows}
            taken = torch.cat([part[: piece.count] for piece, part in zip(pieces, rows, strict=True)])
            assert taken.equal(x[:count] if chosen is None else x[chosen])
            for piece, part in zip(pieces, rows, strict=True):
                assert piece.count <= len(part) <= piece.count * (9 / 8 if few else 1)
                assert piece.count <= executing.PIECE
    assert (len(counts) <= 64) == few


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gpt2"])
def test_a_batch_is_each_row_alone(variant):
    """Prompts of unlike lengths, a threshold each, sampled; every step of every row."""
    model = mod_model(variant)
    prompts, p = [tokens(1, length, seed=length)[0] for length in (3, 17, 8)], [0.2, 0.5, 0.8]
    options = {"max_new_tokens": 6, "temperature": 0.8, "seed": 5}
    together = [[], [], []]
    for row, step in generate_batch(model, prompts, p=p, **options):
        together[row].append(step)
    for row, prompt in enumerate(prompts):
        alone = list(generate(model, prompt, p=p[row], **options))
        assert [step.tokens.tolist() for step in together[row]] == [step.tokens.tolist() for step in alone]
        assert [step.kv_stored for step in together[row]] == [step.kv_stored for step in alone]
        assert all(np.array_equal(a.routed, b.routed) for a, b in zip(together[row], alone, strict=True))


def test_rows_of_a_batch_end_by_themselves():
    """A row that meets its stop token leaves; the others go on."""
    model = mod_model("llama")
    prompts = [tokens(1, 6, seed=seed)[0] for seed in range(3)]
    alone = [[step.token for step in generate(model, prompt, p=0.5, max_new_tokens=9)][1:] for prompt in prompts]
    stop = alone[1][2]
    made = [[], [], []]
    for row, step in generate_batch(model, prompts, p=0.5, max_new_tokens=9, stop=[stop]):
        if not step.prefill:
            made[row].append(step.token)
    for row, tokens_alone in enumerate(alone):
        end = tokens_alone.index(stop) + 1 if stop in tokens_alone else 9
        assert made[row] == tokens_alone[:end]
    assert len(made[1]) == alone[1].index(stop) + 1


@pytest.mark.parametrize("p", [[0.5], [0.5, 0.5, 0.5], [0.5, 1.5]])
def test_a_batch_refuses_thresholds_that_do_not_fit(p):
    """At the call itself."""
    with pytest.raises(ValueError, match=r"for a batch of 2|from 0 to 1"):
        generate_batch(mod_model("llama"), [tokens(1, 4)[0]] * 2, p=p, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompts is empty"):
        generate_batch(mod_model("llama"), [], p=0.5, max_new_tokens=2)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2"])
def test_a_kept_cache_saves_the_prefix(variant):
    """A chat's next turn runs its new tokens alone and goes on as if all had been run."""
    model = mod_model(variant)
    cache = model.new_cache()
    first = list(generate(model, tokens(1, 9), p=0.4, max_new_tokens=5, cache=cache))
    held = [token for step in first for token in step.tokens.tolist()]
    assert cache.tokens == held
    longer = [*held, 3, 1, 4]
    again = list(generate(model, longer, p=0.4, max_new_tokens=5, cache=cache))
    fresh = list(generate(model, longer, p=0.4, max_new_tokens=5))
    assert again[0].tokens.tolist() == [3, 1, 4]
    assert [step.token for step in again[1:]] == [step.token for step in fresh[1:]]
    assert again[-1].kv_stored == fresh[-1].kv_stored


@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_a_kept_cache_is_cut_back_where_the_prompt_differs(variant):
    """An edited message; a window that has moved on is begun anew."""
    model = mod_model(variant)
    cache = model.new_cache()
    ids = tokens(1, 60)[0].tolist()
    list(generate(model, ids, p=0.4, max_new_tokens=2, cache=cache))
    edited = [*ids[:20], 7, 8, 9]
    again = list(generate(model, edited, p=0.4, max_new_tokens=5, cache=cache))
    fresh = list(generate(model, edited, p=0.4, max_new_tokens=5))
    assert again[0].tokens.tolist() == (edited if variant == "mistral-window" else [7, 8, 9])
    assert [step.token for step in again[1:]] == [step.token for step in fresh[1:]]
    assert again[-1].kv_stored == fresh[-1].kv_stored


def test_a_prompt_held_whole_runs_its_last_token_again():
    """Its logits are needed."""
    model = mod_model("llama")
    cache, ids = model.new_cache(), tokens(1, 9)[0].tolist()
    for _ in range(2):
        steps = list(generate(model, ids, p=0.4, max_new_tokens=3, cache=cache))
    assert steps[0].tokens.tolist() == ids[-1:]
    fresh = list(generate(model, ids, p=0.4, max_new_tokens=3))
    assert [step.token for step in steps[1:]] == [step.token for step in fresh[1:]]


def test_a_cache_that_another_call_filled_is_refused():
    """Its tokens are not known; a foreign cache class is refused too."""
    model = mod_model("llama")
    cache = model.new_cache()
    model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"another call.*new_cache"):
        generate(model, tokens(1, 8), p=0.5, max_new_tokens=2, cache=cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="belongs to another model"):
        generate(model, tokens(1, 8), p=0.5, max_new_tokens=2, cache=mod_model("llama").new_cache())
    wide = model.new_cache()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="in another dtype"):
        generate(model, tokens(1, 8), p=0.5, max_new_tokens=2, cache=wide)
    with pytest.raises(ValueError, match=r"model.new_cache\(\) makes"):
        generate(model, tokens(1, 8), p=0.5, max_new_tokens=2, cache=object())


@pytest.mark.parametrize(
    ("variant", "config", "why"),
    [
        ("gpt2", MoDConfig(), "gpt2 is not Llama-shaped"), ("gpt_neox", MoDConfig(), "not Llama-shaped"),
        ("llama", MoDConfig(kv="keep"), "kv='keep'"), ("llama", MoDConfig(gate="paper"), "gate='paper'"),
    ],
)
def test_what_the_fast_path_can_not_run_goes_the_stock_way(variant, config, why):
    """And says why."""
    executor = executor_of(mod_model(variant, config))
    assert executor.name == "stock"
    assert why in executor.note


def test_hooks_and_training_mode_go_the_stock_way():
    """A hook sees every call; training mode may drop things out."""
    model = mod_model("llama")
    assert executor_of(model).name == "fast"
    handle = model.model.layers[2].register_forward_hook(lambda *args: None)
    assert "hooks" in executor_of(model).note
    handle.remove()
    assert "training" in executor_of(model.train()).note
    assert executor_of(model.eval()).name == "fast"


def test_a_layer_that_does_more_goes_the_stock_way():
    """The logits are compared before the fast path is used: here the MLP's output is halved by a subclass."""
    model = mod_model("llama")
    layer = model.model.layers[2]
    parent = type(layer)
    body = {"forward": lambda self, x, **more: 0.5 * parent.forward(self, x, **more)}
    layer.__class__ = type(parent.__name__, (parent,), body)
    executor = executor_of(model)
    assert executor.name == "stock"
    assert "logits differ" in executor.note


def test_a_router_that_decides_another_way_goes_the_stock_way():
    """They are compared where layers are skipped too: with every gate open this one differs in nothing."""
    model = mod_model("llama")
    router = routers(model)[0]
    parent = type(router)
    router.__class__ = type(parent.__name__, (parent,), {"forward": lambda self, x: parent.forward(self, x) + 100})
    executor = executor_of(model)
    assert executor.name == "stock"
    assert "logits differ" in executor.note


@pytest.mark.parametrize("bias", [14.0, 15.5, 16.0, 16.5, 17.0, 17.3])
def test_gates_that_reach_one_stay_fast(bias):
    """There rounding tells g >= 1, and may tell it otherwise from path to path."""
    model = mod_model("llama")
    for router in routers(model):
        router.weight.mul_(10)
        router.bias.fill_(bias)
    assert executor_of(model).name == "fast"


def test_an_executor_is_kept_until_weights_move():
    """The same one at every call, another after a cast, none in a copy. Weights changed in place are seen."""
    model, ids = mod_model("llama"), tokens(1, 12)[0]
    executor = executor_of(model)
    assert executor_of(model) is executor
    assert copy.deepcopy(model).executor_slot.value is None
    model.model.layers[2].mlp.down_proj.weight.mul_(3)
    assert executor_of(model) is executor
    same(run(executor, model, ids, 6, 0.0), run(Stock(model, "test"), model, ids, 6, 0.0))
    routers(model)[0].bias.add_(1.0)
    assert executor_of(model) is not executor
    executor = executor_of(model)
    model.to(torch.bfloat16)
    assert executor_of(model) is not executor


def test_a_broken_router_lets_tokens_run():
    """NaN scores open the gate on every path."""
    model, ids = mod_model("llama"), tokens(1, 10)[0]
    routers(model)[1].weight.fill_(float("nan"))
    for decoder in DECODERS:
        found = run(fast(model, decoder), model, ids, 5, 0.5)
        assert found[2][1].all()
        assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_empties_a_kept_cache(error, monkeypatch):
    """Half a step written in some layers must not be taken for a prefix later."""
    model = mod_model("llama")
    cache, ids = model.new_cache(), tokens(1, 9)[0].tolist()
    list(generate(model, ids, p=0.4, max_new_tokens=2, cache=cache))
    steps = generate(model, [*cache.tokens, 5, 6], p=0.4, max_new_tokens=3, cache=cache)

    def interrupted(*args):
        raise error

    executor = executor_of(model)
    monkeypatch.setattr(executor, "_head", interrupted)
    with pytest.raises(error):
        next(steps)
    assert cache.get_seq_length() == 0
    assert cache.tokens == []


def test_a_dial_out_of_bounds_leaves_a_kept_cache_as_it_is():
    """Nothing was written."""
    model = mod_model("llama")
    cache = model.new_cache()
    list(generate(model, tokens(1, 9), p=0.4, max_new_tokens=2, cache=cache))
    held = list(cache.tokens)
    with pytest.raises(ValueError, match="from 0 to 1"):
        next(generate(model, held, p=lambda: 2.0, max_new_tokens=2, cache=cache))
    assert cache.tokens == held


def test_the_models_forward_goes_on_with_a_cache_of_the_executor():
    """Same tensors, ordinary ones."""
    model, ids = mod_model("llama"), tokens(1, 12)
    cache = model.new_cache()
    executor_of(model).prefill(ids[0, :8], cache, 0.4)
    rest = model(ids[:, 8:], past_key_values=cache, p=0.4).logits
    assert_close(rest, model(ids, p=0.4, use_cache=False).logits[:, 8:])


def test_scores_at_the_threshold_run_on_every_path():
    """A gate that rounds to 1 in float32 reaches p = 1."""
    model, ids = mod_model("llama"), tokens(1, 10)[0]
    for router in routers(model):
        router.weight.zero_()
        router.bias.fill_(20.0)
    for decoder in DECODERS:
        assert run(fast(model, decoder), model, ids, 5, 1.0)[2].all()


def test_layers_of_unlike_sizes_are_not_given_to_the_kernels():
    """They count on the config's sizes."""
    model = mod_model("llama")
    mlp = model.model.layers[2].mlp
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight = torch.nn.Parameter(getattr(mlp, name).weight[:32].clone())
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :32].clone())
    executor = executor_of(model)
    assert "other sizes than the config" in executor.note
    ids = tokens(1, 10)[0]
    same(run(executor, model, ids, 5, 0.0), run(Stock(model, "test"), model, ids, 5, 0.0))


@pytest.mark.parametrize("limits", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for_still_do_all_the_work(limits):
    """OpenMP may give fewer; run in a process of its own."""
    script = (
        "import sys; sys.path[:0] = ['tests', '.']; import torch, test_executor as t; from builders import *\n"
        "torch.set_grad_enabled(False); torch.set_num_threads(4); ids = tokens(1, 60)[0]\n"
        "for kind in (torch.float32, torch.bfloat16):\n"
        "    model, single = mod_model('llama', dtype=kind), mod_model('llama', dtype=kind)\n"
        "    chosen = t.choose(model); assert chosen.name == 'fast', chosen.note\n"
        "    t.same(t.run(chosen, model, ids, 50, 0.0), t.run(t.Stock(single, 'test'), single, ids, 50, 0.0), kind)\n"
        "    assert torch.get_num_threads() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, env={**os.environ, **limits}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_lower_right_causal_attention_is_the_chunk_rule():
    """What a device with fused kernels runs for a chunk over a past."""
    q, k, v = torch.randn(4, 5, 8), torch.randn(4, 12, 8), torch.randn(4, 12, 8)
    out = blocks._sdpa(q, k, v, attn_mask=blocks.causal_lower_right(5, 12))
    assert_close(out.transpose(0, 1).reshape(5, -1), blocks.attend(q, k, v))


def test_threads_share_a_model():
    """Four threads, each with its own p, get what each gets alone."""
    model = mod_model("llama")
    jobs = [(tokens(1, 5 + at, seed=at), 0.2 * at) for at in range(4)]

    def text(job):
        return [step.token for step in generate(model, job[0], p=job[1], max_new_tokens=30)]

    alone, found = [text(job) for job in jobs], [None] * 4
    workers = [
        threading.Thread(target=lambda at=at: found.__setitem__(at, text(jobs[at]))) for at in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == alone


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """An empty cache of kernels."""
    monkeypatch.setenv("MODIFICATION_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_without_a_compiler_torch_decodes(fresh_build, monkeypatch):
    """No compiler, or one that fails: said in the note, and it runs all the same."""
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    executor = choose(mod_model("llama"))
    assert executor.name == "fast"
    assert "no C++ compiler" in executor.note
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "/bin/false")
    executor = choose(mod_model("llama"))
    assert "could not be built" in executor.note
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert "could not be built" in choose(mod_model("llama")).note
    assert len(run(executor, mod_model("llama"), tokens(1, 8)[0], 4, 0.5)[0]) == 5
    assert not list(fresh_build.glob("*.so"))


def test_kernels_are_built_once(fresh_build):
    """The second process reads the file."""
    if native.library()[0] is None:
        pytest.skip("no compiler on this machine")
    made = list(fresh_build.iterdir())
    assert len(made) == 1
    before = made[0].stat().st_mtime_ns
    native.library.cache_clear()
    native.library()
    assert made[0].stat().st_mtime_ns == before


def test_quantised_weights_are_routed(tmp_path):
    """8-bit weights through the fast path in torch, routers in full precision."""
    pytest.importorskip("bitsandbytes")
    folder = save_folder(mod_model("llama", hidden_size=64, intermediate_size=64), tmp_path)
    model, _ = load(folder, quantization="8bit")
    assert executor_of(model).name == "fast"
    assert "not plain linear" in executor_of(model).note
    assert all(router.weight.dtype == torch.float32 for router in routers(model))
    steps = list(generate(model, tokens(1, 9), p=0.5, max_new_tokens=6))
    assert 0 < np.mean([step.load for step in steps]) < 1
    assert steps[-1].kv_stored < steps[-1].kv_dense


def test_a_quantisation_that_can_not_run_is_refused(tmp_path):
    """The kernel's own condition (outputs in multiples of 32 on a CPU) becomes a sentence, at loading."""
    pytest.importorskip("bitsandbytes")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("the condition is that of bitsandbytes' AVX512 kernels")
    folder = save_folder(dense_model("llama", intermediate_size=48), tmp_path)
    with pytest.raises(ValueError, match=r"4bit weights of this model can't run on cpu .*choose another"):
        load(folder, quantization="4bit")


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2"])
def test_every_executor_reads_the_dial_alike(variant):
    """Scores, decisions and tokens of a bent dial are those of the stock path, prefill and decode."""
    model, ids = mod_model(variant, MoDConfig(dial=(0.35, 0.45, 0.5, 0.62))), tokens(1, 12)
    p = safe_threshold(model, ids)
    steps = list(generate(model, ids, p=p, max_new_tokens=8))
    whole = torch.cat([ids, torch.tensor([[step.token for step in steps if not step.prefill]])], 1)
    out = model(whole, p=p, routing="masked", use_cache=False, output_router_scores=True)
    scores = torch.from_numpy(np.concatenate([step.scores for step in steps], 1))
    routed = torch.from_numpy(np.concatenate([step.routed for step in steps], 1))
    count = scores.shape[1]
    assert_close(scores, torch.cat(out.router_scores)[:, :count])
    assert torch.equal(routed, torch.cat(out.routed)[:, :count])
    unbent = mod_model(variant)(ids, p=p, output_router_scores=True)
    assert (torch.cat(unbent.router_scores) - scores[:, :12]).abs().max() > 0.05


@pytest.mark.parametrize("window", [1, 40, 700, 5000])
def test_a_window_is_looked_through_lot_by_lot(window):
    """On a CPU: over the keys that a lot of queries sees, of whatever columns are stored."""
    kept = torch.rand(1500, generator=torch.Generator().manual_seed(0)) < 0.8
    columns = kept.nonzero().squeeze(1).int()
    q, k, v = torch.randn(4, 1100, 8), torch.randn(2, len(columns), 8), torch.randn(2, len(columns), 8)
    distance = columns[-1100:, None] - columns
    seen = (distance >= 0) & (distance < window)
    wide_k, wide_v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=seen)
    assert_close(blocks.attend(q, k, v, columns, window), expected.transpose(0, 1).reshape(1100, -1))


@pytest.mark.parametrize("what", ["the compiler is gone", "kernel missing"])
def test_a_fast_path_that_fails_goes_the_stock_way(what, monkeypatch):
    """And says why; memory that runs out is told as such."""
    model = mod_model("llama")
    monkeypatch.setattr(Fast, "_chunk", Mock(side_effect=RuntimeError(what)))
    chosen = choose(model)
    assert (chosen.name, chosen.note) == ("stock", f"stock transformers layers: the fast path fails: {what}")
    monkeypatch.setattr(Fast, "_chunk", Mock(side_effect=MemoryError()))
    with pytest.raises(MemoryError):
        choose(model)


def test_a_layer_whose_forward_was_replaced_goes_the_stock_way():
    """On the instance, as some kernel libraries do it; also after a first generation."""
    model = mod_model("llama")
    assert executor_of(model).name == "fast"
    model.model.layers[0].mlp.forward = lambda x: x
    assert executor_of(model).name == "stock"
