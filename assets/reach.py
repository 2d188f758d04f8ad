"""The last stage of the shipped conversion: looking far back where tokens are skipped. See ``leaps.py``.

With q the share of tokens to skip, drawn for each row, the loss is

    KL(parent || model) + 0.2 * cross-entropy of stories + 0.3 * cross-entropy of answers + 3 * (load - (1 - q))^2

The parent reads every row without its leap. Facts are not learnt as text: they would turn up in stories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from leaps import Ids, Rows, batch_of
from torch import Tensor
from transformers import Trainer, TrainingArguments

from modification.conversion import objectives
from modification.conversion.calibrate import set_dial
from modification.conversion.checks import last_checkpoint
from modification.conversion.recipes import Recipe
from modification.conversion.tune import optimizer

BATCH = 6
LR, ROUTER_LR = 2e-4, 1e-3
STORIES, ANSWERS, PENALTY = 0.2, 0.3, 3.0
SKIPPED, DENSE, BETWEEN = (0.15, 0.75), 0.25, 0.15  # shares: of tokens, of rows at p = 0, of partial outputs


def reach(
    model: Any, teacher: Any, documents: Sequence[Ids], tokenizer: Any, out: Path, steps: int, save_steps: int = 20
) -> None:
    """Train a MoD model, with a dial, in place beside its dense parent; resumed from ``out`` where it was interrupted.

    Its dial is taken off: it tells which raw threshold skips which share of the tokens, and is to be fitted anew.
    """
    knots = (0.0, *model.mod_config.dial, 1.0)
    set_dial(model, ())
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=not cuda, bf16=cuda,
        save_steps=save_steps, save_total_limit=2, logging_steps=10, report_to="none", remove_unused_columns=False,
        seed=0,
    )
    stepper = optimizer(model, Recipe(lr=LR, router_lr=ROUTER_LR))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        stepper, lambda at: min(1.0, (at + 1) / 8) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * at / steps)))
    )
    trainer = Reaching(
        knots, teacher.eval().requires_grad_(False), model=model, args=arguments, data_collator=batch_of,
        train_dataset=Rows(documents, tokenizer, steps * BATCH), optimizers=(stepper, schedule),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(out))


class Reaching(Trainer):
    """Trainer with the loss above; what a step draws depends on its number alone."""

    def __init__(self, knots: Sequence[float], teacher: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.knots, self.teacher = knots, teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, real = inputs["input_ids"], inputs["real"]
        skipped, between = self._drawn(*ids.shape, len(model.mod_layers))
        p = torch.from_numpy(np.interp(skipped, np.linspace(0, 1, len(self.knots)), self.knots)).float().to(ids.device)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(input_ids=ids, use_cache=False).logits
        out = model(
            input_ids=ids, position_ids=inputs["position_ids"], p=p, between=between.to(ids.device), routing="masked",
            attention_mask=torch.ones_like(ids),  # with one, a leap begins no other document
            use_cache=False, output_router_scores=True,
        )
        learnt = objectives.Learnt.of(ids.masked_fill(~real, -100))
        kinds = [inputs[name][:, 1:][real[:, 1:]].float() for name in ("story", "answer")]
        nats, over = objectives.surprise_and_excess(learnt.pick(out.logits), learnt.pick(taught), learnt.wanted)
        story, answer = ((nats * kind).sum() / kind.sum().clamp_min(1) for kind in kinds)
        loads = objectives.row_loads(out.router_scores, out.routed, p)
        excess = objectives.load_penalty(loads, torch.from_numpy(skipped).float().to(ids.device))
        loss = over.mean() + STORIES * story + ANSWERS * answer + PENALTY * excess
        return (loss, out) if return_outputs else loss

    def _drawn(self, rows: int, tokens: int, layers: int) -> tuple[np.ndarray[Any, np.dtype[np.float64]], Tensor]:
        """Shares of tokens to skip, [B], and partial shares of the blocks' outputs, [B, M, T]."""
        noise = torch.Generator().manual_seed(self.state.global_step)
        low, high = SKIPPED
        spread = (torch.arange(rows) + torch.rand(rows, generator=noise))[torch.randperm(rows, generator=noise)] / rows
        dense = torch.rand(rows, generator=noise) < DENSE
        between = objectives.draw_between(BETWEEN, (rows, layers, tokens), noise)
        skipped = torch.where(dense, 0.0, low + (high - low) * spread)
        return skipped.double().numpy(), torch.where(dense[:, None, None], 1.0, between)
