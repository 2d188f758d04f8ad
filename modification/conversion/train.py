"""The conversion run: a recipe on transformers.Trainer, resumable, then calibration and report."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from modification.config import MoDConfig
from modification.conversion.calibrate import CALIBRATION_TOKENS, fit_dial, fit_routers, set_dial
from modification.conversion.checks import (
    CHECKPOINTS,
    REPORT,
    Options,
    disk_errors,
    prepare_folder,
    processes,
    written_whole,
)
from modification.conversion.data import Text
from modification.conversion.order import ORDER_TOKENS, stagger
from modification.conversion.recipes import Recipe
from modification.conversion.runlog import LOG, read_log
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
from modification.measure.quality import reference_of
from modification.model import MoDModel, convert


def train(
    model: PreTrainedModel, tokenizer: Any, config: MoDConfig, recipe: Recipe, text: Text, out: Path,
    options: Options | None = None, teacher: nn.Module | None = None,
) -> list[reporting.Row]:
    """Convert a dense model by a recipe, calibrate it, and write it with a report to ``out``.

    A MoD model goes on from where it is, with its own settings (``config`` is not read), beside a dense ``teacher``.

    Checkpoints go to ``out/checkpoints`` and are removed once the model is written. Returns the sweep
    over eleven p's on the held-out text.

    Args:
        teacher: another model of the same vocabulary to learn from; the dense parent by default.

    Raises:
        ValueError: too little text for one batch; a teacher of another vocabulary, or one that is no dense model; a MoD
            model without one, or with a recipe of another gate; or a resumed run's settings differ from those it began
            with.
        InterruptedError: the process was told to terminate; a checkpoint holds what was done.
        FileExistsError: ``out`` holds a finished conversion, an unfinished one and ``resume`` is not set, or anything
            else: the parent, say.
        OSError: ``out`` can't be written, or the disk has no room for the checkpoints.
    """
    options = options or Options()
    if recipe.steps and len(text.blocks) < recipe.batch:
        raise ValueError(f"the text gives {len(text.blocks)} blocks of {recipe.block} tokens, fewer than a batch of "
                         f"{recipe.batch}: give more text, or a smaller batch or block")
    onwards = isinstance(model, MoDModel)
    _check_teacher(teacher, model, recipe)
    config = model.mod_config if onwards else dataclasses.replace(config, gate=recipe.gate)
    last = prepare_folder(out, model, recipe, config, text, options)
    if teacher is None and (recipe.kl or recipe.hidden or text.reweight) and recipe.steps:
        teacher = copy.deepcopy(model)
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    torch.manual_seed(recipe.seed)
    model.eval()
    parent = reference_of(teacher if onwards else model, text.held_out)
    if onwards:
        set_dial(model, ())  # training is for the routers' own scores
    else:
        convert(model, config)
    began = time.monotonic()
    ordered = recipe.start == "ordered" and not onwards
    order = stagger(model, text.first(ORDER_TOKENS)) if ordered else None
    finish = prepare(model, recipe)
    benefits, spread = None, "NO"
    if recipe.fit:
        benefits = fit_routers(model, text.first(recipe.tokens))
    else:
        model, spread = _run(model, teacher, recipe, text, out, options, last)
    seconds = time.monotonic() - began
    if processes()[0]:  # the first process writes
        return []
    dial = fit_dial(model, text.first(CALIBRATION_TOKENS))
    facts = {
        "mod": model.config.mod, "onwards": onwards, "seconds_this_run": round(seconds, 1), "resumed": last is not None,
        "calibration": dataclasses.asdict(dial), "benefits": benefits, "order": order,
        "distributed": spread, "sources": list(text.names),
        **options.facts,
    }
    rows, report = _report(model, tokenizer, recipe, text, facts, parent)
    _plot(out)
    with written_whole(out) as aside:
        finish(aside if options.keep_adapter else None)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        card = reporting.card(report, rows, out.name, str(options.facts.get("parent", "a dense model")))
        (aside / "README.md").write_text(card, encoding="utf-8")
        (aside / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
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


def _plot(out: Path) -> None:
    """Plots of the log, where there is one and plotly to draw it."""
    if (log := read_log(out / LOG)) and importlib.util.find_spec("plotly") is not None:
        plot_run(log, out / "plots")


def _check_teacher(teacher: Any, model: Any, recipe: Recipe) -> None:
    onwards = isinstance(model, MoDModel)
    if onwards and (teacher is None or isinstance(teacher, MoDModel)):
        raise ValueError("a MoD model goes on training beside its dense parent: give that as the teacher")
    if onwards and recipe.gate != model.mod_config.gate:
        raise ValueError(f"a model with gate={model.mod_config.gate!r} can't go on by recipe {recipe.name}, which has "
                         f"{recipe.gate!r}: convert the parent by it")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"the teacher has {teacher.config.vocab_size} tokens and the parent "
                         f"{model.config.vocab_size}: KL needs one vocabulary")


def _run(
    model: PreTrainedModel, teacher: nn.Module | None, recipe: Recipe, text: Text, out: Path, options: Options,
    last: str | None,
) -> tuple[PreTrainedModel, str]:
    """Train; the trained model, whole again where it was sharded, and how it was spread over processes."""
    caching = getattr(model.config, "use_cache", True)  # Trainer turns it off, and it would be saved so
    trainer = _trainer(model, teacher, recipe, text, out, options)
    with asked_to_end() as asked:
        trainer.add_callback(SaveAndStop(asked))
        with disk_errors(out):
            if last is not None and int(last.rpartition("-")[2]) >= recipe.steps:
                trainer._load_from_checkpoint(last)  # trained to the end: `train` would do one step more
            else:
                trainer.train(resume_from_checkpoint=last)
    if asked.is_set() and trainer.state.global_step < recipe.steps:
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {recipe.steps}: --resume goes on")
    model.config.use_cache = caching
    spread = trainer.accelerator.distributed_type.value
    if not options.fsdp:
        return model, spread
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part
    whole = type(model)(model.config)
    if trainer.is_world_process_zero():
        whole.load_state_dict(weights)
    return whole, spread


def _trainer(
    model: PreTrainedModel, teacher: nn.Module | None, recipe: Recipe, text: Text, out: Path, options: Options
) -> ConversionTrainer:
    cuda = torch.cuda.is_available()
    parts = recipe.accumulate * processes()[1]
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
        recipe, teacher, options.compile, model=model, args=arguments, train_dataset=text.dataset(),
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
