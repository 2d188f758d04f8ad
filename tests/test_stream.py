"""generate(): a stream of Steps from one prompt, with p read at every step."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from builders import ALL, assert_close, dense_model, mod_model, tokens

from modification import MoDConfig, RoutingTrace, generate
from modification.executor import executor_of, native
from modification.sampling import Sampler

every_family = pytest.mark.parametrize("variant", ALL)


def stream(model, ids=None, **options):
    """All steps of a short greedy generation."""
    settings = {"p": 0.5, "max_new_tokens": 8, **options}
    return list(generate(model, tokens(1, 6) if ids is None else ids, **settings))


def caches_of(model):
    """Record the caches that a model makes from now on."""
    made, new_cache = [], model.new_cache

    def record():
        made.append(new_cache())
        return made[-1]

    model.new_cache = record
    return made


@every_family
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_stream_is_stock_greedy_generation(variant, kv):
    """The prompt first, then the tokens that model.generate gives."""
    model, ids = mod_model(variant, MoDConfig(kv=kv)), tokens(1, 6)
    steps = stream(model, ids)
    expected = model.generate(ids, p=0.5, do_sample=False, max_new_tokens=8)[0]
    assert steps[0].prefill
    assert steps[0].tokens.tolist() == ids[0].tolist()
    assert [step.prefill for step in steps] == [True] + [False] * 8
    assert [token for step in steps for token in step.tokens.tolist()] == expected.tolist()


@every_family
def test_steps_report_what_the_model_decided(variant):
    """Scores, decisions and log-probabilities equal those of one recomputed pass."""
    model = mod_model(variant)
    trace = RoutingTrace.collect(stream(model), 5, model.mod_layers)
    ids = torch.from_numpy(trace.tokens)[None]
    whole = model(ids, p=0.5, output_router_scores=True)
    assert_close(torch.from_numpy(trace.scores), torch.cat(whole.router_scores))
    assert np.array_equal(trace.routed, torch.cat(whole.routed).numpy())
    logprobs = np.concatenate([step.logprobs for step in trace.steps])
    assert np.isnan(logprobs[:6]).all()
    expected = whole.logits[0, 5:-1].log_softmax(-1).gather(1, ids[0, 6:, None])[:, 0]
    assert_close(torch.from_numpy(logprobs[6:]), expected)


def test_steps_are_plain_numpy_and_numbers():
    """What a step holds can be kept and sent without torch."""
    for step in stream(mod_model("llama")):
        count = len(step.tokens)
        assert step.tokens.dtype == np.int64
        assert step.scores.shape == step.routed.shape == (3, count)
        assert step.scores.dtype == np.float32
        assert step.routed.dtype == np.bool_
        assert step.logprobs.shape == (count,)
        assert type(step.kv_stored) is type(step.kv_allocated) is type(step.kv_dense) is int
        assert step.seconds > 0
        assert step.p == 0.5
        assert step.load == step.routed.mean()


def test_bytes_follow_the_decisions():
    """Stored grows by the entries of the tokens that ran; dense by every layer's."""
    model = mod_model("llama")
    entry, stored = model.new_cache().entry_bytes, 0
    for at, step in enumerate(stream(model)):
        stored += entry * (2 * len(step.tokens) + int(step.routed.sum()))
        assert step.kv_stored == stored
        assert step.kv_dense == entry * 5 * (6 + at)
        assert step.kv_allocated >= stored


def test_p_is_read_at_every_step():
    """A function is asked once a step, and its answer decides that step."""
    model = mod_model("llama", MoDConfig(anchors=0))
    values = itertools.cycle([0.0, 1.0, 0.5])
    steps = stream(model, p=lambda: next(values))
    assert [step.p for step in steps] == [0.0, 1.0, 0.5] * 3
    for step in steps:
        assert np.array_equal(step.routed, step.scores >= step.p)
    assert steps[0].load == 1.0
    assert steps[1].load == 0.0


@every_family
def test_every_mod_layer_may_have_a_dial_of_its_own(variant):
    """A tuple of thresholds: what the model gives for the same, at every step, with their mean as p."""
    model, ids = mod_model(variant), tokens(1, 6)
    own = tuple(0.3 + 0.4 * (at % 2) for at in range(len(model.mod_layers)))
    trace = RoutingTrace.collect(stream(model, ids, p=own), 5, model.mod_layers)
    whole = model(torch.from_numpy(trace.tokens)[None], p=[own], output_router_scores=True)
    assert np.array_equal(trace.routed, torch.cat(whole.routed).numpy())
    assert trace.steps[3].layer_p == own
    assert trace.steps[3].p == pytest.approx(sum(own) / len(own))
    alike = stream(model, ids, p=(0.5,) * len(own))
    assert [step.token for step in alike] == [step.token for step in stream(model, ids)]


def test_thresholds_for_another_number_of_layers_are_refused():
    """The message says how many there are."""
    with pytest.raises(ValueError, match="2 thresholds for 3 MoD layers"):
        stream(mod_model("llama"), p=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"p\[1\]=1.5"):
        stream(mod_model("llama"), p=(0.5, 1.5, 0.5))


def test_alternatives_are_the_likeliest_tokens_at_each_choice():
    """Best first with their log-probabilities; the prompt has none; none unless asked."""
    model = mod_model("llama")
    steps = stream(model, alternatives=5)
    assert steps[0].likely == ()
    for before, step in itertools.pairwise(steps[1:]):
        assert step.likely[0] == step.token
        assert step.likely_logprobs[0] == pytest.approx(step.logprob)
        assert list(step.likely_logprobs) == sorted(step.likely_logprobs, reverse=True)
        assert len(set(step.likely)) == 5
        assert before.likely
    assert all(not step.likely for step in stream(model))
    assert [step.token for step in steps] == [step.token for step in stream(model)]


def test_p_may_change_while_the_stream_is_read():
    """The next step sees a change made after the last one."""
    dial = {"p": 0.0}
    steps = generate(mod_model("llama"), tokens(1, 6), p=lambda: dial["p"], max_new_tokens=3)
    assert next(steps).p == 0.0
    dial["p"] = 0.9
    assert next(steps).p == 0.9


def test_a_dial_out_of_bounds_stops_the_stream_and_frees_the_cache():
    """The sentence is the usual one."""
    model, values = mod_model("llama"), iter([0.5, 2.0])
    made = caches_of(model)
    steps = generate(model, tokens(1, 6), p=lambda: next(values), max_new_tokens=3)
    next(steps)
    with pytest.raises(ValueError, match="from 0 to 1"):
        next(steps)
    assert made[0].nbytes().allocated == 0


@pytest.mark.parametrize("read", [1, 3])
def test_closing_a_stream_frees_its_cache(read):
    """No bytes are held after close(), nor after the end."""
    model = mod_model("llama")
    made = caches_of(model)
    steps = generate(model, tokens(1, 6), p=0.5, max_new_tokens=8)
    for _ in range(read):
        next(steps)
    assert made[0].nbytes().allocated > 0
    steps.close()
    assert made[0].nbytes().allocated == 0
    with pytest.raises(StopIteration):
        next(steps)
    stream(model)
    assert all(cache.nbytes().allocated == 0 for cache in made)


def test_two_streams_of_one_model_do_not_meet():
    """Interleaved step by step, each is what it is alone."""
    model = mod_model("llama")
    prompts, thresholds = [tokens(1, 6), tokens(1, 9, seed=3)], [0.3, 0.7]
    alone = [stream(model, ids, p=p) for ids, p in zip(prompts, thresholds, strict=True)]
    open_streams = [
        generate(model, ids, p=p, max_new_tokens=8) for ids, p in zip(prompts, thresholds, strict=True)
    ]
    together = list(zip(*open_streams, strict=True))
    for at in range(2):
        for ours, theirs in zip((pair[at] for pair in together), alone[at], strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert np.array_equal(ours.routed, theirs.routed)


def test_no_new_tokens_gives_the_prompt_alone():
    """One step, the prefill."""
    steps = stream(mod_model("llama"), max_new_tokens=0)
    assert len(steps) == 1
    assert steps[0].prefill


def test_a_stop_token_is_yielded_and_ends_the_stream():
    """Stop tokens given by the caller, or else the model's own end."""
    model = mod_model("llama")
    free = [step.token for step in stream(model)[1:]]
    cut = free[: free.index(free[3]) + 1]
    assert [step.token for step in stream(model, stop={free[3]})[1:]] == cut
    model.generation_config.eos_token_id = [free[3], 96]
    assert [step.token for step in stream(model)[1:]] == cut
    assert [step.token for step in stream(model, stop=())[1:]] == free


def test_a_stop_token_in_the_prompt_stops_nothing():
    """Only what was generated ends the text."""
    model, ids = mod_model("llama"), tokens(1, 6)
    free = [step.token for step in stream(model, ids)[1:]]
    last = int(ids[0, -1])
    expected = free[: free.index(last) + 1] if last in free else free
    assert [step.token for step in stream(model, ids, stop={last})[1:]] == expected


def test_a_seed_makes_sampling_repeatable():
    """Same seed, same text, whatever torch's own state; another seed, another text."""
    model = mod_model("llama")
    texts = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        texts.append([step.token for step in stream(model, temperature=1.0, seed=seed)])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(narrow):
    """One token to choose from is the likeliest."""
    model = mod_model("llama")
    greedy = [step.token for step in stream(model)]
    assert [step.token for step in stream(model, **{"temperature": 1.0, "seed": 3, **narrow})] == greedy


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 5}, 5), ({"top_p": 0.3}, None)])
def test_sampling_stays_within_its_bounds(options, allowed):
    """Every sampled token is among the k likeliest, or in the smallest set of mass top_p."""
    model = mod_model("llama")
    steps = stream(model, temperature=1.0, seed=3, max_new_tokens=30, **options)
    ids = torch.tensor([[token for step in steps for token in step.tokens.tolist()]])
    chances = model(ids, p=0.5).logits[0, 5:-1].softmax(-1)
    for at, token in enumerate(ids[0, 6:].tolist()):
        likelier = chances[at] > chances[at, token] + 1e-6
        if allowed:
            assert likelier.sum() < allowed
        else:
            assert chances[at][likelier].sum() < 0.3 + 1e-6


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_same_tokens_as_sorting_them_all(top_p, spread):
    """Whether the likeliest few hold the mass or not: flat and peaked distributions over 5,000 tokens."""
    scores = spread * torch.randn(5000)
    weights, ids = Sampler(1.0, top_p, 0, 0, torch.device("cpu"))._candidates(scores)
    ordered, order = torch.softmax(scores, -1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    assert set(ids[weights > 0].tolist()) == set(order[kept].tolist())


def test_a_stream_at_p_zero_is_the_dense_parent_s():
    """Token for token."""
    dense, ids = dense_model("llama"), tokens(1, 6)
    expected = dense.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist()
    assert [t for step in stream(mod_model("llama"), ids, p=0.0) for t in step.tokens.tolist()] == expected


@pytest.mark.parametrize("prompt", [[3, 1, 4], torch.tensor([3, 1, 4]), torch.tensor([[3, 1, 4]])])
def test_a_prompt_may_be_a_list_a_row_or_a_batch_of_one(prompt):
    """All the same text."""
    assert stream(mod_model("llama"), prompt)[0].tokens.tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "from 0 to 1"),
        ({"p": -0.1}, "from 0 to 1"),
        ({"p": math.nan}, "from 0 to 1"),
        ({"p": "0.5"}, "from 0 to 1"),
        ({"max_new_tokens": -1}, "0 or more"),
        ({"max_new_tokens": 1.5}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"temperature": -0.1}, "from 0"),
        ({"temperature": math.nan}, "from 0"),
        ({"temperature": 11.0}, "to 10"),
        ({"top_p": 0.0}, "above 0"),
        ({"top_p": 1.1}, "at most 1"),
        ({"top_k": -1}, "0 .all tokens. or more"),
        ({"input_ids": []}, "prompt is empty"),
        ({"input_ids": [97]}, r"outside 0\.\.96"),
        ({"input_ids": [-1]}, r"outside 0\.\.96"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "one row"),
        ({"max_new_tokens": 251}, "context of 256.*at most 250"),
    ],
)
def test_a_wrong_value_is_refused_at_the_call(options, message):
    """Before anything is read from the iterator, with the value's bound."""
    model = mod_model("llama")
    settings = {"input_ids": tokens(1, 6), "p": 0.5, "max_new_tokens": 8, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, settings.pop("input_ids"), **settings)


def test_the_whole_context_can_be_filled():
    """The last position is usable."""
    model = mod_model("llama", max_position_embeddings=16)
    assert len(stream(model, max_new_tokens=10)) == 11


def test_a_dense_model_is_refused():
    """The sentence says what to do."""
    with pytest.raises(ValueError, match="convert"):
        generate(dense_model("llama"), tokens(1, 6), p=0.5, max_new_tokens=1)


def test_a_greedy_choice_is_the_same_whoever_makes_it():
    """The kernels say which token is likeliest, and how likely; the sampler finds the same in the logits."""
    model = mod_model("llama")
    executor, cache = executor_of(model), model.new_cache()
    executor.prefill(tokens(1, 20)[0], cache, 0.4)
    for token in range(30):
        done = executor.decode([token], [cache], [0.4])
        choose = Sampler(0.0, 1.0, 0, 0, torch.device("cpu"))
        found = choose(done.logits[0])
        assert found.token == done.logits[0].argmax()
        for told, logprob in done.likeliest:
            assert told == found.token
            assert logprob == pytest.approx(found.logprob, abs=1e-5)


def test_logits_that_are_no_numbers_are_told_by_the_kernels_too():
    """As by the sampler."""
    built, why = native.library()
    if built is None:
        pytest.skip(f"no kernels on this machine: {why}")
    model = mod_model("llama")
    executor, cache = executor_of(model), model.new_cache()
    executor.prefill(tokens(1, 20)[0], cache, 0.0)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    done = executor.decode([1], [cache], [0.0])
    with pytest.raises(FloatingPointError, match="not a number"):
        Sampler(0.0, 1.0, 0, 0, torch.device("cpu")).settle(*done.likeliest[0])
