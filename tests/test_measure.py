"""Cost formulas, estimates, the bench and memory: counted work equals real work, on paper equals in memory."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import DEPTH, VOCABULARY, dense_model, mod_model, routers, save_folder, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from modification import MoDConfig, convert, generate, room
from modification.cli import main, measuring
from modification.executor import Stock, base, executor_of
from modification.executor.blocks import blocks_of
from modification.executor.fast import Fast
from modification.measure import bench as bench_module
from modification.measure import speed
from modification.measure.bench import bench, dense_twin, random_pair
from modification.measure.benchwords import missed, table, unsteady
from modification.measure.cost import CostMeter, ModelShape
from modification.measure.estimate import devices, estimate
from modification.measure.memory import Peak, trim
from modification.measure.onpaper import config_of, own_layers
from modification.measure.presets import preset, presets
from modification.measure.speed import Work, threshold_for, time_bare, time_engine, time_stock
from modification.trace import Step

CPU = torch.device("cpu")


def wide_model(layers="inner"):
    """Matrices of unlike sizes; attention in plain products, which torch's counter sees."""
    return mod_model(
        "llama", MoDConfig(layers=layers), hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, kernel="eager",
    )


def hidden_half(shape, counts):
    """FLOPs of the pairs that plain attention multiplies and then masks: later keys, never counted as work."""
    return sum(4 * (n * n - n * (n + 1) // 2) * shape.attention_width for n in counts)


@pytest.mark.parametrize("p", [0.0, 0.4, 0.7])
def test_prefill_flops_are_those_torch_counts(p):
    """Within 2%: the prompt's matrix products and attention, head for one token."""
    model, ids = wide_model(), tokens(1, 200)
    shape = ModelShape.of(model)
    with FlopCounterMode(display=False) as counter:
        done = Stock(model, "test").prefill(ids[0], model.new_cache(), p)
    ran = done.routed.sum(1).tolist()
    counted = shape.prefill_flops(200, ran) + hidden_half(shape, [200, 200, *ran])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("p", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("layers", ["inner", [0, DEPTH - 1]])
def test_prefill_flops_of_a_short_end_are_those_torch_counts(p, layers):
    """Within 2%: the fast executor's last layer makes keys and values, and the last token's result alone."""
    model, ids = wide_model(layers=layers), tokens(1, 200)
    blocks = blocks_of(model)
    executor, shape = Fast(model, blocks, None, "test"), ModelShape.of(model)
    executor.rounded = False
    for block in blocks:
        block.direct = False  # plain products, which torch's counter sees
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        done = executor.prefill(ids[0], model.new_cache(), p)
    ran = done.routed.sum(1).tolist()
    counts = dict.fromkeys(range(DEPTH), 200) | dict(zip(model.mod_layers, ran, strict=True))
    del counts[DEPTH - 1]  # its last token sees all that is stored
    end = float(done.routed[-1, -1]) if DEPTH - 1 in model.mod_layers else 1.0
    counted = shape.prefill_flops(200, ran, end) + hidden_half(shape, counts.values())
    assert executor.short_end
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_dense_flops_are_those_torch_counts():
    """The same for a dense parent."""
    model, ids = wide_model(), tokens(1, 200)
    shape, dense = ModelShape.of(model), dense_twin(model)
    with FlopCounterMode(display=False) as counter:
        dense(ids, logits_to_keep=1)
    counted = shape.prefill_flops(200) + hidden_half(shape, [200] * DEPTH)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_metered_decode_steps_are_those_torch_counts():
    """Within 2%, over steps of which each runs some of the layers: what the meter adds is what was computed."""
    model, ids = wide_model(), tokens(1, 120)[0]
    cache, stock, meter = model.new_cache(), Stock(model, "test"), CostMeter(ModelShape.of(model))
    done = stock.prefill(ids[:100], cache, 0.5)
    meter.add(step_of(ids[:100], done))
    before, routed = meter.routed, []
    with FlopCounterMode(display=False) as counter:
        for token in ids[100:]:
            done = stock.decode([int(token)], [cache], [0.5])
            meter.add(step_of(token[None], done))
            routed.append(done.routed)
    assert 0.2 < np.mean(routed) < 0.8
    assert meter.routed - before == pytest.approx(counter.get_total_flops(), rel=0.02)


def step_of(ids, done):
    """An executor's pass over one row's tokens, as a stream tells it."""
    return Step(ids.numpy(), np.zeros(len(ids), np.float32), done.scores, done.routed, 0.5, 0, 0, 0, 0.1)


@pytest.mark.parametrize("load", [None, 1.0])
def test_estimated_decode_steps_are_those_torch_counts(load):
    """Within 2%: FLOPs of one token after 199, and the bytes that a step of as many entries reads."""
    model, ids = wide_model(), tokens(1, 200)
    cache, side = model.new_cache(), "dense" if load is None else "mod"
    Stock(model, "test").prefill(ids[0, :199], cache, 0.0)
    with FlopCounterMode(display=False) as counter:
        Stock(model, "test").decode([int(ids[0, 199])], [cache], [0.0])
    found = getattr(estimate(model.config, context=200, load=load or 0.5, dtype=torch.float32), side)
    assert found.decode_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    entries = np.full((DEPTH, 1), 200)
    ran = None if load is None else np.ones((len(model.mod_layers), 1), bool)
    assert found.decode_bytes == pytest.approx(ModelShape.of(model).decode_bytes(4, entries, ran), rel=0.02)


def test_decode_bytes_by_hand():
    """Two layers, one of them routed; two rows of which one runs there."""
    shape = ModelShape(
        2, (1,), layer_weights=(100,) * 2, head_weights=50, attention_width=8, router_weights=10, entry_width=4
    )
    entries, ran = np.array([[5, 7], [2, 3]]), np.array([[True, False]])
    assert shape.decode_bytes(2, entries) == 2 * (2 * 100 + 50 + (5 + 7 + 2 + 3) * 4)
    assert shape.decode_bytes(2, entries, ran) == 2 * (2 * 100 + 50 + (5 + 7 + 2) * 4) + 4 * 10
    assert shape.decode_bytes(2, entries, ~ran | ran, layer_bytes=[(30, 0)] * 2) == 2 * 30 + 2 * (50 + 17 * 4) + 4 * 10
    none = shape.decode_bytes(2, entries, np.array([[False, False]]))
    assert none == 2 * (100 + 50 + (5 + 7) * 4) + 4 * 10


def reported(work):
    """What comes of ``work()``, and the bytes that torch's allocator has given for it and not got back."""
    with torch.profiler.profile(profile_memory=True) as seen:
        made = work()
    return made, sum(event.self_cpu_memory_usage for event in seen.key_averages())


def in_rooms(work):
    """What comes of ``work()``, and the bytes that Python's allocator has given for a cache's rooms in it."""
    tracemalloc.start()
    try:
        made = work()
        held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, room.__file__)])
    finally:
        tracemalloc.stop()
    return made, sum(trace.size for trace in held.traces)


def test_estimates_are_what_the_allocator_reports(monkeypatch):
    """Within 2%: weights, and keys and values at the load that was reached."""
    monkeypatch.setattr(room, "MAPPED", 1 << 60)  # rooms from Python's allocator, which is asked here
    model = mod_model("llama", max_position_embeddings=2048)
    executor, ids = executor_of(model), tokens(1, 1500)[0]
    executor.prefill(ids[:64], model.new_cache(), 0.5)  # what is made once

    def work():
        cache = model.new_cache()
        return cache, float(executor.prefill(ids, cache, 0.5).routed.mean())

    (cache, load), taken = in_rooms(work)
    found = estimate(model.config, context=1500, load=load, dtype=torch.float32)
    assert taken == pytest.approx(cache.nbytes().allocated, rel=0.02)
    assert found.mod.kv == pytest.approx(taken, rel=0.02)
    _, taken = reported(lambda: copy.deepcopy(model))
    assert found.mod.weights == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_estimated_weights_and_entries_are_the_real_ones(variant):
    """Within 2%: parameters of the model; entries stored and allocated by a cache at the load that was reached."""
    model = mod_model(variant)
    cache = model.new_cache()
    done = Stock(model, "test").prefill(tokens(1, 200)[0], cache, 0.5)
    found = estimate(model.config, context=200, load=float(done.routed.mean()), dtype=torch.float32)
    parameters = sum(p.nbytes for p in model.parameters())
    assert found.mod.weights == pytest.approx(parameters, rel=0.02)
    dense = sum(p.nbytes for p in dense_twin(model).parameters())
    assert found.dense.weights == dense
    assert found.dense.kv == cache.nbytes().dense
    assert found.mod.kv == pytest.approx(cache.nbytes().stored * (1 + 1 / 16), rel=0.02)
    assert found.mod.kv == pytest.approx(cache.nbytes().allocated, rel=0.02)
    assert found.mod_layers == model.mod_layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360), ("mistral-7b", 7_248_023_552),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    """To the parameter."""
    assert estimate(preset(name), context=16).dense.weights == 2 * parameters


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_be_estimated(name):
    """Less load, less of everything; at load 1 a MoD model costs what its parent does."""
    config = config_of(name)
    full, half = (estimate(config, context=2048, load=load) for load in (1.0, 0.5))
    assert half.mod.kv < half.dense.kv
    for part in ("prefill_flops", "decode_flops", "decode_bytes"):
        assert getattr(half.mod, part) < getattr(half.dense, part)
        assert getattr(full.mod, part) == pytest.approx(getattr(full.dense, part), rel=0.04)
    assert half.speed_up(64) > 1


def test_a_batch_reads_more_layers_than_a_row():
    """A layer's weights are read when any row runs it, so sixteen rows save less weight traffic than one."""
    config = preset("llama-2-7b")
    one, many = (estimate(config, context=16, batch=batch, load=0.5) for batch in (1, 16))
    assert one.dense.decode_bytes / one.mod.decode_bytes > many.dense.decode_bytes / many.mod.decode_bytes
    assert many.dense.decode_bytes / many.mod.decode_bytes == pytest.approx(1, abs=0.02)


def test_the_paper_table_is_reproduced():
    """Llama-2 7B, half load in the inner layers: 1.8x less keys and values and less than 2x of them."""
    found = estimate(preset("llama-2-7b"), context=4096, batch=16, load=0.5, device=devices()["a100"])
    assert 1.7 < found.dense.kv / found.mod.kv < 1.9
    assert found.dense.bound == ("compute", "memory")


@pytest.mark.parametrize(
    ("options", "why"),
    [({"context": 0}, "must be 1 or more"), ({"context": 8, "batch": 0}, "1 or more"),
     ({"context": 8, "load": 1.5}, "from 0 to 1"), ({"context": 8, "layers": (40,)}, "index 40")],
)
def test_an_estimate_out_of_bounds_is_refused(options, why):
    """With the value."""
    with pytest.raises(ValueError, match=why):
        estimate(preset("llama-2-7b"), **options)


def test_estimates_of_unknown_and_expert_models_are_refused(tmp_path):
    """By name, with what there is."""
    with pytest.raises(ValueError, match=r"'llama-9'.*llama-2-7b"):
        config_of("llama-9")
    said = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 0}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="does not say how many a token meets"):
        estimate(config_of(str(tmp_path)), context=10)
    for many in (-1, 16):
        (tmp_path / "config.json").write_text(json.dumps({**said, "num_experts_per_tok": many}))
        with pytest.raises(ValueError, match=f"num_experts_per_tok={many}: a token can meet 1 to 8"):
            config_of(str(tmp_path))


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_of_experts_is_estimated(variant):
    """All its weights are held, and those that a token meets are read; with many rows, all of them."""
    model = dense_model(variant)
    alone, many = (estimate(model.config, context=64, batch=rows, load=0.5, dtype=torch.float32) for rows in (1, 999))
    assert alone.dense.weights == 4 * sum(p.numel() for p in model.parameters())
    layer = next(layer for layer in model.model.layers)
    stacked = [p for p in layer.parameters() if p.dim() == 3]
    met = model.config.num_experts_per_tok / len(stacked[0])
    idle = 4 * DEPTH * sum(p.numel() for p in stacked) * (1 - met)
    assert 0 < met < 1
    cache = 4 * 64 * DEPTH * alone_entry(model)
    assert many.dense.decode_bytes - 999 * cache - (alone.dense.decode_bytes - cache) == pytest.approx(idle, rel=0.01)
    assert alone.mod.decode_bytes < alone.dense.decode_bytes


@pytest.mark.parametrize("batch", [1, 8])
def test_steps_of_a_mixture_read_what_estimates_say(batch):
    """Every row meets experts of its own: bytes of a dense step, counted and on paper, alone and together."""
    model = mod_model("mixtral")
    shape, entries = ModelShape.of(model), np.full((DEPTH, batch), 64)
    found = estimate(model.config, context=64, batch=batch, dtype=torch.float32).dense.decode_bytes
    assert shape.decode_bytes(4, entries) == pytest.approx(found, rel=1e-3)
    as_they_are = [speed._weight_bytes(layer) for layer in model.model.layers]
    # Norms' weights are among those that lie there, and not among those counted.
    assert shape.decode_bytes(4, entries, layer_bytes=as_they_are) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(("kind", "changes", "why"), [
    ("mamba", {}, "mamba.*only full and sliding-window"),
    ("t5", {}, "encoder-decoder"),
    ("gemma3", {}, "wraps a language model"),
    ("rwkv", {}, "take no cache"),
    ("deepseek_v3", {"num_hidden_layers": 3}, "unlike widths"),
    ("nemotron", {"num_hidden_layers": 3}, "no nemotron can be made of this config"),  # its own defaults
])
def test_what_can_not_be_routed_is_not_estimated(kind, changes, why):
    """With the reason, whatever it lacks."""
    with pytest.raises(ValueError, match=why):
        estimate(AutoConfig.for_model(kind, **changes), context=10)


def test_experts_in_some_layers_are_counted_there():
    """Half of the layers have experts: prompts and estimates count each layer's own weights, as torch does."""
    model = mod_model("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4)
    shape, ids = ModelShape.of(model), tokens(1, 64)
    plain, sparse = shape.layer_weights[:2]
    assert shape.layer_weights == (plain, sparse, plain, sparse)
    assert shape.expert_weights == (0, shape.expert_weights[1]) * 2
    assert 0 < shape.expert_weights[1] < sparse
    dense = dense_twin(model)
    dense.set_attn_implementation("eager")
    dense.set_experts_implementation("eager")  # plain products, which torch's counter sees
    with FlopCounterMode(display=False) as counter:
        dense(ids, logits_to_keep=1)
    counted = shape.prefill_flops(64) + hidden_half(shape, [64] * 4)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)
    found = estimate(model.config, context=64, load=0.5, layers=[1])
    assert found.dense.weights == 2 * sum(p.numel() for p in dense.parameters())
    saved = found.dense.decode_bytes - found.mod.decode_bytes
    assert saved == pytest.approx(2 * 0.5 * sparse + 2 * 0.75 * 64 * shape.entry_width, rel=0.01)


@pytest.mark.parametrize("saved", [False, True])
def test_a_converted_model_is_estimated_as_its_parent(saved, tmp_path):
    """From memory and from a folder: no router among the dense parent's weights."""
    dense = dense_model("llama")
    expected = estimate(dense.config, context=64)
    mod = convert(dense_model("llama"), MoDConfig(layers=[1, 3]))
    config = config_of(str(save_folder(mod, tmp_path / "mod"))) if saved else mod.config
    assert own_layers(config) == (1, 3)
    assert estimate(config, context=64) == expected


def alone_entry(model):
    """Numbers in a token's keys and values in a layer."""
    return ModelShape.from_config(model.config, model.model.layers, ()).entry_width


def test_work_is_the_same_for_every_side():
    """Same seed, same ids; prompts and followers do not overlap."""
    first, second = (Work.random(VOCABULARY, 3, 10, 4, CPU) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.prompts, second.prompts, strict=True))
    assert [len(ids) for ids in first.prompts] == [10, 10, 10]
    assert first.follow.shape == (3, 4)
    ragged = Work.random(VOCABULARY, 3, 10, 4, CPU, ragged=True)
    assert [len(ids) for ids in ragged.prompts] == [10, 8, 5]
    assert torch.equal(ragged.follow, first.follow)


@pytest.mark.parametrize(("ragged", "compiled"), [(False, False), (True, False), (True, True)])
def test_stock_and_our_engine_are_given_the_same_work(ragged, compiled):
    """What stock generate says after its padded prompts is what our engine says after the bare ones."""
    parent = dense_model("llama")
    model, said = convert(dense_model("llama"), MoDConfig()), []
    work = Work.random(VOCABULARY, 3, 12, 5, CPU, ragged)
    own = parent.generate

    def heard(*args, **options):
        said.extend(own(*args, **options)[:, -6:].tolist())

    parent.generate = heard
    time_stock(parent, work, compiled)
    for ids, heard_tokens in zip(work.prompts, said, strict=True):
        steps = list(generate(model, ids[None], p=0.0, max_new_tokens=6, stop=()))
        assert [step.token for step in steps[1:]] == heard_tokens


@pytest.mark.parametrize("ragged", [False, True])
def test_a_timing_counts_what_ran(ragged):
    """Load, bytes and FLOPs of a round are those of the model's own records."""
    model = mod_model("llama")
    work = Work.random(VOCABULARY, 2, 30, 5, CPU, ragged)
    executor = Stock(model, "test")
    timing = time_engine(executor, model, work, 0.5)
    routed = [torch.cat(model(ids[None], p=0.5, output_router_scores=True).routed) for ids in work.prompts]
    assert timing.load[0] == pytest.approx(torch.cat(routed, dim=1).float().mean().item())
    whole = [torch.cat(row) for row in zip(work.prompts, work.follow, strict=True)]
    expected = sum(
        int(torch.cat(model(ids[None], p=0.5, output_router_scores=True).routed).sum()) + 2 * len(ids) for ids in whole
    )
    entry = model.new_cache().entry_bytes
    assert timing.stored == expected * entry
    assert timing.stored <= timing.allocated <= 1.1 * timing.stored
    assert 0 < timing.prefill <= timing.first_token
    assert timing.traffic < time_engine(executor, model, work, 0.0).traffic


def test_stock_is_timed_token_by_token():
    """All steps happen, whatever the end-of-sequence token."""
    model = dense_model("llama", eos_token_id=3)
    timing = time_stock(model, Work.random(VOCABULARY, 2, 20, 6, CPU))
    assert timing.prefill > 0
    assert timing.decode > 0


@pytest.mark.parametrize("load", [0.25, 0.5, 0.75])
def test_the_threshold_of_a_load_reaches_it(load):
    """On the very prompt."""
    model = mod_model("llama", max_position_embeddings=1024)
    executor, ids = Stock(model, "test"), tokens(1, 600)[0]
    p = threshold_for(load, executor, model, [ids])
    assert executor.prefill(ids, model.new_cache(), p).routed.mean() == pytest.approx(load, abs=0.05)
    assert threshold_for(1.0, executor, model, [ids]) == 0.0


def test_peak_memory_sees_what_was_in_use():
    """64 MB that are gone by the end, above what was there before."""
    before = torch.ones(1 << 20)
    with Peak(CPU) as peak:
        block = torch.ones(16 << 20)
        del block
    if peak.bytes is None:
        pytest.skip("this system has no high-water mark that can be reset")
    assert 60e6 < peak.bytes < 90e6
    assert len(before) == 1 << 20


def test_streaming_and_the_bare_executor_do_the_same_work():
    """The side without Steps differs in bookkeeping alone, so that the two can be compared."""
    model = mod_model("llama")
    work, executor = Work.random(VOCABULARY, 2, 20, 4, CPU), Stock(model, "test")
    bare = time_bare(executor, model, work, 0.0, model.mod_layers)
    assert bare.prefill > 0
    assert bare.decode > 0


def test_bench_compares_with_the_faster_dense_side():
    """Efficiency is speed-up over ideal, and both come from the figures in the table."""
    parent, model = random_pair(preset_small(), torch.float32)
    results = bench(model, parent, contexts=[24], batches=[1, 2], loads=[1, 0.5], new_tokens=4, rounds=2)
    assert [result.side for result in results] == ["stock generate", "engine, p = 0", "load 0.5"] * 2
    stock, dense, half = results[:3]
    assert half.speed_up[0] == pytest.approx(min(stock.prefill_s, dense.prefill_s) / half.prefill_s, rel=0.8)
    assert half.speed_up[1] > 0
    assert half.efficiency[0] == pytest.approx(half.speed_up[0] / half.ideal[0])
    assert half.ideal[0] > 1
    assert half.load_prompt == pytest.approx(0.5, abs=0.2)
    assert dense.load_prompt == dense.load_decode == 1
    assert dense.speed_up is None
    assert "load 0.5" in table(results)


def test_a_load_that_no_threshold_reaches_is_told():
    """Routers that score every token alike: all of them run, or none."""
    parent, model = random_pair(preset_small(), torch.float32)
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()
            router.bias.fill_(0.3)
    results = bench(model, parent, contexts=[8], batches=[1], loads=[1, 0.5], new_tokens=2, rounds=1, stock=False)
    assert abs(results[-1].load_prompt - 0.5) > 0.2
    assert len(missed(results)) == 1
    assert "load 0.5 was asked for" in missed(results)[0]
    assert not missed([dataclasses.replace(results[-1], load_prompt=0.51)])


def test_figures_that_spread_far_are_pointed_out():
    """As on a machine that others use; steady ones are not."""
    steady = {"prefill_s": 2.0, "prefill_spread": 0.4, "decode_tps": 50.0, "decode_spread": 10.0}
    parent, model = random_pair(preset_small(), torch.float32)
    result, *_ = bench(model, parent, contexts=[8], batches=[1], loads=[1], new_tokens=2, rounds=1, stock=False)
    assert not unsteady([dataclasses.replace(result, **steady)])
    (line,) = unsteady([dataclasses.replace(result, **{**steady, "decode_spread": 30.0})])
    assert "decoding of engine, p = 0 spreads by 60% of its median" in line
    assert len(unsteady([dataclasses.replace(result, **{**steady, "decode_spread": 30.0, "prefill_spread": 0.6})])) == 2


def preset_small():
    """A small Llama config."""
    return dense_model("llama").config


@pytest.mark.parametrize(
    ("change", "why"),
    [({"contexts": [0]}, "contexts"), ({"batches": [0]}, "batch"), ({"loads": [1.2]}, "loads"),
     ({"new_tokens": 0}, "new tokens"), ({"rounds": 0}, "rounds"), ({"contexts": [300]}, "at most 252")],
)
def test_a_bench_out_of_bounds_is_refused_before_it_runs(change, why):
    """Naming the value."""
    options = {"contexts": [8], "batches": [1], "loads": [1], "new_tokens": 4, "rounds": 1, **change}
    parent, model = random_pair(preset_small(), torch.float32)
    with pytest.raises(ValueError, match=why):
        bench(model, parent, **options)


def test_the_dense_twin_is_the_parent():
    """A restored copy; the MoD model stays one."""
    parent = dense_model("llama")
    model = convert(dense_model("llama"), MoDConfig())
    twin = dense_twin(model)
    assert torch.equal(twin(tokens()).logits, parent(tokens()).logits)
    assert type(model).__name__ == "MoDLlamaForCausalLM"


def test_bench_on_the_command_line(tmp_path, capsys):
    """A table, plots, a file and one JSON line at the end."""
    folder = save_folder(mod_model("llama"), tmp_path / "mod")
    argv = [
        "bench", folder, "--contexts", "8,16", "--batch", "1,2", "--load", "1,0.5", "--new-tokens", "2",
        "--rounds", "1", "--device", "cpu", "--json", tmp_path / "out.json", "--plots", tmp_path / "plots",
    ]
    assert main([str(part) for part in argv]) == 0
    out = capsys.readouterr().out.splitlines()
    last = json.loads(out[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    assert len(last["results"]) == 4 * 3
    assert last["executor"].startswith("fast")
    assert all(math.isfinite(result["decode_tps"]) for result in last["results"])
    assert any(line.startswith("| context |") for line in out)
    assert {path.name for path in (tmp_path / "plots").glob("*.html")} == {
        f"{name}-batch-{batch}.html" for name in ("speed", "efficiency") for batch in (1, 2)
    }


def test_a_mod_model_s_shape_is_benched_with_random_weights(tmp_path, capsys):
    """With its own MoD layers."""
    folder = save_folder(mod_model("llama", MoDConfig(layers=[1])), tmp_path / "mod")
    argv = ["bench", "--random", str(folder), "--contexts", "8", "--load", "0.5", "--new-tokens", "2", "--rounds", "1"]
    assert main(argv) == 0
    assert '"side": "load 0.5"' in capsys.readouterr().out.splitlines()[-1]


def test_overheads_are_told_in_percent(tmp_path, capsys):
    """From the medians, beside the sides they come from."""
    folder = save_folder(mod_model("llama"), tmp_path / "mod")
    argv = ["bench", folder, "--contexts", "8", "--load", "1", "--new-tokens", "2", "--no-stock", "--overheads"]
    assert main([str(part) for part in argv]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("context 8") and " cost " in line]
    assert len(told) == 2
    assert all("% of decoding" in line for line in told)


def test_a_dense_side_of_another_size_is_refused(tmp_path, capsys):
    """It would be compared with what it is no parent of."""
    folder = save_folder(mod_model("llama"), tmp_path / "mod")
    other = save_folder(dense_model("llama", hidden_size=64), tmp_path / "other")
    assert main(["bench", str(folder), "--dense", str(other), "--contexts", "8", "--new-tokens", "2"]) == 2
    assert "hidden_size 64, the MoD model" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "named"), [
    (["bench", "--random", "llama-10m", "--load", "2"], "loads [2.0]"),
    (["bench", "--random", "llama-10m", "--rounds", "0"], "rounds [0]"),
    (["bench", "--random", "llama-10m", "--device", "cpu:x"], "--device cpu:x"),
    (["estimate", "llama-2-7b", "--new-tokens", "-1"], "--new-tokens -1"),
])
def test_odd_numbers_are_told_before_a_model_is_made(argv, named, capsys, monkeypatch):
    """With the value."""
    monkeypatch.setattr(measuring, "random_pair", lambda *_: pytest.fail("a model was made"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert named in err
    assert not out


def test_an_estimate_says_what_it_is_of_and_what_does_not_fit(tmp_path, capsys):
    """The setting, a context beyond the model's, memory beyond the device's; nothing is divided by zero."""
    assert main(["estimate", "llama-2-70b", "--batch", "512", "--context", "131072", "--device", "rtx4090"]) == 0
    out = capsys.readouterr().out
    assert "512 x 131,072 tokens, load 0.5 in 78 of 80 layers, bf16, rtx4090" in out
    assert "more than the model's context of 4,096" in out
    assert out.count("do not fit into the device's 24 GB") == 2
    assert main(["estimate", "llama-2-7b", "--load", "0", "--layers", ",".join(map(str, range(32)))]) == 0
    assert "do not fit" not in capsys.readouterr().out
    assert main(["estimate", str(tmp_path)]) == 2
    assert "the folder has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "reason"), [
    (None, "there is no such file"), ({"hidden_size": "wide"}, "hidden_size = wide"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0"), ({"rms_norm_eps": "small"}, "rms_norm_eps.*small"),
    ({"hidden_act": "none at all"}, "none at all"), ({"num_key_value_heads": 3}, "num_key_value_heads=3: .*divisible"),
    ({"rope_scaling": {"rope_type": "foo", "rope_theta": 1e4}}, "'foo' is not known"),
])
def test_an_estimate_of_a_wrong_config_says_what_is_wrong(settings, reason, tmp_path, capsys):
    """With its name and value, whoever found it."""
    path = tmp_path / "config.json"
    if settings is not None:
        path.write_text(json.dumps({**dense_model("llama").config.to_dict(), **settings}))
    for command in (["estimate", str(path)], ["bench", "--random", str(path)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert re.search(reason, said), said
        assert "\n" not in said.strip()


def test_a_config_that_is_a_list_is_refused(tmp_path, capsys):
    """And no name at all."""
    (path := tmp_path / "config.json").write_text("[]")
    assert main(["estimate", str(path)]) == 2
    assert "is a JSON list" in capsys.readouterr().err
    assert main(["estimate", ""]) == 2
    assert "no model is named" in capsys.readouterr().err


def test_positions_that_are_looked_at_are_estimated_all_the_same():
    """RoPE that stretches with the prompt, in the stock layers: of a size that its kind doesn't change."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    settings = dense_model("llama").config.to_dict()
    del settings["model_type"], settings["rope_parameters"]
    config = AutoConfig.for_model("llama", **settings, rope_parameters=scaling)
    assert estimate(config, context=100).mod.activations > 0


def test_bench_needs_a_model_or_a_shape(tmp_path, capsys):
    """One of the two; and a file, not a folder, for its results."""
    random = ["--random", "llama-10m"]
    assert main(["bench", *random, "--json", str(tmp_path)]) == 2
    assert "is a folder: give a file" in capsys.readouterr().err
    for more in ([], ["x", *random], [*random, "--dense", "x"], [*random, "--device", "tpu"], [*random, "--load", "a"]):
        assert main(["bench", *more]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_estimate_on_the_command_line(tmp_path, capsys):
    """A table that says estimated; JSON; and a saved MoD model's own config."""
    assert main(["estimate", "llama-2-7b", "--batch", "4"]) == 0
    assert "| estimated | dense | MoD | dense / MoD |" in capsys.readouterr().out
    folder = save_folder(mod_model("llama"), Path(tmp_path) / "mod")
    assert main(["estimate", str(folder), "--context", "100", "--dtype", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["mod_layers"]) == DEPTH - 2
    assert found["dense"]["kv"] > found["mod"]["kv"]


def test_chunks_bound_activations():
    """The constant that the estimate counts on is the executors'."""
    assert bench_module.executor_of(mod_model("llama")).name == "fast"
    assert estimate(preset("llama-2-7b"), context=10 * base.CHUNK).dense.activations < (
        2 * estimate(preset("llama-2-7b"), context=base.CHUNK).dense.activations
    )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's malloc")
def test_freed_memory_below_what_is_still_used_goes_back():
    """malloc gives back the top of its heap by itself, and what lies below only when told to."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    blocks = [libc.malloc(ctypes.c_size_t(4_000)) for _ in range(20_000)]
    for block in blocks:
        ctypes.memset(block, 1, 4_000)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident()
    trim()
    assert before - resident() > 40e6
    libc.free(blocks[-1])
