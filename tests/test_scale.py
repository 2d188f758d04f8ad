"""Conversions at scale, tried small: several processes, sharding, kills, full disks."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_step
import torch
from builders import REPO, assert_close, dense_model, save_folder
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from warm import Forked, together

from modification.cli import main
from modification.conversion import checks
from modification.conversion import train as training

SETTINGS = ["--tokens", "2560", "--block", "16", "--batch", "8", "--save-steps", "5", "--lr", "0.002"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny dense parent, and a text for it."""
    folder = tmp_path_factory.mktemp("scale")
    save_folder(dense_model("llama"), folder / "parent")
    noise = random.Random(0)
    stories = ["".join(noise.choices("abcdefgh", k=12)) * 8 for _ in range(30)]
    (folder / "text.txt").write_text("<|endoftext|>".join(stories))
    return folder


def command(work, out, *more):
    """convert's own words."""
    return ["--threads", "1", "convert", str(work / "parent"), str(out), "--data", str(work / "text.txt"), *SETTINGS,
            *more]


def convert(*words):
    """In this process, on the CPU as in those that are compared with it."""
    with torch.enable_grad(), pytest.MonkeyPatch.context() as alone:
        alone.setattr(torch.cuda, "is_available", lambda: False)
        assert main(list(words)) == 0


@pytest.fixture(scope="module")
def whole(work):
    """A conversion in one process that nothing disturbed."""
    convert(*command(work, work / "whole"))
    return work / "whole"


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_weights(ours, theirs):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        assert_close(ours[name], weight)


VARIANTS = {
    "plain": [], "lora-mixed": ["--tune", "lora", "--reweight", "--shares", "0.7,0.3"],
    "responses-accumulated": ["--responses", "--accumulate", "2"],
}


def variant_of(work, variant, out):
    """The words of such a conversion."""
    rows = [{"prompt": "ijkl" * at, "response": "mnop" * (30 - at)} for at in range(30)]
    (told := work / "told.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = command(work, out, *VARIANTS[variant])
    if "mixed" in variant:
        words += ["--data", str(told)]
    if "responses" in variant:
        words[words.index("--data") + 1] = str(told)
    return words


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one(variant, work, whole):
    """Under DDP (gloo): each row draws the same p, and losses, loads and weights are those of one process.

    A low-rank change too, with rows that are weighted as it goes; and rows with little to learn, in several passes.
    """
    if "lora" in variant:
        pytest.importorskip("peft")
    two, one = work / f"two-{variant}", whole if variant == "plain" else work / f"one-{variant}"
    together(main, variant_of(work, variant, two))
    if variant != "plain":
        convert(*variant_of(work, variant, one))
    assert json.loads((two / "report.json").read_text())["distributed"] == "MULTI_CPU"
    assert len(log_of(two)) == len(log_of(one)) == 2
    for ours, theirs in zip(log_of(two), log_of(one), strict=True):
        for name in ("loss", "cross_entropy", "kl", "load_penalty", "load", "layer_loads", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert_same_weights(two, one)


def test_sharded_processes_are_one(tmp_path, gradients):
    """Under FSDP2 (gloo): each holds a part of the weights, and losses and weights are those of one process."""
    together(sharded_step.shard, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = sharded_step.fresh()
    losses = sharded_step.steps(model, slice(None))
    assert found["local"] < 0.6 * sum(weight.numel() for weight in model.parameters())
    assert_close(found["losses"], torch.tensor(losses))
    for name, weight in model.state_dict().items():
        assert_close(found["weights"][name], weight)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_any_step_and_resumed_is_one_that_was_not(seed, work, whole):
    """SIGKILL at a random step; resumed, it has lost at most one interval of checkpoints and ends the same."""
    out = work / f"killed{seed}"
    at = random.Random(seed).uniform(0.2, 0.9)
    process = Forked(main, command(work, out)).process
    checkpoints = out / "checkpoints"
    wanted = 1 + int(at * 3)
    end = time.monotonic() + 240
    while process.is_alive() and _steps(checkpoints) < 5 * wanted:
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    process.kill()
    process.join()
    assert not (out / "report.json").exists()
    reached = _steps(checkpoints)
    assert reached >= 5
    logged = log_of(out)[-1]["step"] if (out / "log.jsonl").is_file() else 0
    assert logged - reached <= 5
    convert(*command(work, out, "--resume"))
    assert_same_weights(out, whole)
    assert [entry["step"] for entry in log_of(out)] == [entry["step"] for entry in log_of(whole)]


class Died(BaseException):
    """What no code foresees, as a kill."""


def test_a_run_that_dies_while_it_writes_leaves_no_half_model(work, whole, tmp_path, monkeypatch, gradients):
    """No file of the model is there until all are; resumed, and dead once more, it ends the same."""
    out = tmp_path / "out"
    for kind, more in ((PreTrainedModel, ()), (PreTrainedTokenizerBase, ("--resume",))):
        real = kind.save_pretrained

        def half(self, folder, *args, real=real, **kwargs):
            if "checkpoint-" in str(folder):
                return real(self, folder, *args, **kwargs)
            Path(folder, "model.safetensors").write_bytes(b"half")
            raise Died

        with monkeypatch.context() as dying:
            dying.setattr(kind, "save_pretrained", half)
            with pytest.raises(Died):
                main(command(work, out, *more))
        assert not (out / "model.safetensors").exists()
        assert not (out / "report.json").exists()
        assert _steps(out / "checkpoints") > 0
    assert main(command(work, out, "--resume")) == 0
    assert not (out / "partial").exists()
    assert_same_weights(out, whole)


def _steps(checkpoints):
    """The newest whole checkpoint's step, nothing removed."""
    whole = [int(path.parent.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return max(whole, default=0)


@pytest.mark.parametrize("broken", ["file", "full"])
def test_a_folder_without_room_is_told_before_training(broken, work, tmp_path, monkeypatch, capsys, gradients):
    """An unwritable place and a full disk are sentences, at once."""
    out = tmp_path / "out"
    if broken == "file":
        (tmp_path / "in the way").write_text("")
        out = tmp_path / "in the way" / "out"
    else:
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(training, "convert", None)  # not reached
    assert main(command(work, out)) == 2
    said = capsys.readouterr().err
    assert ("can't be written" in said) if broken == "file" else ("GB free and checkpoints may take" in said)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(work, whole, tmp_path, monkeypatch, capsys, gradients):
    """A write that fails in mid-checkpoint ends the run with a sentence; resumed with room, it ends the same."""
    real, calls = training.ConversionTrainer._save_optimizer_and_scheduler, []

    def full(self, folder):
        calls.append(folder)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(training.ConversionTrainer, "_save_optimizer_and_scheduler", full)
    assert main(command(work, tmp_path / "out")) == 2
    assert "No space left" in capsys.readouterr().err
    assert checks.last_checkpoint(tmp_path / "out" / "checkpoints").endswith("checkpoint-10")
    monkeypatch.undo()
    assert main(command(work, tmp_path / "out", "--resume")) == 0
    assert_same_weights(tmp_path / "out", whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--load-in-4bit"], "4-bit weights can't be trained; add --tune lora"),
        (["--load-in-4bit", "--tune", "lora"], "needs CUDA, and there is none here"),
        (["--fsdp"], "FSDP"),
        (["--keep-adapter"], "only --tune lora makes an adapter"),
    ],
)
def test_what_this_machine_cannot_do_is_a_sentence(flags, sentence, work, tmp_path, capsys, gradients):
    assert main(command(work, tmp_path / "out", *flags)) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((REPO / "docs" / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_made_settings_are_accelerate_s(path):
    """accelerate reads each file, and it says how many processes there are."""
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert settings.num_processes == 8 * settings.num_machines
    assert settings.distributed_type == "MULTI_GPU"
