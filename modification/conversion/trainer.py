"""transformers.Trainer with a recipe's loss, and the callbacks of a conversion."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from modification.architectures import FAMILIES
from modification.conversion import objectives
from modification.conversion.recipes import Recipe
from modification.conversion.runlog import drop_redone
from modification.conversion.tune import optimizer
from modification.layer import stock_block

_MIX = 0.05  # how fast sources' weights move, per nat of excess loss
_STEER = 0.02  # change of the load's factor per step and unit of load that is too much


class Steering(TrainerCallback, ExportableState):
    """The factor of the paper's R, moved until the load is right; saved with every checkpoint."""

    def __init__(self, alpha: float = 0.01) -> None:
        self.alpha = alpha

    def move(self, excess: float) -> None:
        """Raise the factor while the load is ``excess`` above its target; below, it turns negative and opens gates."""
        self.alpha = min(1.0, max(-1.0, self.alpha + _STEER * excess))

    def state(self) -> dict[str, Any]:
        return {"args": {"alpha": self.alpha}, "attributes": {}}


class Mixing(TrainerCallback, ExportableState):
    """Weights of the sources in the loss, moved towards those where the model lags most behind its parent.

    Exponentiated gradient on each source's excess loss, as data sets are mixed in Sheared LLaMA (arXiv 2310.06694)
    and DoReMi (arXiv 2305.10429); here the loss is weighted and not the sampling, so that a run can be resumed.
    Saved with every checkpoint.
    """

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares
        self.weights = [1.0] * len(shares)

    def move(self, sources: Tensor, excess: Tensor) -> None:
        """Take in the rows' sources [B] and excess losses over the parent [B], nats."""
        for source, value in zip(sources.tolist(), excess.tolist(), strict=True):
            self.weights[source] *= math.exp(_MIX * max(0.0, value))
        mean = sum(weight * share for weight, share in zip(self.weights, self.shares, strict=True))
        self.weights = [weight / mean for weight in self.weights]

    def state(self) -> dict[str, Any]:
        return {"args": {"shares": self.shares}, "attributes": {"weights": self.weights}}


class ConversionTrainer(Trainer):
    """transformers.Trainer with a recipe's loss; its parts, the load and each MoD layer's load in its log."""

    def __init__(self, recipe: Recipe, teacher: nn.Module | None, compiled: bool = False, **kwargs: Any) -> None:
        both: Callable[..., tuple[Tensor, Tensor]] = objectives.surprise_and_excess
        self._both = torch.compile(both, dynamic=True) if compiled else both
        self._run_block = torch.compile(stock_block) if compiled else None
        self.recipe, self.layers = recipe, len(kwargs["model"].mod_layers)
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it over accumulated parts
        self._place = (-1, -1)  # the optimiser's step, and which of its parts came last
        self.teacher: Any = None if teacher is None else teacher.to(self.args.device)
        if compiled and teacher is not None and not recipe.hidden:
            _compile_layers(teacher)
        self._sums: dict[str, Tensor] = {}
        self._count, self._since = 0, time.monotonic()

    @property
    def steering(self) -> Steering:
        """The callback of that kind; a resumed run puts another in its place."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, Steering))

    @property
    def mixing(self) -> Mixing | None:
        """Likewise; None with one source."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, Mixing)), None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = optimizer(model or self.model, self.recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, cosine(self.recipe))
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._place = (self.state.global_step, self._place[1] + 1 if self._place[0] == self.state.global_step else 0)
        recipe, labels, sources = self.recipe, inputs.pop("labels"), inputs.pop("source", None)
        p = self.thresholds(len(labels)).to(labels.device)
        taught, between = self._taught(inputs), self.between(*labels.shape)
        weights = self._weights(sources)
        if recipe.paired:
            asked = {name: torch.cat([value, value]) for name, value in inputs.items()}
            out = self._student(model, asked, torch.cat([torch.zeros_like(p), p]), between)
            parts = self._paired_parts(out, taught, labels, weights)
        else:
            out = self._student(model, inputs, p, between)
            parts = self._parts(out.logits, taught, out.hidden_states, labels, weights)
        self._mix(sources, taught, out.logits[-len(p) :], labels)
        scores, routed = (
            tuple(layer[-len(p) :] for layer in layers) for layers in (out.router_scores, out.routed)
        )
        loads = objectives.row_loads(scores, routed, p)
        parts["load_penalty"] = self._load_term(scores, routed, loads, p)
        loss = sum(getattr(recipe, name) * parts[long] for name, long in _WEIGHTS.items() if long in parts)
        self._note({
            **parts, "load": loads.mean(), "load_error": (loads - (1 - p)).abs().mean(),
            "layer_loads": torch.stack([run.float().mean() for run in routed]),
        })
        return (loss, out) if return_outputs else loss

    def thresholds(self, rows: int) -> Tensor:
        """This process's p per row, [B]."""
        recipe = self.recipe
        if recipe.p is not None:
            return torch.full((rows,), recipe.p)
        share = 0.0 if recipe.paired else recipe.dense_share
        drawn = objectives.draw_thresholds(rows * self.args.world_size, share, recipe.p_range, self._noise(0))
        return self._own(drawn, rows)

    def between(self, rows: int, tokens: int) -> Tensor | None:
        """This process's partial shares of the blocks' outputs, [B, M, T]; None where no gate learns by them."""
        recipe = self.recipe
        if not recipe.between or recipe.gate != "straight_through" or recipe.path != "masked":
            return None
        shape = (rows * self.args.world_size, self.layers, tokens)
        return self._own(objectives.draw_between(recipe.between, shape, self._noise(1)), rows)

    def _noise(self, kind: int) -> torch.Generator:
        """The same for a step whatever ran before it, and however many processes."""
        step = self._place[0] * self.recipe.accumulate + self._place[1]
        return torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + step) * 2 + kind)

    def _own(self, drawn: Tensor, rows: int) -> Tensor:
        return drawn[self.args.process_index * rows :][:rows]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._count and "loss" in logs:
            mean = {name: self.accelerator.reduce(total / self._count, "mean") for name, total in self._sums.items()}
            tokens = self._count * self.args.train_batch_size * self.args.world_size * self.recipe.block
            speed = tokens / max(1e-9, time.monotonic() - self._since)
            logs = {**logs, **{name: value.tolist() for name, value in mean.items()}, "tokens_per_second": speed}
            self._since = time.monotonic()
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def _student(self, model: Any, inputs: dict[str, Tensor], p: Tensor, between: Tensor | None) -> Any:
        if between is not None:
            between = torch.cat([torch.ones_like(between), between])[-len(p) :].to(p.device)
            between = torch.where(p[:, None, None] > 0, between, 1.0)  # at p = 0 the model is whole
        return model(
            **inputs, p=p, between=between, run_block=self._run_block, use_cache=False, output_router_scores=True,
            routing=self.recipe.path, rule=self.recipe.rule, output_hidden_states=self.recipe.hidden > 0,
        )

    @torch.no_grad()
    def _taught(self, inputs: dict[str, Tensor]) -> Any:
        """What the teacher says, if anything of it is wanted."""
        if self.teacher is None or not (self.recipe.kl or self.recipe.hidden or self.mixing):
            return None
        with self.accelerator.autocast():  # the student's forward has it from Trainer
            return self.teacher(**inputs, use_cache=False, output_hidden_states=self.recipe.hidden > 0)

    def _weights(self, sources: Tensor | None) -> Tensor | None:
        """The rows' weights in the loss, [B]."""
        mixing = self.mixing
        if mixing is None or sources is None:
            return None
        return torch.tensor(mixing.weights, device=sources.device)[sources]

    @torch.no_grad()
    def _mix(self, sources: Tensor | None, taught: Any, logits: Tensor, labels: Tensor) -> None:
        mixing = self.mixing
        if mixing is None or sources is None or taught is None:
            return
        excess = objectives.row_losses(logits, labels) - objectives.row_losses(taught.logits, labels)
        mixing.move(*(self.accelerator.gather(value) for value in (sources, excess)))

    def _parts(
        self, logits: Tensor, taught: Any, hidden: Any, labels: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        learnt = objectives.Learnt.of(labels, weights)
        # Processes' losses are averaged, whatever each has to learn.
        learnt = dataclasses.replace(learnt, total=self.accelerator.reduce(learnt.total, "mean"))
        student = learnt.pick(logits)
        if taught is not None and self.recipe.kl:
            nats, over = self._both(student, learnt.pick(taught.logits), learnt.wanted)
            parts = {"cross_entropy": learnt.mean(nats), "kl": learnt.mean(over)}
        else:
            parts = {"cross_entropy": learnt.mean(objectives.surprise(student, learnt.wanted))}
        if taught is not None and self.recipe.hidden:
            parts["hidden_distance"] = objectives.hidden_distance(taught.hidden_states, hidden)
        return parts

    def _paired_parts(self, out: Any, taught: Any, labels: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """Means over the dense rows, taught by the teacher, and the sparse rows, taught by the dense ones."""
        dense, sparse = out.logits.chunk(2)
        split = [layer.chunk(2) for layer in out.hidden_states or ()]
        own = _Said(dense.detach(), [one.detach() for one, _ in split])
        first = self._parts(dense, taught, [one for one, _ in split], labels, weights)
        second = self._parts(sparse, own, [two for _, two in split], labels, weights)
        return {name: (first.get(name, torch.zeros_like(value)) + value) / 2 for name, value in second.items()}

    def _load_term(self, scores: Any, routed: Any, loads: Tensor, p: Tensor) -> Tensor:
        kind = self.recipe.load
        if kind == "target":
            return objectives.load_penalty(loads, p)
        if kind == "imitate":
            return objectives.imitation(scores, routed, p)
        if kind == "alpha":
            return objectives.load_reducing(scores, routed)
        if kind == "steered":
            excess = (loads.detach() - (1 - p)).mean()
            factor = self.steering.alpha / self.recipe.penalty
            self.steering.move(self.accelerator.gather(excess[None]).mean().item())
            return factor * objectives.load_reducing(scores, routed)
        return loads.new_zeros(())

    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        self._count += 1


def _compile_layers(model: Any) -> None:
    """One compilation serves all layers; a model of no family known here stays as it is."""
    if family := FAMILIES.get(str(model.config.model_type)):
        for layer in family.decoder_layers(model):
            layer.compile()


_WEIGHTS = {"ce": "cross_entropy", "kl": "kl", "hidden": "hidden_distance", "penalty": "load_penalty"}


class _Said:
    """Logits and hidden states to learn from."""

    def __init__(self, logits: Tensor, hidden_states: list[Tensor]) -> None:
        self.logits, self.hidden_states = logits, hidden_states


class ProgressBar(TrainerCallback):
    """A bar with loss, load and time left, and one JSON line per log entry in ``log.jsonl``."""

    def __init__(self, log: Path) -> None:
        self.log, self.bar = log, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_redone(self.log, state.global_step)
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="convert")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "load" in logs:
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
        asked = torch.tensor(float(self.asked.is_set()), device=args.device)
        if args.world_size > 1:  # all stop after the same step
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
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


def cosine(recipe: Recipe) -> Callable[[int], float]:
    """Warm-up, then half a cosine down to a fiftieth, as a factor of the peak rate by step."""
    warmup = max(1, int(recipe.steps * recipe.warmup))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, recipe.steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return rate
