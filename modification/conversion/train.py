"""The conversion run: any-p training on transformers.Trainer, resumable, then calibration and report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modification.config import MoDConfig
from modification.conversion.calibrate import fit_dial
from modification.conversion.data import Blocks
from modification.conversion.objectives import (
    divergence,
    draw_thresholds,
    load_penalty,
    next_token_loss,
    row_loads,
)
from modification.conversion.recipes import AnyP, default_lr
from modification.measure.quality import Quality, sweep
from modification.model import convert

CALIBRATION_TOKENS = 8_192


class AnyPTrainer(Trainer):
    """transformers.Trainer with the any-p objective; ``load`` beside ``loss`` in its log."""

    def __init__(self, recipe: AnyP, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.teacher = recipe, teacher.to(self.args.device)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        recipe, ids = self.recipe, inputs["input_ids"]
        p = draw_thresholds(len(ids), recipe.dense_share, recipe.p_range).to(ids.device)
        out = model(input_ids=ids, p=p, use_cache=False, output_router_scores=True, routing="masked")
        with torch.no_grad():
            parent = self.teacher(input_ids=ids, use_cache=False).logits
        loads = row_loads(out.router_scores, out.routed, p)
        parts = {
            "cross_entropy": next_token_loss(out.logits, ids),
            "kl": divergence(parent, out.logits),
            "load_penalty": load_penalty(loads, p),
        }
        layers = torch.stack([run.float().mean() for run in out.routed])
        self._note({
            **parts, "load": loads.mean(), "load_error": (loads - (1 - p)).abs().mean(), "layer_loads": layers,
        })
        loss = recipe.ce * parts["cross_entropy"] + recipe.kl * parts["kl"] + recipe.penalty * parts["load_penalty"]
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._count and "loss" in logs:
            means: dict[str, Any] = {name: (total / self._count).tolist() for name, total in self._sums.items()}
            logs = {**logs, **means}
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        self._count += 1


class ProgressBar(TrainerCallback):
    """A bar with loss, load and time left, and one JSON line per log entry in ``log.jsonl``."""

    def __init__(self, log: Path) -> None:
        self.log, self.bar = log, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drop_redone(self.log, state.global_step)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="convert")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "load" in logs:
            self.bar.set_postfix(loss=f"{logs['cross_entropy']:.3f}", load=f"{logs['load']:.2f}")
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class SaveAndStop(TrainerCallback):
    """Once asked, writes a checkpoint after the step under way and ends the training."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked.is_set():
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that is set when the process is told to terminate; it does not end by itself meanwhile."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where signals can't be caught
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def train(
    model: PreTrainedModel, tokenizer: Any, config: MoDConfig, recipe: AnyP,
    blocks: npt.NDArray[np.int32], held_out: npt.NDArray[np.int32], out: Path, resume: bool = False,
) -> list[Quality]:
    """Convert a dense model, train it for every p, calibrate, and write it with a report to ``out``.

    Checkpoints go to ``out/checkpoints`` and are removed once the model is written. Returns the sweep
    over eleven p's on ``held_out`` [N, T].

    Raises:
        ValueError: too little text for one batch, or a resumed run's settings differ from those it began with.
        InterruptedError: the process was told to terminate; a checkpoint holds what was done.
        FileExistsError: ``out`` holds a finished conversion, or an unfinished one and ``resume`` is not set.
    """
    if len(blocks) < recipe.batch:
        raise ValueError(f"the text gives {len(blocks)} blocks of {recipe.block} tokens, fewer than a batch of "
                         f"{recipe.batch}: give more text, or a smaller batch or block")
    if (out / "report.json").exists():
        raise FileExistsError(f"{out} holds a finished conversion: choose another folder, or remove it first")
    checkpoints = out / "checkpoints"
    last = last_checkpoint(checkpoints)
    if last and not resume:
        raise FileExistsError(f"{out} holds an unfinished conversion: add --resume to go on, or remove the folder")
    out.mkdir(parents=True, exist_ok=True)
    _check_same_run(out / "run.json", recipe, config, blocks, resumed=last is not None)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    torch.manual_seed(recipe.seed)
    convert(model, config)
    trainer = _trainer(model, teacher, recipe, blocks, out)
    began = time.monotonic()
    with asked_to_end() as asked:
        trainer.add_callback(SaveAndStop(asked))
        trainer.train(resume_from_checkpoint=last)
    if asked.is_set():
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {recipe.steps}: --resume goes on")
    seconds = time.monotonic() - began
    scale, shift = fit_dial(model, blocks[: max(1, CALIBRATION_TOKENS // blocks.shape[1])])
    rows = sweep(model, held_out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "recipe": "any-p", **dataclasses.asdict(recipe), "mod": config.to_dict(), "seconds_this_run": round(seconds, 1),
        "resumed": last is not None, "calibration": {"scale": scale, "shift": shift},
        "held_out_tokens": int(held_out.size), "sweep": [dataclasses.asdict(row) for row in rows],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return rows


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a half-written one, left by a kill, is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while found:
        if (found[-1] / "trainer_state.json").is_file():  # written last
            return str(found[-1])
        shutil.rmtree(found.pop())
    return None


def _check_same_run(
    path: Path, recipe: AnyP, config: MoDConfig, blocks: npt.NDArray[np.int32], resumed: bool
) -> None:
    """A resumed run must be the one that was started: same recipe, settings and text."""
    run = {**dataclasses.asdict(recipe), **config.to_dict(), "training_tokens": int(blocks.size)}
    run = json.loads(json.dumps(run))
    if resumed and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)} (now {run[name]})" for name in run if before.get(name) != run[name]]
        if changed:
            raise ValueError(f"{path.parent} was started with {', '.join(changed)}: resume with the same settings")
    path.write_text(json.dumps(run, indent=1), encoding="utf-8")


def _trainer(
    model: PreTrainedModel, teacher: nn.Module, recipe: AnyP, blocks: npt.NDArray[np.int32], out: Path
) -> AnyPTrainer:
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch,
        use_cpu=not cuda, bf16=cuda or recipe.bf16, save_steps=max(20, min(200, recipe.steps // 10)),
        save_total_limit=2, logging_steps=10, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        seed=recipe.seed, dataloader_drop_last=True,
    )
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    trainer = AnyPTrainer(
        recipe, teacher, model=model, args=arguments, train_dataset=Blocks(blocks), optimizers=(optimizer, schedule),
        callbacks=[ProgressBar(out / "log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(model: PreTrainedModel, recipe: AnyP) -> torch.optim.Optimizer:
    routers = [p for n, p in model.named_parameters() if ".router." in n]
    weights = [p for n, p in model.named_parameters() if ".router." not in n]
    lr = recipe.lr or default_lr(sum(p.numel() for p in weights))
    groups = [{"params": weights, "lr": lr}, {"params": routers, "lr": recipe.router_lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def drop_redone(log: Path, step: int) -> None:
    """Forget log lines of steps after ``step``, which a resumed run does again."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def _cosine(step: int, recipe: AnyP) -> float:
    warmup = max(1, int(recipe.steps * recipe.warmup))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
