"""On a GPU: the same logits, decisions and tokens as on the CPU; training and measurement run there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import ALL, FEW, assert_close, dense_model, mod_model, padded, safe_threshold, tiny_tokenizer, tokens

from modification import MoDConfig, generate, generate_batch, load
from modification.conversion.checks import Options
from modification.conversion.data import Text
from modification.conversion.recipes import named
from modification.conversion.train import train
from modification.executor import executor_of
from modification.measure.memory import Peak
from modification.measure.quality import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
LLAMA_SHAPED = ("llama", "mistral-window", "qwen2", "qwen3")


def twins(variant):
    """The same model on the CPU and on the GPU."""
    return mod_model(variant), mod_model(variant).to("cuda")


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("routing", ["gathered", "masked"])
def test_the_gpu_says_what_the_cpu_says(variant, routing):
    """One call over a padded batch: logits and decisions."""
    model, twin = twins(variant)
    batch = padded([tokens(1, length, length)[0] for length in (12, 5, 9)], "left")
    p = safe_threshold(model, tokens(3))
    expected = model(**batch, p=p, routing=routing, output_router_scores=True)
    found = twin(**{name: value.cuda() for name, value in batch.items()}, p=p, routing=routing,
                 output_router_scores=True)
    assert_close(found.logits.cpu(), expected.logits, batch["attention_mask"])
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(found.routed, expected.routed, strict=True):
        assert torch.equal(ours.cpu()[real], theirs[real])


@pytest.mark.parametrize("variant", FEW)
def test_cached_is_recomputed_there(variant):
    """Token by token with the ragged cache, or all at once."""
    _, twin = twins(variant)
    ids = tokens(2, 24).cuda()
    cache = twin.new_cache()
    p = safe_threshold(mod_model(variant), tokens(2, 24))
    pieces = [twin(ids[:, :10], past_key_values=cache, p=p).logits]
    pieces += [twin(ids[:, at : at + 1], past_key_values=cache, p=p).logits for at in range(10, 24)]
    assert_close(torch.cat(pieces, 1).cpu(), twin(ids, p=p, use_cache=False).logits.cpu())


@pytest.mark.parametrize("variant", LLAMA_SHAPED)
def test_the_fast_executor_runs_and_agrees(variant):
    """Greedy tokens, p moved in between, are the CPU's; alone and in a batch."""
    model, twin = twins(variant)
    assert executor_of(twin).name == "fast"
    prompts = [tokens(1, length, length)[0].tolist() for length in (20, 7)]

    def moving():
        yield from [0.0] * 8
        while True:
            yield 0.6

    def told(one):
        steps = moving()
        return [step.token for step in generate(one, prompts[0], p=lambda: next(steps), max_new_tokens=24)]

    assert told(twin) == told(model)
    alone = [[step.token for step in generate(twin, prompt, p=0.5, max_new_tokens=12)] for prompt in prompts]
    together = [[], []]
    for row, step in generate_batch(twin, prompts, p=0.5, max_new_tokens=12):
        together[row].append(step.token)
    assert together == alone


@pytest.mark.parametrize("compiled", [False, True])
def test_a_conversion_trains_there(compiled, gradients, tmp_path):
    """In bf16, compiled or not: the loss falls, and the saved model is the one that was measured."""
    noise = np.random.default_rng(0)
    blocks = np.stack([np.resize(noise.integers(0, 40, 5), 32) for _ in range(64)]).astype(np.int32)
    recipe = named("any-p", block=32, batch=8, tokens=60 * 8 * 32, lr=3e-3)
    rows = train(dense_model(), tiny_tokenizer(), MoDConfig(), recipe, Text(blocks, blocks[:16]), tmp_path / "out",
                 Options(compile=compiled))
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["cross_entropy"] < log[0]["cross_entropy"]
    again = evaluate(load(tmp_path / "out", dtype=torch.float32)[0], blocks[:16], 0.5)
    assert again.loss == pytest.approx(rows[5].quality.loss, abs=0.02)


def test_peak_memory_is_the_allocator_s():
    """Of what was taken meanwhile, not of what was there."""
    held = torch.zeros(1 << 20, device="cuda")
    with Peak(torch.device("cuda")) as peak:
        taken = torch.zeros(1 << 22, device="cuda")
        del taken
    assert 1 << 24 <= peak.bytes < 1.2 * (1 << 24)
    del held
