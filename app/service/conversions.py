"""Conversions: the command line's own `convert` in a process of its own, watched through the files it writes.

A process can be ended at any moment, and what it wrote stays: checkpoints, log and settings. One at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from app.errors import UserError
from app.service.jobs import beside
from app.service.paths import real
from modification import MoDModel
from modification.conversion.calibrate import CALIBRATION_TOKENS
from modification.conversion.checks import CHECKPOINTS, REPORT, RUN, last_checkpoint
from modification.conversion.order import ORDER_TOKENS, rounds
from modification.conversion.recipes import RECIPES, Tune
from modification.conversion.runlog import LOG, drop_redone, read_log
from modification.loading import load_dense_or_mod, resolve
from modification.measure.memory import available_bytes, weight_bytes

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_POLL = 0.5
_PATIENCE = 5.0  # seconds
_GRACE = 60.0  # seconds for a step and a checkpoint
_PASSES = 4.0  # a training step's work over one forward pass: student forward and twice that backward, teacher forward
_FITTING, _DIAL = 13.0, 28.0  # forward passes over the calibration text: to fit routers, to make the dial true
_COPIES = 5  # float32 numbers per weight: student, teacher, gradient and Adam's two moments


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion as the user asked for it."""

    parent: str
    name: str
    data: str
    layers: str = "inner"
    recipe: str = "any-p"
    tune: str = "full"
    tokens: int = 300_000
    block: int = 256
    batch: int = 8
    resume: bool = False

    def command(self, out: Path) -> list[str]:
        """The same conversion on the command line."""
        words = [
            "-m", "modification", "convert", self.parent, str(out), "--data", self.data, "--layers", self.layers,
            "--recipe", self.recipe, "--block", str(self.block), "--batch", str(self.batch),
        ]
        if not self.fits:
            words += ["--tune", self.tune, "--tokens", str(self.tokens)]
        return [*words, "--resume"] if self.resume else words

    @property
    def fits(self) -> bool:
        """Whether routers are fitted, without training."""
        return RECIPES[self.recipe].fit

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return 0 if self.fits else self.tokens // (self.block * self.batch)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a conversion stands.

    Attributes:
        log: one record per ten steps: step, loss parts, load, and load per MoD layer.
        seconds: since it was started.
        left: seconds still to go, estimated from the steps so far; None before the first record.
        ended: how it ended, as a sentence; empty while it goes on.
        failed: whether that is an error.
    """

    steps: int
    log: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    left: float | None = None
    ended: str = ""
    failed: bool = False


@dataclass(slots=True)
class Conversions:
    """Starts conversions into ``folder``, one at a time."""

    folder: Path
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _process: subprocess.Popen[bytes] | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def finished(self) -> dict[str, Path]:
        """Converted models in the folder, by name."""
        return {path.parent.name: path.parent for path in sorted(self.folder.glob(f"*/{REPORT}"))}

    def unfinished(self) -> dict[str, int]:
        """Conversions that were broken off, by name, with the steps of their last checkpoint; 0 without one."""
        finished = self.finished()
        found = {path.parent.name: 0 for path in sorted(self.folder.glob(f"*/{RUN}"))}
        for path in self.folder.glob(f"*/{CHECKPOINTS}/checkpoint-*/trainer_state.json"):  # written last
            name, step = path.parents[2].name, path.parent.name.rpartition("-")[2]
            if step.isdigit():
                found[name] = max(found.get(name, 0), int(step))
        return {name: step for name, step in found.items() if name not in finished}

    def end(self) -> None:
        """Begin none any more, and have the one under way, if there is one, write a checkpoint and end."""
        self._over.set()
        if (process := self._process) is not None:
            process.terminate()

    def estimate(self, plan: Plan) -> tuple[float, float, int]:
        """Seconds and bytes that a conversion will take, and bytes that are free.

        Estimated from a measured forward pass and the model's size; what is free is measured.

        Raises:
            UserError: the parent can't be loaded.
        """
        self.check(plan)
        try:
            source, free = resolve(plan.parent), available_bytes()
            least = (1 if plan.fits else _COPIES) * weight_bytes(source, torch.float32)
            if least > free:
                raise UserError(
                    f"Training {plan.parent} takes at least {least / 1e9:.1f} GB (estimated) and "
                    f"{free / 1e9:.1f} GB are free: choose a smaller model."
                )
            model, _ = load_dense_or_mod(source, dtype=torch.float32)
        except ValueError as error:
            raise UserError(str(error)) from error
        if isinstance(model, MoDModel):
            raise UserError(f"{plan.parent} is a MoD model already: choose its dense parent.")
        taken = self._memory(plan, model)
        if taken > free:
            raise UserError(
                f"{plan.batch} rows of {plan.block:,} tokens take {taken / 1e9:.1f} GB in training (estimated) and "
                f"{free / 1e9:.1f} GB are free: choose fewer rows, or fewer tokens per row."
            )
        ids = torch.zeros(plan.batch, plan.block, dtype=torch.long)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
            times.append(time.perf_counter() - start)
        passes = _PASSES * plan.steps + self._tokens_beside(plan, model) / ids.numel()
        return float(np.median(times)) * passes, taken, free

    @staticmethod
    def _tokens_beside(plan: Plan, model: Any) -> float:
        """Tokens that are read beside training: to order the layers, fit routers, make the dial true."""
        ordered = RECIPES[plan.recipe].start == "ordered"
        depth = model.config.num_hidden_layers  # as if all were routed
        ordering = ORDER_TOKENS * sum(measured for measured, _ in rounds(depth)) if ordered else 0
        return ordering + CALIBRATION_TOKENS * (_DIAL + (_FITTING if plan.fits else 0))

    @staticmethod
    def _memory(plan: Plan, model: Any) -> float:
        """Bytes that it will take: weights and their companions, logits, hidden states."""
        count, config = sum(p.numel() for p in model.parameters()), model.config
        logits = 3 * 4 * plan.batch * plan.block * config.vocab_size
        hidden = 4 * 20 * plan.batch * plan.block * config.hidden_size * config.num_hidden_layers
        return 4.0 * count * (1 if plan.fits else _COPIES) + logits + hidden

    def check(self, plan: Plan) -> Path:
        """The folder that the plan writes to.

        Raises:
            UserError: a name, number or text file that will not do.
        """
        if not NAME.fullmatch(plan.name):
            raise UserError(
                f"{plan.name!r} is no name for a model folder: use letters, digits, dots, dashes and underscores, "
                "at most 64."
            )
        if plan.recipe not in RECIPES or plan.tune not in get_args(Tune):
            raise UserError(f"There is no recipe {plan.recipe} with {plan.tune} tuning: choose from the lists.")
        if plan.parent.startswith("-"):
            raise UserError(f"{plan.parent} is neither a folder here nor a Hub id of the form owner/name.")
        if not plan.fits and plan.steps < 10:
            raise UserError(
                f"{plan.tokens:,} tokens are {plan.steps} steps of {plan.block * plan.batch:,}: give at least "
                f"{10 * plan.block * plan.batch:,}."
            )
        if (self.folder / plan.name / REPORT).is_file():
            raise UserError(f"{plan.name} is a finished model already: choose another name.")
        if not real(plan.data).is_file():
            raise UserError(f"There is no text file at {plan.data}. Upload one, or give its path.")
        return real(self.folder) / plan.name

    def run(self, plan: Plan) -> Iterator[Progress]:
        """Convert; progress until the end. Closing the iterator ends the process and keeps its last checkpoint.

        Raises:
            UserError: a plan that will not do, or another conversion that is going on.
        """
        out = self.check(plan)
        plan = dataclasses.replace(plan, data=str(real(plan.data)), parent=_placed(plan.parent))
        if not self._busy.acquire(timeout=_PATIENCE):  # one that was cancelled may be about to end
            raise UserError("Another conversion is going on here, and one at a time is all that fits. Try later.")
        if self._over.is_set():
            self._busy.release()
            raise UserError("The app is shutting down: no conversion is begun.")
        output, began = real(self.folder) / f"{plan.name}.out", time.monotonic()
        try:
            last = last_checkpoint(out / CHECKPOINTS)
            # What an earlier run logged beyond its last checkpoint is done again.
            if plan.resume:
                drop_redone(out / LOG, int(last.rpartition("-")[2]) if last else 0)
            fresh = len(read_log(out / LOG))
            process = self._process = self._start(plan, out, output)
            if self._over.is_set():  # since it was looked at: whoever set it may have seen no process yet
                process.terminate()
        except BaseException:
            self._busy.release()
            raise
        try:
            while (code := process.poll()) is None:
                yield _progress(plan, out, began, fresh)
                time.sleep(_POLL)
        finally:
            # Not here: whoever closes this iterator must not wait for the process.
            beside(functools.partial(self._end, process))
        end, failed = f"Converted: {out}", False
        if code:
            end, failed = _last_words(output) if code > 0 else f"The conversion was ended by signal {-code}.", True
        now = _progress(plan, out, began, fresh)
        yield Progress(plan.steps, now.log, now.seconds, 0.0, end, failed)


    def _start(self, plan: Plan, out: Path, output: Path) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                [sys.executable, *plan.command(out)], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parents[2],
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """See the process to its end, and let the next one in."""
        try:
            process.terminate()
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            self._process = None
            self._busy.release()


def _progress(plan: Plan, out: Path, began: float, fresh: int) -> Progress:
    log, seconds = read_log(out / LOG), time.monotonic() - began
    left = None
    if len(log) > fresh:
        done = log[-1]["step"] - (log[fresh - 1]["step"] if fresh else 0)
        left = seconds / max(1, done) * (plan.steps - log[-1]["step"])
    return Progress(plan.steps, tuple(log), seconds, left)


def _placed(parent: str) -> str:
    place = real(parent)
    return str(place) if place.is_dir() else parent


def _last_words(output: Path) -> str:
    """The sentence that a failed command ended with."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "it said nothing")
    return f"The conversion failed: {said.removeprefix('error: ')}"
