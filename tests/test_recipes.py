"""Every recipe and way of tuning does what it says: on tiny models, end to end, and term by term."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from builders import assert_close, dense_model, mod_model, routers, tiny_tokenizer, tokens
from safetensors.torch import load_file, save_file

from modification import MoDConfig, convert, load
from modification.conversion import layers as choosing
from modification.conversion import train as training
from modification.conversion.calibrate import fit_dial, fit_routers
from modification.conversion.checks import Options
from modification.conversion.data import Text
from modification.conversion.muon import MuonWithAdamW
from modification.conversion.objectives import (
    hidden_distance,
    imitation,
    load_reducing,
    next_token_loss,
    row_losses,
)
from modification.conversion.order import removal_order, rounds, stagger
from modification.conversion.recipes import RECIPES, Recipe, default_lr, named
from modification.conversion.train import train
from modification.conversion.trainer import Mixing, Steering
from modification.errors import LoadError
from modification.measure.quality import evaluate, reference_of
from modification.measure.report import record, rows_of, table
from modification.routing import top_share

SMALL = {"tokens": 8 * 4 * 16, "block": 16, "batch": 4, "lr": 2e-3}


@pytest.fixture(scope="module")
def blocks():
    """Learnable text: 24 blocks of 16 tokens, short cycles from a few letters."""
    noise = np.random.default_rng(0)
    return np.stack([np.resize(noise.integers(0, 40, 5), 16) for _ in range(24)]).astype(np.int32)


def run(recipe, blocks, out, variant="llama", **options):
    """One conversion of a tiny parent; the model, its rows and its report."""
    model = dense_model(variant)
    with torch.enable_grad():
        rows = train(model, tiny_tokenizer(), MoDConfig(), recipe, Text(blocks, blocks[:4]), out, Options(**options))
    return model, rows, json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def plain(blocks, tmp_path_factory):
    """The first recipe's conversion, for whoever goes on from it or differs from it."""
    return run(named("any-p", **SMALL), blocks, tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def adapted(blocks, tmp_path_factory):
    """A conversion whose low-rank change is kept as an adapter, and its folder."""
    out = tmp_path_factory.mktemp("adapted") / "out"
    model, rows, _ = run(named("any-p", tune="lora", **SMALL), blocks, out, keep_adapter=True)
    return model, rows, out


# The table


def test_the_table_names_its_recipes():
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert {"any-p", "paper", "paper-controlled", "top-k", "calibrate"} <= set(RECIPES)
    assert named("paper").p == 0.5
    assert named("any-p", tokens=4096, lr=None).tokens == 4096


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune": "half"}, "tune='half': expected one of full, lora, router"),
        ({"load": "soft"}, "load='soft'"), ({"accumulate": 3}, "accumulate=3: a batch of 8"),
        ({"p": 1.0}, "p=1.0"), ({"kl": -1.0}, "kl=-1.0"), ({"p_range": (0.5, 0.2)}, "p_range"),
        ({"lr": 2.0}, "lr=2.0"), ({"lora_rank": 0}, "lora_rank=0"),
    ],
)
def test_a_recipe_out_of_bounds_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'magic': expected one of any-p"):
        named("magic")


def test_adapters_learn_faster_than_large_models():
    assert default_lr(10**9, "lora") > default_lr(10**9)


# Each recipe, end to end


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_gives_a_model_a_report_and_a_card(name, blocks, tmp_path):
    """Loaded again it says the same; the report has eleven p's with all that is promised."""
    recipe = named(name, **({} if RECIPES[name].fit else SMALL))
    model, rows, report = run(recipe, blocks, tmp_path / name, facts={"parent": "owner/tiny"})
    again, _ = load(tmp_path / name)
    assert again.mod_config.gate == recipe.gate
    ids = tokens(2)
    assert_close(again(ids, p=0.5).logits, model.eval()(ids, p=0.5).logits)
    assert report["recipe"] == name
    assert len(report["sweep"]) == len(rows) == 11
    for row in report["sweep"]:
        assert {"p", "loss", "error", "load", "layer_loads", "agreement", "kv", "compute"} <= set(row)
    assert [sample["p"] for sample in report["samples"]] == [0.0, 0.5, 0.8]
    card = (tmp_path / name / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "base_model: owner/tiny" in card
    assert table(rows, "the parent's") in card


def test_the_paper_s_load_term_by_hand():
    """Sum over layers of the share that ran times the mean gate; only gates get a gradient."""
    scores = (torch.tensor([[0.2, 0.8]], requires_grad=True), torch.tensor([[0.4, 0.6]], requires_grad=True))
    routed = (torch.tensor([[False, True]]), torch.tensor([[True, True]]))
    with torch.enable_grad():
        value = load_reducing(scores, routed)
        value.backward()
    assert value.item() == pytest.approx(0.5 * 0.5 + 1.0 * 0.5)
    assert scores[0].grad.tolist() == [[0.25, 0.25]]
    assert scores[1].grad.tolist() == [[0.5, 0.5]]


def test_top_k_runs_the_share_with_the_highest_scores():
    """Each row its own share; 1 - p of the tokens."""
    gate = torch.tensor([[0.9, 0.1, 0.5, 0.7], [0.2, 0.3, 0.1, 0.4]])
    run = top_share(gate, torch.tensor([[0.5], [0.25]]))
    assert run.tolist() == [[True, False, False, True], [False, False, False, True]]
    model, ids = mod_model("llama", MoDConfig(anchors=0)), tokens(3, 16)
    out = model(ids, p=0.75, rule="top-k", routing="masked", output_router_scores=True)
    assert all((routed.sum(1) == 4).all() for routed in out.routed)
    with pytest.raises(ValueError, match="rule='most'"):
        model(ids, rule="most")


def test_routers_that_say_what_top_k_chose_imitate_it_well():
    """Scores on the right side of p cost little, on the wrong side much."""
    p, chosen = torch.tensor([0.5]), (torch.tensor([[True, False]]),)
    right, wrong = (imitation((torch.tensor([scores]),), chosen, p) for scores in ([0.9, 0.1], [0.1, 0.9]))
    assert right.item() == pytest.approx(-np.log(0.9), abs=1e-4)
    assert wrong.item() == pytest.approx(-np.log(0.1), abs=1e-4)


def test_steering_raises_its_factor_while_the_load_is_too_high():
    """And lets it turn negative when the load has fallen too far; bounded both ways, and kept by checkpoints."""
    steering = Steering(0.01)
    for _ in range(10):
        steering.move(0.5)
    assert steering.alpha == pytest.approx(0.11)
    for _ in range(10_000):
        steering.move(-0.5)
    assert steering.alpha == -1.0
    assert Steering(**steering.state()["args"]).alpha == -1.0


def test_hidden_distance_by_hand():
    """Per layer relative to the teacher's size; the embedding is left out."""
    teacher, student = [torch.ones(1, 2, 3)] * 3, [torch.zeros(1, 2, 3), torch.ones(1, 2, 3), 1.5 * torch.ones(1, 2, 3)]
    assert hidden_distance(teacher, student).item() == pytest.approx(0.125)


# What is trained


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".router." not in name}


def test_router_tuning_leaves_every_parent_weight_untouched(blocks, tmp_path):
    """Bit for bit; the routers have moved."""
    parent = weights_of(dense_model("llama"))
    model, _, _ = run(named("any-p", tune="router", **SMALL), blocks, tmp_path / "out")
    assert all(torch.equal(parent[name], value) for name, value in weights_of(model).items())
    torch.manual_seed(0)
    fresh = convert(dense_model("llama"))
    moved = [not torch.equal(a.weight, b.weight) for a, b in zip(routers(model), routers(fresh), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_lora_is_merged_into_stock_weights(variant, blocks, tmp_path):
    """The same parameter names as the parent's, with low-rank changes of projections alone."""
    parent = weights_of(dense_model(variant))
    model, _, _ = run(named("any-p", tune="lora", lora_rank=2, **SMALL), blocks, tmp_path / "out", variant)
    assert set(weights_of(model)) == set(parent)
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, parent[name])}
    assert changed
    assert all(parent[name].dim() == 2 for name in changed)
    name = next(iter(changed))
    assert torch.linalg.matrix_rank(weights_of(model)[name] - parent[name], rtol=1e-3) <= 2


def test_a_kept_adapter_lies_beside_an_untouched_parent_and_is_put_on_when_loaded(blocks, adapted):
    """The files hold the parent's weights; what loads is the tuned model."""
    (model, rows, out), parent = adapted, weights_of(dense_model("llama"))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert all(torch.equal(parent[name], value) for name, value in weights_of(model).items())
    again, _ = load(out)
    assert evaluate(again, blocks[:4], 0.5).loss == pytest.approx(rows[5].quality.loss, abs=1e-5)
    assert evaluate(model.eval(), blocks[:4], 0.5).loss != pytest.approx(rows[5].quality.loss, abs=1e-5)


@pytest.mark.parametrize("harm", ["half", "other", "pattern"])
def test_an_adapter_that_is_not_whole_is_refused(adapted, tmp_path, harm):
    """Half of its tensors, another model's, or targets that only a search through all names would find."""
    out = shutil.copytree(adapted[-1], tmp_path / "out")
    weights, config = out / "adapter" / "adapter_model.safetensors", out / "adapter" / "adapter_config.json"
    held = load_file(weights)
    if harm == "pattern":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": "(a+)+b"}))
    else:
        kept = sorted(held)[: len(held) // 2] if harm == "half" else []
        save_file({name: held[name] for name in kept} or {"other.weight": torch.zeros(2)}, weights)
    with pytest.raises(LoadError, match=r"incomplete, or another model's|must list its target_modules"):
        load(out)


def test_a_teacher_of_another_vocabulary_is_refused(blocks, tmp_path):
    with torch.enable_grad(), pytest.raises(ValueError, match="the teacher has 50 tokens and the parent 97"):
        train(
            dense_model("llama"), tiny_tokenizer(), MoDConfig(), named("any-p", **SMALL), Text(blocks, blocks[:4]),
            tmp_path / "out", None, dense_model("llama", vocab_size=50, bos_token_id=1),
        )


def test_a_mod_model_goes_on_beside_its_dense_parent(blocks, plain, tmp_path):
    """From its own weights and settings, its dial taken off meanwhile; without the parent it is refused."""
    recipe = named("any-p", **SMALL)
    text = Text(blocks, blocks[:4])
    model, first, _ = copy.deepcopy(plain)
    dial = model.mod_config.dial
    for other, teacher, sentence in (
        (recipe, None, "give that as the teacher"), (recipe, mod_model("llama"), "give that as the teacher"),
        (named("paper", **SMALL), dense_model("llama"), "convert the parent by it"),
    ):
        with torch.enable_grad(), pytest.raises(ValueError, match=sentence):
            train(model, tiny_tokenizer(), MoDConfig(), other, text, tmp_path / "refused", None, teacher)
    with torch.enable_grad():
        longer = named("any-p", **{**SMALL, "tokens": 2 * SMALL["tokens"]})
        second = train(
            model, tiny_tokenizer(), MoDConfig(), longer, text, tmp_path / "second", None, dense_model("llama")
        )
    assert second[0].quality.loss < first[0].quality.loss, "it went on from there"
    again, _ = load(tmp_path / "second")
    assert again.mod_config.dial
    assert again.mod_config.dial != dial
    assert again.mod_layers == model.mod_layers


HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.mark.parametrize(
    "changes", [{"hidden": 0.5}, {"paired": True}, {"paired": True, "hidden": 0.5}, {"path": "gathered"},
                {"accumulate": 2}, {"checkpoint_activations": True},
                pytest.param({"optimizer": "muon"}, marks=HAS_MUON)],
)
def test_options_of_a_recipe_train(changes, blocks, tmp_path):
    """Losses are finite, logged and fall."""
    run(named("any-p", **{**SMALL, "tokens": 20 * 4 * 16}, **changes), blocks, tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(float(entry["loss"])) for entry in log)
    assert log[-1]["cross_entropy"] < log[0]["cross_entropy"]
    assert ("hidden_distance" in log[0]) == ("hidden" in changes)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiling_changes_no_curve(blocks, tmp_path):
    """With blocks, teacher and loss compiled, the log's losses are the same."""
    logs = []
    for compiled in (False, True):
        recipe = named("any-p", **{**SMALL, "tokens": 20 * 4 * 16})
        run(recipe, blocks, tmp_path / str(compiled), compile=compiled)
        logs.append([json.loads(line) for line in (tmp_path / str(compiled) / "log.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*logs, strict=True):
        for name in ("cross_entropy", "kl", "load"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


@HAS_MUON
def test_muon_goes_on_from_its_saved_state():
    """Five steps, saved and loaded after two, are five steps; both parts follow one schedule."""
    def steps(stopped):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
        optimizer, schedule = _muon(model)
        for step in range(5):
            if step == 2 and stopped:
                saved, at = optimizer.state_dict(), schedule.state_dict()
                optimizer, schedule = _muon(model)
                optimizer.load_state_dict(saved)
                schedule.load_state_dict(at)
            with torch.enable_grad():
                model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert {group["lr"] for group in optimizer.muon.param_groups} == {0.01 * 0.5**5}
        assert {group["lr"] for group in optimizer.adamw.param_groups} == {0.03 * 0.5**5}
        return model.state_dict()

    for ours, theirs in zip(steps(True).values(), steps(False).values(), strict=True):
        assert torch.equal(ours, theirs)


@HAS_MUON
def test_a_run_by_muon_resumes_to_the_same_weights(blocks, tmp_path, monkeypatch):
    """Those of a run that was never stopped: its state goes through Trainer's checkpoint."""
    recipe = named("any-p", **{**SMALL, "tokens": 16 * 4 * 16}, optimizer="muon")
    whole, _, _ = run(recipe, blocks, tmp_path / "whole", save_steps=8)

    class StopsAtStep12(training.ProgressBar):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 12:
                raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training, "ProgressBar", StopsAtStep12)
        with pytest.raises(RuntimeError, match="stopped"):
            run(recipe, blocks, tmp_path / "stopped", save_steps=8)
    resumed, _, report = run(recipe, blocks, tmp_path / "stopped", save_steps=8, resume=True)
    assert report["resumed"]
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert_close(ours, theirs)


def _muon(model):
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    optimizer = MuonWithAdamW(matrices, 0.01, [{"params": others, "lr": 0.03}])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_checkpointed_activations_change_no_weight(variant, blocks, plain, tmp_path):
    """Recomputing gives what keeping gives, for models that hand no keywords to their layers too."""
    kept, *_ = plain if variant == "llama" else run(named("any-p", **SMALL), blocks, tmp_path / "kept", variant)
    model, *_ = run(named("any-p", **SMALL, checkpoint_activations=True), blocks, tmp_path / "out", variant)
    for ours, theirs in zip(model.state_dict().values(), kept.state_dict().values(), strict=True):
        assert_close(ours, theirs)


# Without training


def test_fitted_routers_run_the_tokens_that_need_their_layers():
    """At half load, closed-form routers lose less than scattered ones; the benefit of each layer is told."""
    model = mod_model("llama", seed=3)
    text = np.random.default_rng(1).integers(0, 95, (48, 16)).astype(np.int32)
    dense, _ = reference_of(model, text, p=0.0)
    fit_dial(model, text[:24])
    before = evaluate(model, text[24:], 0.5, reference=dense[24:])
    benefits = fit_routers(model, text[:24])
    fit_dial(model, text[:24])
    after = evaluate(model, text[24:], 0.5, reference=dense[24:])
    assert len(benefits) == 3
    assert all(benefit > 0 for benefit in benefits)
    assert after.load == pytest.approx(before.load, abs=0.12)
    assert after.agreement > before.agreement


# Where routers start


def test_the_layer_that_does_nothing_closes_first(blocks):
    """Of two that do nothing and one that does, the one is last; at p the first p M layers in order are closed."""
    model = dense_model("llama")
    for layer in (1, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[layer].get_submodule(name).weight.zero_()
    convert(model, MoDConfig())
    order = stagger(model, blocks)
    assert sorted(order[:2]) == [1, 3]
    assert order[2] == 2
    for closed in range(4):
        found = evaluate(model, blocks, closed / 3 if closed else 0.0)
        loads = dict(zip(model.mod_layers, found.layer_loads, strict=True))
        assert [loads[index] > 0.5 for index in order] == [at >= closed for at in range(3)]
        assert found.load == pytest.approx(1 - closed / 3, abs=0.12)  # the first token of a row always runs


def test_every_layer_is_measured_until_few_are_left():
    assert rounds(3) == [(3, 1), (2, 1), (0, 1)]
    assert rounds(12) == [(12, 2), (10, 2), (8, 2), (6, 2), (4, 2), (0, 2)]
    assert rounds(13) == [(13, 3), (10, 3), (7, 3), (4, 3), (0, 1)]


def test_in_a_deep_model_several_layers_close_at_once(blocks):
    model = mod_model("llama", num_hidden_layers=20)
    order = removal_order(model, blocks[:2])
    assert sorted(order) == list(range(1, 19))


@pytest.mark.parametrize("start", ["ordered", "open"])
def test_a_conversion_starts_where_it_is_told(start, blocks, tmp_path):
    """One step at almost no rate: what the recipe began with is what it ends with, but for the dial's scale."""
    model, _, report = run(named("any-p", **{**SMALL, "tokens": 64, "lr": 1e-9, "router_lr": 1e-9, "start": start}),
                           blocks, tmp_path / "out")
    assert report["start"] == start
    biases = [router.bias.item() for router in routers(model)]
    if start == "open":
        assert report["order"] is None
        assert max(biases) == pytest.approx(min(biases))
    else:
        assert sorted(report["order"]) == [1, 2, 3]
        assert sorted(range(3), key=biases.__getitem__) == [index - 1 for index in report["order"]]


# Layers chosen by measure


def test_the_layer_that_does_nothing_is_chosen_first(blocks):
    """A layer whose outputs are zero turns no hidden state."""
    model = dense_model("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[2].get_submodule(name).weight.zero_()
    measured = choosing.influence(model, blocks)
    assert measured[2] == pytest.approx(0, abs=1e-5)
    assert min(measured[at] for at in (0, 1, 3, 4)) > 0.01
    assert choosing.choose(model, "auto:1", blocks) == ((2,), measured)
    chosen, ranks = choosing.choose(model, "auto:2:rank", blocks)
    assert len(chosen) == 2
    assert all(0 < rank <= 16 for rank in ranks)


@pytest.mark.parametrize("text", ["auto:0", "auto:6", "auto:two", "auto", "auto:2:luck"])
def test_a_choice_that_cannot_be_made_is_refused(text, blocks):
    with pytest.raises(ValueError, match="layers='auto"):
        choosing.choose(dense_model("llama"), text, blocks)


# Several sources


def test_sources_that_lag_behind_weigh_more():
    """Rows of the lagging source gain weight, the mean over shares stays 1, and checkpoints keep it."""
    mixing = Mixing([0.5, 0.5])
    for _ in range(5):
        mixing.move(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    assert mixing.weights[1] > 1 > mixing.weights[0]
    assert sum(mixing.weights) / 2 == pytest.approx(1)
    assert mixing.state()["attributes"]["weights"] == mixing.weights


def test_row_weights_by_hand():
    """A weighted mean over tokens; rows apart."""
    logits, labels = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    rows = row_losses(logits, labels)
    weighted = next_token_loss(logits, labels, torch.tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx((rows[0] + 3 * rows[1]).item() / 4, abs=1e-6)


# The report


def test_the_table_has_a_row_for_each_p(blocks):
    """Agreement with itself at p = 0 is whole; KV and compute fall with load."""
    rows = rows_of(mod_model("llama"), blocks)
    assert len(table(rows).splitlines()) == 2 + len(rows) == 13
    assert rows[0].quality.agreement == 1.0
    assert rows[0].kv == 1.0
    assert rows[-1].kv < 0.6
    assert rows[-1].compute < rows[0].compute
    assert record(rows)[3]["p"] == 0.3
