"""Estimated activations against what torch's allocator was asked for, and chunks of prompts that keep them bounded."""

from __future__ import annotations

import pytest
import torch
from builders import DEPTH, assert_close, mod_model, tokens
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from modification import MoDConfig
from modification.executor import base, blocks
from modification.executor.base import Stock, stock_chunk
from modification.executor.choose import fast_executor
from modification.measure.activations import fast_bytes, stock_bytes
from modification.measure.cost import ModelShape
from modification.measure.estimate import estimate
from modification.measure.onpaper import on_paper

# What attention kernels take for themselves, whatever the model's size.
SCRATCH = 1.3e6
TOKENS = 2500  # a whole chunk and a part of one
SIZES = {"hidden_size": 256, "max_position_embeddings": 4096, "num_hidden_layers": 3}


def peak(work):
    """Most bytes that torch's CPU allocator had given out at once, above what it had at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(("variant", "sizes"), [
    ("phi3", {**SIZES, "intermediate_size": 1024}),
    ("mistral-window", {**SIZES, "intermediate_size": 1024, "sliding_window": 300}),
    ("gemma2-window", {**SIZES, "num_hidden_layers": DEPTH, "head_dim": 64}),
    ("gpt2", {"n_embd": 256, "n_positions": 4096, "n_inner": 1024, "n_layer": 3}),
    ("bloom", {"hidden_size": 256, "n_layer": 3}),
    ("falcon-alibi", {**SIZES, "ffn_hidden_size": 1024}),
    ("mixtral", {**SIZES, "intermediate_size": 512}),
    ("qwen2_moe", {**SIZES, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 256}),
])
def test_estimated_activations_are_what_the_allocator_gives_the_stock_layers(variant, sizes):
    """Families that run there, and a Llama-shaped one: at p = 0, at which every layer has every token."""
    model = mod_model(variant, **sizes)
    run, cache = Stock(model, "as asked"), model.new_cache()
    found = peak(lambda: run.prefill(tokens(1, TOKENS)[0], cache, 0.0))
    told = estimate_of(model, TOKENS)
    assert abs(found - told) <= 0.02 * found + SCRATCH, (found, told)


def as_on_a_gpu(model):
    """The fast executor, a chunk going whole through plain products."""
    run = fast_executor(model)
    run.native, run.on_cpu, run.rounded = None, False, False
    for block in run.blocks:
        block.direct = False
    return run


@pytest.mark.parametrize(("variant", "dtype", "sizes"), [
    ("llama", torch.float32, {**SIZES, "intermediate_size": 1024}),
    ("llama", torch.bfloat16, {**SIZES, "intermediate_size": 1024}),
    ("mistral", torch.float32, {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}),
    ("qwen3", torch.bfloat16, {
        **SIZES, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    }),
])
def test_estimated_activations_are_what_the_allocator_gives_the_fast_executor(variant, dtype, sizes):
    """As a GPU runs it, a chunk whole; keys and values lie in rooms of their own, which are not the allocator's."""
    model = mod_model(variant, dtype=dtype, **sizes)
    run = as_on_a_gpu(model)
    run.prefill(tokens(1, 50)[0], model.new_cache(), 0.0)
    shape = ModelShape.of(model)
    for p in (0.0, 0.02, 0.5):
        done = []
        found = peak(lambda p=p, done=done: done.append(run.prefill(tokens(1, TOKENS)[0], model.new_cache(), p)))
        load = float(done[0].routed[:, : base.CHUNK].mean(1).max())
        told = fast_bytes(model.config, shape, TOKENS, dtype.itemsize, load)
        assert found == pytest.approx(told, rel=0.02), (p, load, found, told)


def test_a_mask_of_a_sliding_window_is_in_the_estimate(monkeypatch):
    """A GPU's attention takes one for a whole chunk, and adds it to scores; a CPU's goes some queries at a time."""
    sizes = {**SIZES, "intermediate_size": 256, "sliding_window": 600}
    model = mod_model("mistral-window", **sizes)
    run = as_on_a_gpu(model)
    monkeypatch.setattr(
        blocks, "_through_window",
        lambda q, k, v, columns, window: blocks._sdpa(
            q, k, v, attn_mask=blocks._visible(columns[-q.shape[1] :], columns, window)
        ),
    )
    cache = model.new_cache()
    run.prefill(tokens(1, TOKENS)[0], cache, 0.0)
    found = peak(lambda: run.prefill(tokens(1, base.CHUNK)[0], cache, 0.0))
    told = fast_bytes(model.config, ModelShape.of(model), 2 * TOKENS, 4)
    assert found == pytest.approx(told, rel=0.02), (found, told)


def estimate_of(model, context):
    """The stock layers' share of the estimate: no buffers that grow."""
    return stock_bytes(on_paper(model.config), context, torch.float32)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_however_long_the_context_activations_are_bounded(kernel):
    """Chunks get shorter as masks and scores get wider; grouped keys are copied for all heads, and that grows."""
    config = AutoConfig.for_model(
        "olmo2", hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, vocab_size=1000,
        max_position_embeddings=200_000, attn_implementation=kernel,
    )
    short, long = (estimate(config, context=context, load=0.5) for context in (8192, 131_072))
    assert long.mod.kv > 15 * short.mod.kv
    keys = 2 * 131_072 * 512 * 2
    assert long.mod.activations < 1.5 * short.mod.activations + keys


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_chunks_that_get_shorter_give_the_same_logits(kernel, monkeypatch):
    """Against the whole prompt at once."""
    monkeypatch.setattr(base, "CHUNK", 8)
    model, ids = mod_model("olmo2", kernel=kernel), tokens(1, 60)[0]
    run, cache = Stock(model, "as asked"), model.new_cache()
    parts = list(run.chunks(ids, cache, 0.0))
    sizes = [part.routed.shape[1] for part in parts]
    assert sizes[0] == 8 > sizes[-2] >= 1
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sum(sizes) == len(ids)
    assert_close(parts[-1].logits[0], model(ids[None], p=0.0).logits[0, -1])


def test_a_sliding_window_keeps_chunks_long():
    """Layers that look back by so much alone meet no more keys, however long the text."""
    assert stock_chunk(100_000, (512, 512), "eager") == stock_chunk(512, (512, 512), "eager") > 1700
    assert stock_chunk(100_000, (512, None), "eager") < 50
    assert stock_chunk(0, (None,), "eager") == base.CHUNK


def test_layers_that_can_not_be_followed_are_told():
    """Mixtures that ask for the number of tokens of each expert have none on paper."""
    config = AutoConfig.for_model("jetmoe", hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8,
                                  intermediate_size=48, vocab_size=97)
    with pytest.raises(ValueError, match="jetmoe can't be followed on paper"):
        estimate(config, context=100)


def test_any_context_is_estimated_at_once():
    """Chunks of a token each are not looked at one by one; and a model that keeps what it skips is refused."""
    config = mod_model("olmo2").config
    assert estimate(config, context=50_000_000).mod.activations > 0
    with pytest.raises(ValueError, match="kv='keep'"):
        estimate(mod_model("olmo2", MoDConfig(kv="keep")).config, context=100)
