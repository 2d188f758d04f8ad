"""Conversion that learns: text in, objectives by hand, a dial made true, and runs that can be stopped and resumed."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import math

import numpy as np
import pytest
import torch
from builders import assert_close, dense_model, mod_model, routers, tiny_tokenizer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modification import MoDConfig, MoDModel, load
from modification.conversion import train as training
from modification.conversion.calibrate import bend_dial, fit_dial
from modification.conversion.checks import Options
from modification.conversion.data import Blocks, Documents, Text, pack, pack_whole, read_documents
from modification.conversion.objectives import (
    Learnt,
    draw_thresholds,
    excess,
    load_penalty,
    next_token_loss,
    row_loads,
)
from modification.conversion.recipes import Recipe, default_lr
from modification.measure.quality import evaluate, sweep

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


# Data


def texts(path, tokenizer=None, split=None):
    """The documents of a file as text, marks of start and end included."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [tokenizer.decode(ids) for ids in read_documents(path, tokenizer, split)]


WRITERS = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", list(WRITERS))
def test_text_files_are_split_at_their_separator(packing, tmp_path):
    """Each document between a start and an end; blank ones are left out; packed or not."""
    path = tmp_path / f"stories.txt{packing}"
    path.write_bytes(WRITERS[packing](b"One.\n<|endoftext|>\n\n<|endoftext|> Two.<|endoftext|>"))
    assert texts(path) == ["<s>One.</s>", "<s>Two.</s>"]


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), block=st.integers(8, 24))
def test_whole_documents_are_packed_uncut_and_told_apart(lengths, block):
    """Every document once, in one piece unless longer than a block; each token knows its place."""
    documents = [[at] * length for at, length in enumerate(lengths, 1)]
    packed = pack_whole(documents, block)
    ids, places = packed[:, 0], packed[:, 1]
    for at, length in enumerate(lengths, 1):
        rows, columns = (ids == at).nonzero()
        assert len(set(rows)) == 1
        assert places[rows, columns].tolist() == list(range(min(length, block)))
        assert columns.tolist() == list(range(columns[0], columns[0] + len(columns)))
    assert (ids[places >= block] == 0).all()
    assert (ids > 0).sum() == sum(min(length, block) for length in lengths)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), block=st.integers(8, 24))
def test_what_is_left_of_a_block_takes_the_start_of_a_filler(lengths, block):
    """A filler counts its places from 0, and is cut where the block ends; short ones leave padding behind them."""
    documents = [[at] * length for at, length in enumerate(lengths, 1)]
    packed = pack_whole(documents, block, fillers=itertools.repeat([1000] * 5))
    bare = pack_whole(documents, block)
    for (ids, places), (before, spare) in zip(packed, bare, strict=True):
        room = int((spare >= block).sum())
        start, end = block - room, block - max(0, room - 5)
        assert ids[:start].tolist() == before[:start].tolist()
        assert ids[start:end].tolist() == [1000] * min(room, 5)
        assert places[start:end].tolist() == list(range(min(room, 5)))
        assert (places[end:] >= block).all()


def test_packed_tokens_that_are_not_to_be_learnt_are_read_and_no_labels():
    """Those written as -1 - id."""
    packed = pack_whole([[5, -1 - 6, 7], [8, 9]], 8)
    item = Documents(packed)[0]
    assert item["input_ids"].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert item["labels"].tolist() == [-100, -100, 7, -100, 9, -100, -100, -100]
    assert Text(packed, packed[:, 0]).first(8).tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]


def test_packed_documents_do_not_see_one_another():
    """A model gives a document in a block what it gives the document alone; starts and padding are no labels."""
    model = dense_model("llama")
    documents = [[int(t) for t in tokens(1, length, seed=length)[0]] for length in (7, 5, 9)]
    item = Documents(pack_whole(documents, 24))[0]
    with torch.no_grad():
        block, places = item["input_ids"][None], item["position_ids"][None]
        logits = model(input_ids=block, position_ids=places, use_cache=False).logits[0]
        start = 0
        for ids in documents:
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            assert_close(logits[start : start + len(ids)], alone)
            assert item["labels"][start] == -100
            assert item["labels"][start + 1 : start + len(ids)].tolist() == ids[1:]
            start += len(ids)
    assert (item["labels"][start:] == -100).all()


@pytest.mark.parametrize("packing", list(WRITERS))
def test_json_lines_are_read_in_their_three_forms(packing, tmp_path):
    """text, prompt and response, messages; blank lines are passed over; packed or not."""
    rows = [
        {"text": "One."}, {"prompt": " Ask ", "response": "Tell\n"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ]
    path = tmp_path / f"chat.v1.jsonl{packing}"
    path.write_bytes(WRITERS[packing]("\n\n".join(map(json.dumps, rows)).encode()))
    assert texts(path) == ["<s>One.</s>", "<s>Ask??Tell</s>", "<s>Q??A</s>"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert texts(path, tokenizer) == ["<s>One.</s>", "[user]Ask[assistant]Tell", "[user]Q[assistant]A"]


def test_a_split_picks_its_lines(tmp_path):
    """Only JSON lines of that split are read."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "split": "train"}, {"text": "b", "split": "val"}, {"text": "c"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert texts(path, split="val") == ["<s>b</s>"]
    assert len(texts(path)) == 3


def test_a_missing_file_is_named(tmp_path):
    """Before anything else is done."""
    with pytest.raises(FileNotFoundError, match=r"no such text file: .*nothing\.txt"):
        texts(tmp_path / "nothing.txt")


@pytest.mark.parametrize("name", ["text", "text.csv", "text.xz", "text.parquet.gz"])
def test_another_file_type_is_refused(name, tmp_path):
    """The message lists what can be read."""
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"expected \.txt or \.jsonl"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    "line", ["{", '{"title": "x"}', "3", '"text"', "null", "[1]", '{"text": null}', '{"text": 5}',
             '{"prompt": 1, "response": "x"}', '{"messages": [3]}', '{"messages": "x"}'],
)
def test_a_wrong_line_is_named(line, tmp_path):
    """A ValueError with the file and the line's number, whatever is wrong with it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        texts(path)


DAMAGED = {
    "cut.txt.xz": lzma.compress(b"some text " * 50)[:-20],
    "cut.txt.gz": gzip.compress(b"some text " * 50)[:-20],
    "wrong.txt.xz": b"not packed at all",
    "wrong.txt.gz": b"not packed at all",
    "latin.txt": b"caf\xe9",
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_a_damaged_file_is_refused(name, tmp_path):
    """Truncated, not what its name says, or not UTF-8: an OSError or a ValueError, which the command line can tell."""
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises((OSError, ValueError)):
        texts(tmp_path / name)


def test_packing_joins_and_cuts():
    """Documents end to end; a last partial block is dropped; max_tokens stops early."""
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert pack(documents, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert pack(documents, 2, max_tokens=5).tolist() == [[1, 2], [3, 4]]
    assert pack(documents, 3).dtype == np.int32


def test_packing_reads_no_further_than_needed():
    """An endless source is fine when max_tokens is given."""
    def endless():
        while True:
            yield [7] * 10

    assert pack(endless(), 8, max_tokens=24).shape == (3, 8)


def test_too_little_text_is_refused():
    """The message says how much would do."""
    with pytest.raises(ValueError, match="fewer than 8 tokens"):
        pack([[1, 2, 3]], 8)


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens_are_refused(tokens):
    """Where a number of them is asked for."""
    with pytest.raises(ValueError, match=f"tokens={tokens}: must be 1 or more"):
        pack([[1, 2, 3]], 2, tokens)


@pytest.mark.parametrize("block", [0, -1])
def test_an_empty_block_is_refused(block):
    """A block holds at least one token."""
    with pytest.raises(ValueError, match="block"):
        pack([[1, 2, 3]], block, 8)


def test_blocks_are_their_own_labels():
    """Every token is learnt."""
    row = Blocks(np.array([[1, 2], [3, 4]], np.int32))[1]
    assert row["input_ids"].tolist() == row["labels"].tolist() == [3, 4]
    assert row["input_ids"].dtype == torch.long


# Objectives


def test_thresholds_are_spread_over_the_range():
    """The dense share at 0, then one in each equal slice."""
    p = draw_thresholds(8, 0.25, (0.1, 0.7))
    assert p[:2].tolist() == [0.0, 0.0]
    for at, value in enumerate(p[2:].tolist()):
        assert 0.1 + 0.1 * at <= value <= 0.1 + 0.1 * (at + 1)


@pytest.mark.parametrize(("batch", "share"), [(1, 0.25), (3, 0.0), (4, 0.99)])
def test_every_row_gets_a_threshold(batch, share):
    """Small batches too."""
    p = draw_thresholds(batch, share, (0.0, 1.0))
    assert p.shape == (batch,)
    assert ((p >= 0) & (p <= 1)).all()


def test_row_loads_count_and_carry_gradients(gradients):
    """Shares of layer-token pairs per row; the gradient is that of the soft gate, for skipped tokens too."""
    scores = tuple(torch.tensor(s, requires_grad=True) for s in ([[0.2, 0.9], [0.6, 0.4]], [[0.7, 0.8], [0.1, 0.3]]))
    p = torch.tensor([0.5, 0.35])
    routed = tuple((s >= p[:, None]).detach() for s in scores)
    loads = row_loads(scores, routed, p)
    assert loads.tolist() == [0.75, 0.5]
    loads.sum().backward()
    for s in scores:
        soft = torch.sigmoid(torch.logit(s.detach()) - torch.logit(p)[:, None])
        expected = soft * (1 - soft) / (s * (1 - s)).detach() / 4
        torch.testing.assert_close(s.grad, expected, atol=1e-5, rtol=1e-4)


def test_the_load_penalty_by_hand():
    """Mean square distance to 1 - p."""
    assert load_penalty(torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.3])).item() == pytest.approx(0.02)


def test_the_next_token_loss_by_hand():
    """Each logit row is scored on the following token; the last scores nothing."""
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [9.0, -9.0]]])
    loss = next_token_loss(logits, torch.tensor([[0, 1, 0]]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(5 / 4)) / 2, abs=1e-6)


def test_the_divergence_by_hand():
    """KL of the student from the teacher, mean over tokens; 0 from itself."""
    def divergence(teacher, student, labels):
        learnt = Learnt.of(labels)
        return learnt.mean(excess(learnt.pick(student), learnt.pick(teacher)))

    teacher = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    teacher, student = (torch.cat([each, each[:, :1]], 1) for each in (teacher, student))  # the last predicts nothing
    expected, labels = (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2, torch.tensor([[0, 1, 1]])
    assert divergence(teacher, student, labels).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-7)
    assert divergence(teacher + 3.0, student - 2.0, labels).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(teacher, student, torch.tensor([[0, 1, -100]])).item() == pytest.approx(2 * expected, abs=1e-6)


# Recipes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": 0}, "block=0: must be 1 or more"),
        ({"batch": -1}, "batch=-1: must be 1 or more"),
        ({"tokens": 10}, r"tokens=10: one step takes 2048 \(block 256 x batch 8\)"),
        ({"dense_share": 1.1}, "dense_share=1.1"),
        ({"dense_share": -0.1}, "dense_share=-0.1"),
    ],
)
def test_a_recipe_out_of_bounds_is_refused(values, message):
    """The value and the bound are named."""
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_steps_are_the_tokens_over_the_batch():
    """Whole steps only."""
    assert Recipe(tokens=1000, block=10, batch=7).steps == 14


def test_the_learning_rate_falls_with_size():
    """Small models move fast, large ones carefully."""
    rates = [default_lr(size) for size in (260_000, 10**8, 10**9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 3e-5


# Quality and the dial


@pytest.fixture(scope="module")
def blocks():
    """Learnable text: 24 blocks of 16 tokens, short cycles from a few letters."""
    noise = np.random.default_rng(0)
    rows = [np.resize(noise.integers(0, 40, 5), 16) for _ in range(24)]
    return np.stack(rows).astype(np.int32)


def test_evaluate_is_the_mean_over_blocks(blocks):
    """Loss, its standard error and loads, recomputed block by block."""
    model = mod_model("llama")
    found = evaluate(model, blocks, 0.5, batch=7)
    losses, routed = [], []
    for row in blocks:
        ids = torch.tensor(row.astype(np.int64))[None]
        out = model(ids, p=0.5, output_router_scores=True)
        losses.append(next_token_loss(out.logits, ids).item())
        routed.append(torch.stack(out.routed).float()[:, 0])
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.error == pytest.approx(np.std(losses) / math.sqrt(24), abs=1e-4)
    assert found.layer_loads == pytest.approx(torch.cat(routed, 1).mean(1).tolist(), abs=1e-6)
    assert found.load == pytest.approx(np.mean(found.layer_loads), abs=1e-6)
    assert found.tokens == blocks.size


def test_load_falls_as_p_rises(blocks):
    """Over the grid, from all to (almost) none."""
    rows = sweep(mod_model("llama", MoDConfig(anchors=0)), blocks)
    loads = [row.load for row in rows]
    assert loads[0] == 1.0
    assert loads[-1] == 0.0
    assert all(later <= earlier + 0.02 for earlier, later in itertools.pairwise(loads))


@pytest.mark.parametrize(("spread", "bias"), [(1.5, 1.5), (0.5, -0.5), (3.0, 0.0)])
def test_fitting_the_dial_brings_load_to_one_minus_p(spread, bias, blocks):
    """Shifted, flat or steep scores; what is reported is what was folded into the routers and the config."""
    model = mod_model("llama", spread=spread)
    for router in routers(model):
        router.bias.add_(bias)
    before = [(router.weight.clone(), router.bias.clone()) for router in routers(model)]
    dial = fit_dial(model, blocks)
    loads = [evaluate(model, blocks, p).load for p in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)]
    floor = 1 / 16  # the first token of 16 runs at every p
    for p, reached in zip((0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9), loads, strict=True):
        assert reached == pytest.approx(max(1 - p, floor), abs=0.03)
    assert model.mod_config.dial == dial.knots
    for router, (weight, bias_before) in zip(routers(model), before, strict=True):
        torch.testing.assert_close(router.weight, dial.scale * weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(router.bias, dial.scale * bias_before + dial.shift, atol=1e-4, rtol=1e-4)
    again = fit_dial(model, blocks)  # from scratch, whatever dial there was
    assert evaluate(model, blocks, 0.5).load == pytest.approx(0.5, abs=0.03)
    assert len(again.knots) == len(dial.knots)


@pytest.mark.parametrize(("spread", "bias"), [(4.0, 8.0), (3.0, 9.0), (4.0, -8.0)])
def test_scores_that_crowd_near_1_or_0_are_bent_apart(spread, bias, blocks):
    """By the knots alone, where no weight may change: most scores in the last or first thousandth, some far from it."""
    model = mod_model("llama", MoDConfig(anchors=0), spread=spread)
    for router in routers(model):
        router.bias.add_(bias)
    weights = [(router.weight.clone(), router.bias.clone()) for router in routers(model)]
    knots = bend_dial(model, blocks)
    assert list(knots) == sorted(knots)
    for p in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        assert evaluate(model, blocks, p).load == pytest.approx(1 - p, abs=0.03)
    for router, (weight, shift) in zip(routers(model), weights, strict=True):
        assert torch.equal(router.weight, weight)
        assert torch.equal(router.bias, shift)


# The run


RECIPE = Recipe(tokens=32 * 4 * 16, block=16, batch=4, lr=2e-3)


class Stopped(Exception):
    """What stops a run in these tests."""


def run(blocks, out, resume=False):
    """One conversion of the same tiny parent."""
    model = dense_model("llama")
    options = Options(resume=resume)
    rows = training.train(model, tiny_tokenizer(), MoDConfig(), RECIPE, Text(blocks, blocks[:4]), out, options)
    return model, [row.quality for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, blocks):
    """A conversion that ran through, its folder and its sweep."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with torch.enable_grad():
        model, rows = run(blocks, out)
    return model, rows, out


def log_of(out):
    """The run's log, one entry a line."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_writes_model_report_and_log(finished):
    """And removes its checkpoints."""
    model, rows, out = finished
    assert not (out / "checkpoints").exists()
    again, tokenizer = load(out)
    assert isinstance(again, MoDModel)
    assert tokenizer("Hi")["input_ids"] == [40, 73]
    ids = torch.arange(12)[None]
    assert_close(again(ids, p=0.5).logits, model.eval()(ids, p=0.5).logits)
    report = json.loads((out / "report.json").read_text())
    assert report["mod"] == model.config.mod
    assert {**report["mod"], "dial": []} == MoDConfig().to_dict()
    assert again.config.use_cache is dense_model("llama").config.use_cache is True
    assert report["resumed"] is False
    assert [row["p"] for row in report["sweep"]] == [row.p for row in rows]
    assert [row["loss"] for row in report["sweep"]] == pytest.approx([row.loss for row in rows])
    log = log_of(out)
    assert [entry["step"] for entry in log] == [10, 20, 30]
    for entry in log:
        assert {"loss", "cross_entropy", "kl", "load_penalty", "load", "load_error"} <= set(entry)


def test_a_run_learns(finished, blocks):
    """Held-out loss at every p is below the untrained parent's, and the log's loss falls."""
    _, rows, out = finished
    untrained = sweep(mod_model("llama", MoDConfig()), blocks[:4], [0.0])[0].loss
    assert all(row.loss < untrained for row in rows)
    losses = [entry["cross_entropy"] for entry in log_of(out)]
    assert losses[-1] < losses[0]


def test_the_logged_loss_is_the_sum_of_its_parts(finished):
    """ce, kl and penalty with the recipe's weights."""
    for entry in log_of(finished[2]):
        parts = (
            RECIPE.ce * entry["cross_entropy"] + RECIPE.kl * entry["kl"] + RECIPE.penalty * entry["load_penalty"]
        )
        assert float(entry["loss"]) == pytest.approx(parts, rel=1e-3)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, blocks):
    """A conversion stopped after step 31, refused without --resume, then resumed from its checkpoint at 20."""
    out = tmp_path_factory.mktemp("runs") / "resumed"
    whole = training.ProgressBar

    class StopsAtStep31(whole):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 31:
                raise Stopped

    with torch.enable_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ProgressBar", StopsAtStep31)
        with pytest.raises(Stopped):
            run(blocks, out)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-20"]
        patch.setattr(training, "ProgressBar", whole)
        with pytest.raises(FileExistsError, match="--resume"):
            run(blocks, out)
        torch.manual_seed(12345)
        model, rows = run(blocks, out, resume=True)
    return model, rows, out


def test_a_stopped_and_resumed_run_reaches_the_same_weights(finished, resumed):
    """Those of a run that was never stopped, in fp32, whatever the random state it was resumed in."""
    for ours, theirs in zip(resumed[0].state_dict().values(), finished[0].state_dict().values(), strict=True):
        assert_close(ours, theirs)
    assert [row.load for row in resumed[1]] == [row.load for row in finished[1]]


def test_a_resumed_run_says_so_and_leaves_no_checkpoints(resumed):
    """In its report."""
    assert json.loads((resumed[2] / "report.json").read_text())["resumed"] is True
    assert not (resumed[2] / "checkpoints").exists()


def test_a_resumed_run_logs_each_step_once(resumed):
    """Steps redone after the checkpoint don't appear twice."""
    assert [entry["step"] for entry in log_of(resumed[2])] == [10, 20, 30]


def test_the_parent_is_the_teacher_and_stays_dense(finished):
    """The run converts the model it is given; at p = 0 it is still near its parent."""
    model, rows, out = finished
    assert isinstance(model, MoDModel)
    assert rows[0].load == 1.0
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert type(stock) is type(model)


def test_fewer_blocks_than_a_batch_are_refused(blocks, tmp_path, gradients):
    """A run that could take no step says so instead of writing an untrained model."""
    with pytest.raises(ValueError, match="batch"):
        training.train(
            dense_model("llama"), tiny_tokenizer(), MoDConfig(), RECIPE, Text(blocks[:3], blocks[:2]), tmp_path / "run"
        )
    assert not (tmp_path / "run" / "model.safetensors").exists()
