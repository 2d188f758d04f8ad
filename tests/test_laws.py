"""The laws of a MoD model, for every family: what must hold whatever the weights, the threshold or the padding."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from builders import (
    ALL,
    DEPTH,
    EAGER_ONLY,
    FEW,
    assert_close,
    assert_differs,
    dense_model,
    in_chunks,
    mod_model,
    padded,
    paper_hooks,
    routers,
    safe_threshold,
    scatter_routers,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modification import MoDConfig, RoutingTrace, convert, generate
from modification.layer import stock_block

KV = ("evict", "keep")
GATES = ("straight_through", "paper")
PATHS = ("gathered", "masked")
SIDES = ("left", "right")

every_family = pytest.mark.parametrize("variant", ALL)
few_families = pytest.mark.parametrize("variant", FEW)
every_kv = pytest.mark.parametrize("kv", KV)
every_gate = pytest.mark.parametrize("gate", GATES)
every_path = pytest.mark.parametrize("routing", PATHS)
both_sides = pytest.mark.parametrize("side", SIDES)


def ragged_rows(seed: int = 0) -> list[torch.Tensor]:
    """Three rows of different lengths."""
    return [tokens(1, length, seed + at)[0] for at, length in enumerate((12, 5, 9))]


# p = 0 and p above every score


@every_family
@every_path
@every_kv
def test_p_zero_is_the_dense_parent(variant, routing, kv):
    """Same logits and, one per layer and one for the embedding, the same hidden states."""
    dense, model, ids = dense_model(variant), mod_model(variant, MoDConfig(kv=kv)), tokens(2)
    expected = dense(ids, output_hidden_states=True)
    out = model(ids, p=0.0, routing=routing, output_hidden_states=True)
    assert_close(out.logits, expected.logits)
    assert len(out.hidden_states) == len(expected.hidden_states) == dense.config.num_hidden_layers + 1
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs)


@every_family
@both_sides
def test_p_zero_is_the_dense_parent_on_a_padded_batch(variant, side):
    """Padding is hidden from MoD layers as from dense ones."""
    batch = padded(ragged_rows(), side)
    expected = dense_model(variant)(**batch).logits
    assert_close(mod_model(variant)(**batch, p=0.0).logits, expected, batch["attention_mask"])


@every_family
@every_path
@every_gate
def test_p_above_every_score_makes_a_mod_layer_the_identity(variant, routing, gate):
    """The logits are those of a dense model from which the MoD layers were taken out."""
    model, ids = mod_model(variant, MoDConfig(anchors=0, gate=gate)), tokens(2)
    shallow = dense_model(variant)
    layers = model.family.decoder_layers(shallow)
    kept = [index for index in range(len(layers)) if index not in model.mod_layers]
    kinds = getattr(shallow.config, "layer_types", None)
    for index in reversed(model.mod_layers):
        del layers[index]
    shallow.config.num_hidden_layers = len(kept)
    if kinds is not None:
        shallow.config.layer_types = [kinds[index] for index in kept]
    expected = shallow(ids, use_cache=False).logits
    out = model(ids, p=1.0, routing=routing, output_router_scores=True)
    assert not torch.stack(out.routed).any()
    assert_close(out.logits, expected)


@every_family
@every_path
def test_a_converted_model_at_positive_p_differs_from_its_parent(variant, routing):
    """The dial does something."""
    dense, model, ids = dense_model(variant), mod_model(variant), tokens(2)
    out = model(ids, p=0.5, routing=routing, output_router_scores=True)
    assert 0.1 < torch.stack(out.routed).float().mean() < 0.9
    assert_differs(out.logits, dense(ids).logits)


# One rule, two paths


@every_family
@every_kv
@every_gate
def test_gathered_is_masked(variant, kv, gate):
    """Really skipping gives the logits and decisions of computing all and hiding, padded or not."""
    model = mod_model(variant, MoDConfig(kv=kv, gate=gate))
    rows = ragged_rows()
    p = safe_threshold(model, tokens(3))
    batches = [{"input_ids": tokens(1)}, padded(rows, "left"), padded(rows, "right")]
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for threshold in (p, torch.tensor([0.0, p, 1.0])[: len(mask)]):
            gathered, masked = (
                model(**batch, p=threshold, routing=path, output_router_scores=True) for path in ("gathered", "masked")
            )
            for ours, theirs in zip(gathered.routed, masked.routed, strict=True):
                assert torch.equal(ours, theirs)
            assert_close(gathered.logits, masked.logits, mask)


@every_family
@every_gate
def test_every_mod_layer_may_have_a_threshold_of_its_own(variant, gate):
    """One p per layer decides layer by layer, on both paths; the same p for all is that p."""
    model, ids = mod_model(variant, MoDConfig(gate=gate)), tokens(2)
    count = len(model.mod_layers)
    own = torch.tensor([[0.0, 1.0, 0.5][at % 3] for at in range(count)])[None]
    gathered, masked = (
        model(ids, p=own, routing=path, output_router_scores=True) for path in ("gathered", "masked")
    )
    for at, run in enumerate(gathered.routed):
        assert torch.equal(run, masked.routed[at])
        assert run[:, 1:].all() if own[0, at] == 0 else not run[:, 1:].any() or own[0, at] == 0.5
    assert_close(gathered.logits, masked.logits)
    p = safe_threshold(model, ids)
    alike = model(ids, p=torch.full((2, count), p)).logits
    assert torch.equal(alike, model(ids, p=p).logits)


TINY = {kv: mod_model("qwen3", MoDConfig(kv=kv)) for kv in KV}


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3), side=st.sampled_from(SIDES),
    p=st.lists(st.floats(0, 1), min_size=3, max_size=3), kv=st.sampled_from(KV), seed=st.integers(0, 99),
)
def test_gathered_is_masked_for_any_lengths_padding_and_thresholds(lengths, side, p, kv, seed):
    """Random lengths, sides, thresholds per row and cache modes."""
    batch = padded([tokens(1, length, seed + at)[0] for at, length in enumerate(lengths)], side)
    thresholds = torch.tensor(p[: len(lengths)])
    with torch.no_grad():
        gathered, masked = (
            TINY[kv](**batch, p=thresholds, routing=path, output_router_scores=True) for path in ("gathered", "masked")
        )
    for ours, theirs in zip(gathered.routed, masked.routed, strict=True):
        assert torch.equal(ours, theirs)
    assert_close(gathered.logits, masked.logits, batch["attention_mask"])


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@every_path
def test_the_forward_pass_is_a_loop_written_by_hand(variant, routing):
    """MoD layers run the dense layer on the routed tokens alone, at their true positions."""
    dense, model, ids = dense_model(variant), mod_model(variant), tokens(1)
    p = safe_threshold(model, ids)
    x, places = dense.model.embed_tokens(ids), torch.arange(ids.shape[1])[None]
    cos, sin = dense.model.rotary_emb(x, places)
    by_layer = dict(zip(model.mod_layers, routers(model), strict=True))
    for index, layer in enumerate(dense.model.layers):
        run = torch.ones(ids.shape[1], dtype=torch.bool)
        if index in by_layer:
            run = torch.sigmoid(by_layer[index](x))[0] >= p
            run[0] = True
        x = x.clone()
        x[:, run] = layer(x[:, run], position_embeddings=(cos[:, run], sin[:, run]), position_ids=places[:, run])
    assert_close(model(ids, p=p, routing=routing).logits, dense.lm_head(dense.model.norm(x)))


@every_family
@every_path
def test_the_paper_gate_scales_both_sub_blocks(variant, routing):
    """h = x + g Attn(LN x), y = h + g MLP(LN h), computed by hooks on the dense parent."""
    model, dense, ids = mod_model(variant, MoDConfig(gate="paper")), dense_model(variant), tokens(2)
    plain = dense(ids).logits
    with paper_hooks(dense, model):
        expected = dense(ids).logits
    assert_close(model(ids, p=0.0, routing=routing).logits, expected)
    assert_differs(expected, plain)


@pytest.mark.parametrize("variant", [variant for variant in ALL if variant not in (*EAGER_ONLY, "falcon-alibi")])
@every_kv
def test_the_eager_kernel_is_the_sdpa_kernel(variant, kv):
    """Both attention kernels that conversion admits give the same logits, padded and cached too."""
    models = [mod_model(variant, MoDConfig(kv=kv), kernel=kernel) for kernel in ("sdpa", "eager")]
    batch = padded(ragged_rows(), "left")
    p = safe_threshold(models[0], batch["input_ids"], attention_mask=batch["attention_mask"])
    results = [model(**batch, p=p).logits for model in models]
    assert_close(results[1], results[0], batch["attention_mask"])
    ids = tokens(1)
    pieces = [in_chunks(model, ids, [5, 1, 8], p=p)["logits"] for model in models]
    assert_close(pieces[1], pieces[0])


# The cache


@every_family
@every_kv
@every_path
def test_cached_is_recomputed(variant, kv, routing):
    """Token by token and in uneven chunks: the logits and decisions of one pass over the whole."""
    model = mod_model(variant, MoDConfig(kv=kv, anchors=2))
    for ids, divisions in ((tokens(1), ([1] * 14, [5, 1, 8])), (tokens(3), ([4, 1, 9],))):
        p = safe_threshold(model, ids)
        whole = model(ids, p=p, routing=routing, use_cache=False, output_router_scores=True)
        for sizes in divisions:
            pieces = in_chunks(model, ids, sizes, p=p, routing=routing)
            assert torch.equal(pieces["routed"], torch.stack(whole.routed))
            assert_close(pieces["logits"], whole.logits)


@every_family
@every_kv
def test_cached_is_recomputed_on_a_padded_batch(variant, kv):
    """A left-padded batch grows row by row as it is recomputed."""
    gate = "paper" if variant in FEW else "straight_through"
    model = mod_model(variant, MoDConfig(kv=kv, gate=gate, anchors=3))
    batch = padded(ragged_rows(), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    p = safe_threshold(model, ids, attention_mask=mask, position_ids=batch["position_ids"])
    whole = model(**batch, p=p, use_cache=False, output_router_scores=True)
    for sizes in ([1] * 12, [9, 3]):
        pieces = in_chunks(model, ids, sizes, mask, p=p)
        assert torch.equal(pieces["routed"], torch.stack(whole.routed))
        assert_close(pieces["logits"], whole.logits, mask)


@every_path
@every_kv
def test_the_threshold_may_change_over_one_cache(routing, kv):
    """Tokens keep the decision of their own step; both paths agree on what follows."""
    model, ids = mod_model("llama", MoDConfig(kv=kv)), tokens(1)
    cache, logits = model.new_cache(), []
    for at in range(ids.shape[1]):
        p = (0.0, 0.9, 0.4)[at % 3]
        logits.append(model(ids[:, at : at + 1], past_key_values=cache, p=p, routing=routing).logits)
    reference, expected = model.new_cache(), []
    for at in range(ids.shape[1]):
        p = (0.0, 0.9, 0.4)[at % 3]
        expected.append(model(ids[:, at : at + 1], past_key_values=reference, p=p, routing="masked").logits)
    assert_close(torch.cat(logits, 1), torch.cat(expected, 1))
    assert cache.lengths() == reference.lengths()


@every_family
@every_path
def test_stored_entries_are_the_tokens_routed_there(variant, routing):
    """Per MoD layer and row; padding is never stored, and each chunk adds its own."""
    model = mod_model(variant)
    batch = padded(ragged_rows(), "left")
    for sizes in ([12], [4, 1, 1, 6]):
        pieces = in_chunks(model, batch["input_ids"], sizes, batch["attention_mask"], p=0.5, routing=routing)
        counts = pieces["routed"].sum(2)
        assert pieces["cache"].lengths() == dict(zip(model.mod_layers, counts.tolist(), strict=True))
        assert 0 < counts.sum() < 3 * batch["attention_mask"].sum()


@few_families
@every_path
def test_keep_stores_every_real_token(variant, routing):
    """Skipped tokens stay visible: one entry per real token, whatever p."""
    model = mod_model(variant, MoDConfig(kv="keep"))
    batch = padded(ragged_rows(), "left")
    pieces = in_chunks(model, batch["input_ids"], [4, 1, 7], batch["attention_mask"], p=0.6, routing=routing)
    assert pieces["cache"].lengths() == {layer: [12, 5, 9] for layer in model.mod_layers}


# Rows, order and causality


@every_family
@both_sides
@every_kv
def test_a_batch_is_each_row_alone(variant, side, kv):
    """Padding, neighbours and their thresholds change nothing."""
    model = mod_model(variant, MoDConfig(kv=kv, anchors=2))
    rows = ragged_rows()
    batch = padded(rows, side)
    p = [safe_threshold(model, row[None], near) for row, near in zip(rows, (0.5, 0.3, 0.7), strict=True)]
    together = model(**batch, p=torch.tensor(p), output_router_scores=True)
    for at, row in enumerate(rows):
        alone = model(row[None], p=p[at], output_router_scores=True)
        real = batch["attention_mask"][at].bool()
        assert_close(together.logits[at, real], alone.logits[0])
        for ours, theirs in zip(together.routed, alone.routed, strict=True):
            assert torch.equal(ours[at, real], theirs[0])
            assert not ours[at, ~real].any()


@every_family
@every_kv
@every_path
def test_later_tokens_change_no_earlier_decision(variant, kv, routing):
    """Same prefix, other continuation: same scores, decisions and logits there. Few tokens running included."""
    model, first = mod_model(variant, MoDConfig(kv=kv)), tokens(2)
    second = torch.cat([first[:, :6], tokens(2, 8, seed=9)], 1)
    some = safe_threshold(model, first)
    for ids, other, thresholds in ((first, second, (some,)), (first[:1], second[:1], (some, 0.9, 1.0))):
        for p in thresholds:
            ours, theirs = (model(x, p=p, routing=routing, output_router_scores=True) for x in (ids, other))
            assert_close(ours.logits[:, :6], theirs.logits[:, :6])
            for a, b in zip(ours.router_scores, theirs.router_scores, strict=True):
                assert_close(a[:, :6], b[:, :6])
            for a, b in zip(ours.routed, theirs.routed, strict=True):
                assert torch.equal(a[:, :6], b[:, :6])


@few_families
@every_path
def test_one_threshold_per_row_is_each_row_at_its_own(variant, routing):
    """A tensor p [B] equals B calls with a number."""
    model, ids, p = mod_model(variant), tokens(3), torch.tensor([0.2, 0.5, 0.8])
    together = model(ids, p=p, routing=routing).logits
    for at in range(3):
        assert_close(together[at], model(ids[at : at + 1], p=p[at].item(), routing=routing).logits[0])


@pytest.mark.parametrize("anchors", [0, 1, 3])
@every_path
def test_anchors_always_run(anchors, routing):
    """The first real tokens of every row run at p = 1, left-padded and token by token too; no others do."""
    model = mod_model("llama", MoDConfig(anchors=anchors))
    rows = ragged_rows()
    for side in SIDES:
        batch = padded(rows, side)
        place = batch["attention_mask"].cumsum(1) - 1
        expected = (place < anchors) & batch["attention_mask"].bool()
        for routed in model(**batch, p=1.0, routing=routing, output_router_scores=True).routed:
            assert torch.equal(routed, expected)
    pieces = in_chunks(model, tokens(1, 6), [1] * 6, p=1.0, routing=routing)
    assert pieces["routed"].sum(2).flatten().tolist() == [anchors] * 3
    assert pieces["routed"][..., :anchors].all()


@few_families
@every_path
def test_a_nan_router_runs_its_layer(variant, routing):
    """A broken router costs time, not tokens: the dense parent's logits at any p."""
    dense, model, ids = dense_model(variant), mod_model(variant), tokens(2)
    for router in routers(model):
        router.weight.fill_(float("nan"))
    out = model(ids, p=0.9, routing=routing, output_router_scores=True)
    assert torch.stack(out.routed).all()
    assert_close(out.logits, dense(ids).logits)


@pytest.mark.parametrize("layers", ["interleaved", [0], [4], [0, 1, 2, 3, 4], [1, 3]])
@every_kv
def test_any_choice_of_layers_obeys_the_laws(layers, kv):
    """First, last, every or some layers: gathered = masked, cached = recomputed."""
    model, ids = mod_model("llama", MoDConfig(layers=layers, kv=kv)), tokens(2)
    p = safe_threshold(model, ids)
    whole = model(ids, p=p).logits
    assert_close(whole, model(ids, p=p, routing="masked").logits)
    assert_close(in_chunks(model, ids, [3, 1, 10], p=p)["logits"], whole)


# The call carries its routing


def test_two_threads_with_two_thresholds_get_what_each_gets_alone():
    """One loaded model, two users, no shared p."""
    model = mod_model("llama")
    jobs = [(0.25, tokens(1, 10, seed=1)), (0.75, tokens(1, 13, seed=2))]

    def run(p, ids):
        steps = generate(model, ids, p=p, max_new_tokens=25)
        trace = RoutingTrace.collect(steps, 5, model.mod_layers)
        return trace.tokens.tolist(), trace.routed.tolist(), model(ids, p=p).logits

    alone = [run(*job) for job in jobs]
    together = [None, None]
    start = threading.Barrier(2)

    def work(at):
        with torch.no_grad():
            start.wait()
            together[at] = run(*jobs[at])

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (ids, routed, logits), (ids_alone, routed_alone, logits_alone) in zip(together, alone, strict=True):
        assert ids == ids_alone
        assert routed == routed_alone
        assert_close(logits, logits_alone)
    assert alone[0][1] != alone[1][1]


def test_a_call_leaves_no_trace_on_the_model():
    """State dict, config and attributes of the layers are as before."""
    model = mod_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model(tokens(2), p=0.3, output_router_scores=True)
    list(generate(model, tokens(1), p=0.7, max_new_tokens=3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


# Training


@every_family
@every_kv
def test_skipped_tokens_give_their_router_a_gradient(variant, kv, gradients):
    """Straight-through: at a p where nothing runs, the language loss still moves every router."""
    model, ids = mod_model(variant, MoDConfig(anchors=0, kv=kv)).train(), tokens(2)
    out = model(ids, p=1.0, labels=ids, output_router_scores=True)
    assert not torch.stack(out.routed).any()
    out.loss.backward()
    for router in routers(model):
        assert router.weight.grad.abs().sum() > 0
        assert router.weight.grad.isfinite().all()


def test_the_straight_through_gradient_is_that_of_the_block_s_contribution(gradients):
    """d loss / d logit = s(1 - s) * <d loss / d out, y - x>, token by token, for the last MoD layer."""
    model, ids = mod_model("llama", MoDConfig(layers=[2])).train(), tokens(1)
    p = safe_threshold(model.eval(), ids)
    out = model.train()(ids, p=p, output_router_scores=True, output_hidden_states=True)
    states = out.hidden_states
    for state in states:
        state.retain_grad()
    router = routers(model)[0]
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    run, x = out.routed[0], states[2].detach()
    with torch.no_grad():
        logit = router(x)
        # A run token's y is its output; a skipped one's is the block over run tokens and itself.
        y = states[3].detach().clone()
    s = torch.sigmoid(logit - torch.logit(torch.tensor(p)))
    skipped = (~run[0]).nonzero().flatten().tolist()
    layer = model.model.layers[2]
    cos_sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for at in skipped:
        seen = [*run[0, :at].nonzero().flatten().tolist(), at]
        with torch.no_grad():
            part = tuple(table[:, seen] for table in cos_sin)
            y[0, at] = layer(x[:, seen], position_embeddings=part)[0, -1]
    expected = (s * (1 - s) * (states[3].grad * (y - x)).sum(-1)).sum()
    torch.testing.assert_close(router.bias.grad[0], expected, atol=1e-3, rtol=1e-3)


@every_family
@every_kv
def test_a_partial_token_teaches_its_gate_what_its_share_is_worth(variant, kv, gradients):
    """d loss / d logit = s(1 - s) * d loss / d share: of the output that it gets, and of others that see its keys."""
    model, ids = mod_model(variant, MoDConfig(layers=[2], kv=kv, anchors=0)).train(), tokens(2)
    chosen = torch.rand(2, 1, ids.shape[1], generator=torch.Generator().manual_seed(0)) < 0.4
    share = torch.where(chosen, torch.rand(chosen.shape) * 0.8 + 0.1, 1.0).requires_grad_()
    out = model(ids, p=0.7, between=share, output_router_scores=True, use_cache=False)
    gate = out.router_scores[0]
    gate.retain_grad()
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    logit = torch.logit(gate.detach())
    s = torch.sigmoid(logit - torch.logit(torch.tensor(0.7)))
    expected = torch.where(chosen[:, 0], s * (1 - s) * share.grad[:, 0], 0.0)
    assert share.grad[chosen].abs().sum() > 0
    torch.testing.assert_close(routers(model)[0].bias.grad[0], expected.sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("variant", ["llama", "gemma2-window"])
def test_evicted_keys_count_in_what_a_token_is_worth(variant, gradients):
    """The last token aside, whose keys nobody sees, a token's share moves the output of those after it."""
    model, ids = mod_model(variant, MoDConfig(layers=[4], anchors=0)).train(), tokens(1)
    share = torch.ones(1, 1, ids.shape[1])
    share[..., 3] = 0.5
    share.requires_grad_()
    out = model(ids, p=0.0, between=share, use_cache=False)
    out.logits[0, 5].square().sum().backward()
    assert share.grad[0, 0, 3].abs() > 1e-6


@few_families
def test_training_takes_the_masked_path_by_default(variant, gradients):
    """In training mode the default equals routing='masked', with and without gradient checkpointing."""
    model, ids = mod_model(variant).train(), tokens(2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    p = safe_threshold(model, ids)
    grads = []
    for explicit, checkpointing in ((False, False), (True, False), (False, True)):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, p=p, labels=ids, **({"routing": "masked"} if explicit else {})).loss.backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    for other in grads[1:]:
        for ours, theirs in zip(other, grads[0], strict=True):
            assert_close(ours, theirs)


# Other number formats and real weights


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox"])
@every_kv
def test_bfloat16_obeys_the_laws(variant, kv):
    """p = 0 is dense, gathered is masked, cached is recomputed, in the bf16 row of the tolerance table."""
    dense = dense_model(variant, dtype=torch.bfloat16)
    model, ids = mod_model(variant, MoDConfig(kv=kv), dtype=torch.bfloat16), tokens(1, 6)
    assert all(router.weight.dtype == torch.float32 for router in routers(model))
    assert_close(model(ids, p=0.0).logits, dense(ids).logits)
    p = safe_threshold(model, ids, reach=0.3)
    whole = model(ids, p=p, output_router_scores=True)
    masked = model(ids, p=p, routing="masked", output_router_scores=True)
    pieces = in_chunks(model, ids, [3, 1, 2], p=p)
    assert torch.equal(torch.stack(whole.routed), torch.stack(masked.routed))
    assert torch.equal(torch.stack(whole.routed), pieces["routed"])
    assert_close(whole.logits, masked.logits)
    assert_close(pieces["logits"], whole.logits)


@pytest.fixture(scope="module")
def stories(stories_folder):
    dense = AutoModelForCausalLM.from_pretrained(stories_folder).eval()
    model = convert(copy.deepcopy(dense))
    scatter_routers(model)
    return dense, model


def test_real_weights_obey_the_laws(stories):
    """stories260K: p = 0 is dense, gathered is masked, cached is recomputed, a batch is each row alone."""
    dense, model = stories
    ids = torch.randint(3, dense.config.vocab_size, (2, 24))
    assert_close(model(ids, p=0.0).logits, dense(ids).logits)
    p = safe_threshold(model, ids)
    whole = model(ids, p=p).logits
    assert_differs(whole, dense(ids).logits)
    assert_close(model(ids, p=p, routing="masked").logits, whole)
    assert_close(in_chunks(model, ids, [7, 1, 16], p=p)["logits"], whole)
    batch = padded([ids[0], ids[1, :11]], "left")
    assert_close(model(**batch, p=p).logits[1, -11:], whole[1, :11])


def test_real_weights_keep_their_quality_at_p_zero(stories, stories_folder):
    """The converted parent tells the same story greedily."""
    dense, model = stories
    ids = torch.tensor([[1, 403, 407, 261]])
    assert ids.max() < dense.config.vocab_size
    expected = dense.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, p=0.0), expected)


# Compiled blocks


@few_families
@every_kv
@every_path
def test_blocks_compiled_or_not_say_the_same(variant, kv, routing, gradients):
    """Logits, and gradients of every weight, routers' too."""
    ids, compiled = tokens(2), torch.compile(stock_block, backend="eager")
    p, found = safe_threshold(mod_model(variant), ids), []
    between = torch.rand(2, DEPTH - 2, ids.shape[1]) + 0.5 if routing == "masked" else None
    for run_block in (None, compiled):
        model = mod_model(variant, MoDConfig(kv=kv))
        out = model(ids, p=p, routing=routing, run_block=run_block, between=between, labels=ids, use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), [weight.grad for weight in model.parameters()]))
    assert_close(found[1][0], found[0][0])
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
