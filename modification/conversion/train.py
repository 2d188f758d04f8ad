"""The conversion run: a recipe on transformers.Trainer, resumable, then calibration and report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from modification.config import MoDConfig
from modification.conversion.calibrate import CALIBRATION_TOKENS, fit_dial, fit_routers
from modification.conversion.data import Blocks, Text
from modification.conversion.objectives import next_token_loss
from modification.conversion.recipes import Recipe
from modification.conversion.trainer import (
    ConversionTrainer,
    Mixing,
    ProgressBar,
    SaveAndStop,
    Steering,
    asked_to_end,
)
from modification.conversion.tune import prepare
from modification.measure import report as reporting
from modification.measure.plots import plot_run
from modification.measure.quality import predictions
from modification.model import convert

LOG, RUN, REPORT, CHECKPOINTS = "log.jsonl", "run.json", "report.json", "checkpoints"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run does beside its recipe.

    Attributes:
        resume: go on from the last checkpoint.
        keep_adapter: leave LoRA's change beside the model instead of merging it.
        report_to: Trainer's trackers, as it names them.
        save_steps: steps between checkpoints; None: a tenth of the run, 20 to 200.
        fsdp: shard the model over processes (FSDP2), layer by layer.
        facts: more for the report.
    """

    resume: bool = False
    keep_adapter: bool = False
    report_to: Sequence[str] = ()
    save_steps: int | None = None
    fsdp: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def train(
    model: PreTrainedModel, tokenizer: Any, config: MoDConfig, recipe: Recipe, text: Text, out: Path,
    options: Options | None = None, teacher: nn.Module | None = None,
) -> list[reporting.Row]:
    """Convert a dense model by a recipe, calibrate it, and write it with a report to ``out``.

    Checkpoints go to ``out/checkpoints`` and are removed once the model is written. Returns the sweep
    over eleven p's on the held-out text.

    Args:
        teacher: another model of the same vocabulary to learn from; the dense parent by default.

    Raises:
        ValueError: too little text for one batch, a teacher of another vocabulary, or a resumed run's settings
            differ from those it began with.
        InterruptedError: the process was told to terminate; a checkpoint holds what was done.
        FileExistsError: ``out`` holds a finished conversion, or an unfinished one and ``resume`` is not set.
        OSError: ``out`` can't be written, or the disk has no room for the checkpoints.
    """
    options = options or Options()
    if recipe.steps and len(text.blocks) < recipe.batch:
        raise ValueError(f"the text gives {len(text.blocks)} blocks of {recipe.block} tokens, fewer than a batch of "
                         f"{recipe.batch}: give more text, or a smaller batch or block")
    _check_launch(recipe, options)
    config = dataclasses.replace(config, gate=recipe.gate)
    with _first_process_first():
        last = _claim(out, options.resume)
        _check_room(out, model, recipe)
        _check_same_run(out / RUN, recipe, config, text, options, resumed=last is not None)
    if teacher is None and (recipe.kl or recipe.hidden or text.reweight) and recipe.steps:
        teacher = copy.deepcopy(model)
    _check_teacher(teacher, model)
    torch.manual_seed(recipe.seed)
    model.eval()
    parent = predictions(model, text.held_out), _dense_loss(model, text.held_out)
    convert(model, config)
    began = time.monotonic()
    finish = prepare(model, recipe)
    benefits, spread = None, "NO"
    if recipe.fit:
        benefits = fit_routers(model, _calibration(text.blocks, recipe.tokens))
    else:
        model, spread = _run(model, teacher, recipe, text, out, options, last)
    seconds = time.monotonic() - began
    if int(os.environ.get("RANK", "0")):  # the first process writes
        return []
    dial = fit_dial(model, _calibration(text.blocks, CALIBRATION_TOKENS))
    facts = {
        "mod": model.config.mod, "seconds_this_run": round(seconds, 1), "resumed": last is not None,
        "calibration": dataclasses.asdict(dial), "benefits": benefits,
        "distributed": spread, "sources": list(text.names),
        **options.facts,
    }
    rows, report = _report(model, tokenizer, recipe, text, facts, parent)
    finish(out if options.keep_adapter else None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = reporting.card(report, rows, out.name, str(options.facts.get("parent", "a dense model")))
    (out / "README.md").write_text(card, encoding="utf-8")
    _plot(out)
    (out / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")  # last: it says that all is there
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return rows


def _report(
    model: Any, tokenizer: Any, recipe: Recipe, text: Text, facts: dict[str, Any],
    parent: tuple[npt.NDArray[np.int32], float],
) -> tuple[list[reporting.Row], dict[str, Any]]:
    """Measure the converted model: its table, and what report.json says."""
    model.eval()
    rows = reporting.rows_of(model, text.held_out, reference=parent[0])
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "name"}
    report = {
        "recipe": recipe.name, **settings, **facts, "parent_loss": parent[1],
        "held_out_tokens": int(text.held_out.size), "sweep": reporting.record(rows),
        "retrieval": reporting.retrieval(model, tokenizer, text.held_out),
        "samples": reporting.samples(model, tokenizer, text.held_out),
    }
    return rows, report


@torch.no_grad()
def _dense_loss(model: Any, blocks: npt.NDArray[np.int32]) -> float:
    """Cross-entropy of a dense model, nats per token, mean over blocks."""
    losses = []
    for row in blocks:
        ids = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        losses.append(next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).item())
    return float(np.mean(losses))


def _plot(out: Path) -> None:
    """Plots of the log, where there is one and plotly to draw it."""
    log = out / LOG
    if log.is_file() and importlib.util.find_spec("plotly") is not None:
        plot_run([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()], out / "plots")


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a half-written one, left by a kill, is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while found:
        if _is_json(found[-1] / "trainer_state.json"):  # written last
            return str(found[-1])
        shutil.rmtree(found.pop())
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _claim(out: Path, resume: bool) -> str | None:
    """Take the folder for this run; the checkpoint to go on from, if any."""
    if (out / REPORT).exists():
        raise FileExistsError(f"{out} holds a finished conversion: choose another folder, or remove it first")
    last = last_checkpoint(out / CHECKPOINTS)
    if last and not resume:
        raise FileExistsError(f"{out} holds an unfinished conversion: add --resume to go on, or remove the folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{out} can't be written: {error.strerror or error}") from error
    return last


def _check_room(out: Path, model: PreTrainedModel, recipe: Recipe) -> None:
    """Three checkpoints may lie there at a time, of weights and Adam's moments of those trained; and the model."""
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    copies = 0 if recipe.fit else 9 if recipe.tune == "full" else 3
    wanted, free = (copies + 1) * weights, shutil.disk_usage(out).free
    if free < wanted:
        raise OSError(f"{out} has {free / 1e9:.1f} GB free and checkpoints may take {wanted / 1e9:.1f} GB (estimated): "
                      "make room, or choose a folder on another disk")


def _check_teacher(teacher: Any, model: PreTrainedModel) -> None:
    if teacher is None:
        return
    theirs, ours = teacher.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise ValueError(f"the teacher has {theirs} tokens and the parent {ours}: KL needs one vocabulary")
    teacher.eval().requires_grad_(False)


def _calibration(blocks: npt.NDArray[np.int32], tokens: int) -> npt.NDArray[np.int32]:
    """The first blocks, all their tokens as ids."""
    chosen = blocks[: max(1, tokens // blocks.shape[1])]
    return np.where(chosen < 0, -1 - chosen, chosen).astype(np.int32)


def _check_launch(recipe: Recipe, options: Options) -> None:
    """What this machine or these processes can't do, before anything is done."""
    world, gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if options.fsdp and (world == 1 or not gpus):
        raise ValueError("FSDP needs several processes (accelerate launch), each with an accelerator of its own")
    if options.fsdp and recipe.tune == "lora":
        raise ValueError("FSDP with LoRA is not supported: tune all weights, or leave FSDP out")
    if world == 1 and gpus > 1 and recipe.steps:
        raise ValueError(f"one process and {gpus} GPUs: start with accelerate launch, or set CUDA_VISIBLE_DEVICES=0")
    if recipe.batch % (recipe.accumulate * world):
        raise ValueError(f"a batch of {recipe.batch} rows can't be split over {world} processes and "
                         f"{recipe.accumulate} parts: choose another --batch")


@contextlib.contextmanager
def _first_process_first() -> Iterator[None]:
    """Where there are several processes, the first one goes through before the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    with PartialState().main_process_first():
        yield


def _check_same_run(
    path: Path, recipe: Recipe, config: MoDConfig, text: Text, options: Options, resumed: bool
) -> None:
    """A resumed run must be the one that was started: same recipe, settings and text."""
    run = {
        **dataclasses.asdict(recipe), **config.to_dict(), "training_tokens": int(text.blocks.size),
        "sources": list(text.names), "reweight": text.reweight, "parent": options.facts.get("parent"),
        "text": hashlib.sha256(text.blocks.tobytes() + text.held_out.tobytes()).hexdigest()[:16],
    }
    run = json.loads(json.dumps(run))
    if resumed and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)} (now {run[name]})" for name in run if before.get(name) != run[name]]
        if changed:
            raise ValueError(f"{path.parent} was started with {', '.join(changed)}: resume with the same settings")
    if int(os.environ.get("RANK", "0")) == 0:
        path.write_text(json.dumps(run, indent=1), encoding="utf-8")


def _run(
    model: PreTrainedModel, teacher: nn.Module | None, recipe: Recipe, text: Text, out: Path, options: Options,
    last: str | None,
) -> tuple[PreTrainedModel, str]:
    """Train; the trained model, whole again where it was sharded, and how it was spread over processes."""
    trainer = _trainer(model, teacher, recipe, text, out, options)
    with asked_to_end() as asked:
        trainer.add_callback(SaveAndStop(asked))
        with _disk_errors(out):
            trainer.train(resume_from_checkpoint=last)
    if asked.is_set():
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {recipe.steps}: --resume goes on")
    spread = trainer.accelerator.distributed_type.value
    if not options.fsdp:
        return model, spread
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part
    whole = type(model)(model.config)
    if trainer.is_world_process_zero():
        whole.load_state_dict(weights)
    return whole, spread


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What writers raise on a full disk, as an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{out}: weights could not be written ({error}); the last checkpoint stays") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "file write failed" not in str(error):
            raise
        raise OSError(f"{out}: a checkpoint could not be written, is the disk full? The last one stays") from error


def _trainer(
    model: PreTrainedModel, teacher: nn.Module | None, recipe: Recipe, text: Text, out: Path, options: Options
) -> ConversionTrainer:
    cuda = torch.cuda.is_available()
    parts = recipe.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(out / CHECKPOINTS), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch // parts,
        gradient_accumulation_steps=recipe.accumulate,
        use_cpu=not cuda, bf16=cuda or recipe.bf16,
        save_steps=options.save_steps or max(20, min(200, recipe.steps // 10)), save_total_limit=2, logging_steps=10,
        report_to=list(options.report_to) or "none", disable_tqdm=True, remove_unused_columns=False, seed=recipe.seed,
        dataloader_drop_last=True, restore_callback_states_from_checkpoint=True, ddp_find_unused_parameters=False,
        fsdp=options.fsdp or None, fsdp_config=_sharding(model) if options.fsdp else None,
    )
    if recipe.checkpoint_activations:
        model.gradient_checkpointing_enable()
    mixing = _mixing(text)
    callbacks = [ProgressBar(out / LOG), Steering(recipe.penalty), *([mixing] if mixing else [])]
    trainer = ConversionTrainer(
        recipe, teacher, model=model, args=arguments, train_dataset=Blocks(text.blocks, text.sources),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sharding(model: PreTrainedModel) -> dict[str, Any]:
    """Every decoder layer, routed or not, is one piece."""
    return {"version": 2, "transformer_layer_cls_to_wrap": sorted(set(model._no_split_modules or ()))}


def _mixing(text: Text) -> Mixing | None:
    if not text.reweight or text.sources is None:
        return None
    return Mixing([float((text.sources == at).mean()) for at in range(len(text.names))])
