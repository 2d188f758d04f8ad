"""Recipes: what a conversion optimises and how fast. One table of small frozen configs; the loop is in train.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from modification.config import Gate

Tune = Literal["full", "lora", "router"]
Load = Literal["target", "alpha", "steered", "imitate", "none"]
Rule = Literal["threshold", "top-k"]
Start = Literal["ordered", "open"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to convert. The loss, averaged over tokens and rows, is

        ce * cross-entropy + kl * KL(teacher || model) + hidden * (distance of hidden states) + the load's term

    Attributes:
        name: its name in the table.
        gate: what a gate does to an executed block, see ``MoDConfig``.
        p: the one threshold it is trained for; None trains every p at once, each row of a batch at its own.
        paired: every row also runs at p = 0, and what it says there teaches it at its own p: one pass serves the
            dense model and, in the teacher's place, the sparse ones. The teacher then teaches p = 0 alone.
        dense_share: share of rows at p = 0, where rows aren't paired.
        start: where routers start. "ordered": at p the layers that the parent misses least are closed (``stagger``);
            "open": nearly all tokens run, at nearly every p.
        between: share of (MoD layer, token) pairs that get a part of their layer's output, drawn evenly, and teach
            their gate what running is worth (see ``MoDLayer``); 0: all teach theirs by the straight-through slope.
        p_range: from where the other rows draw p.
        rule: which tokens run in training; "top-k" is the rule of Mixture-of-Depths (arXiv 2404.02258).
        load: how the load is held. "target": penalty * (load - (1 - p))^2, over all MoD layers, so that layers may
            differ. "alpha": penalty * sum_j F_j G_j, F_j the share of tokens that run in MoD layer j and G_j its mean
            gate (MoDification, arXiv 2410.14268). "steered": the same with the factor moved, step by step, until the
            load is 1 - p. "imitate": routers learn, by penalty * cross-entropy, to say at p which tokens top-k chose.
        penalty: its weight.
        ce, kl, hidden: weights of the other terms.
        tune: "full" trains all weights; "lora" a low-rank change of the projections, with the parent's weights
            fixed; "router" the routers alone.
        lora_rank: rank of that change.
        fit: no training: routers are fitted in closed form to the measured benefit of their layers.
        path: "masked" computes every token in training and hides the skipped ones, whose gates then learn too;
            "gathered" really skips, and tokens that run teach their gates by the straight-through slope alone.
        tokens: training tokens in all.
        block: tokens per row.
        batch: rows per step, over all processes.
        accumulate: steps of the loop per step of the optimiser; ``batch`` is split among them.
        optimizer: "adamw", or "muon" for the layers' matrices and AdamW for the rest (torch 2.9 or newer, not sharded).
        lr: peak learning rate of the weights; None chooses by size (``default_lr``).
        router_lr: peak learning rate of the routers.
        warmup: share of the steps before the peak rate.
        bf16: compute in mixed precision, the teacher too; always on with CUDA, worth it on CPUs that have bf16 units.
        checkpoint_activations: recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: a value out of bounds; the message names the value and the bound.
    """

    name: str = "any-p"
    gate: Gate = "straight_through"
    p: float | None = None
    paired: bool = False
    dense_share: float = 0.25
    start: Start = "ordered"
    between: float = 0.15
    p_range: tuple[float, float] = (0.02, 0.98)
    rule: Rule = "threshold"
    load: Load = "target"
    penalty: float = 3.0
    ce: float = 0.5
    kl: float = 0.5
    hidden: float = 0.0
    tune: Tune = "full"
    lora_rank: int = 16
    fit: bool = False
    path: Literal["masked", "gathered"] = "masked"
    tokens: int = 3_000_000
    block: int = 256
    batch: int = 8
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    lr: float | None = None
    router_lr: float = 5e-3
    warmup: float = 0.03
    bf16: bool = False
    checkpoint_activations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("tune", Tune), ("load", Load), ("rule", Rule), ("gate", Gate), ("optimizer", Optimizer), ("start", Start)
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(choices))}")
        for name in ("block", "batch", "accumulate", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}: a batch of {self.batch} can't be split in so many parts")
        if self.fit and self.tokens < self.block:
            raise ValueError(f"tokens={self.tokens}: must be at least one block of {self.block}")
        if not self.fit and self.tokens < self.block * self.batch:
            raise ValueError(
                f"tokens={self.tokens}: one step takes {self.block * self.batch} (block {self.block} x batch "
                f"{self.batch}); give at least that many"
            )
        for name in ("warmup", "between"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.dense_share <= 1:
            raise ValueError(f"dense_share={self.dense_share}: must be from 0 to 1")
        for name in ("lr", "router_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"{name}={rate}: must be above 0 and below 1")
        for name in ("ce", "kl", "hidden", "penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a weight must be 0 or more")
        if self.load == "steered" and not self.penalty:
            raise ValueError("penalty=0: the factor that is steered starts there; give one above 0")
        if self.p is not None and not 0 < self.p < 1:
            raise ValueError(f"p={self.p}: a threshold to train for must be above 0 and below 1")
        low, high = self.p_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"p_range={self.p_range}: must be two rising numbers from 0 to 1")

    @property
    def steps(self) -> int:
        """Optimiser steps; none where routers are fitted."""
        return 0 if self.fit else self.tokens // (self.block * self.batch)


# As published: the language-model loss and R, for one p. Only its load term differs in the controlled form.
_PAPER: dict[str, Any] = {"gate": "paper", "p": 0.5, "start": "open", "dense_share": 0.0, "ce": 1.0, "kl": 0.0}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("any-p"),
        Recipe("fixed-p", p=0.5, dense_share=0.0, penalty=0.5),
        Recipe("paper", load="alpha", penalty=0.01, **_PAPER),
        Recipe("paper-controlled", load="steered", penalty=0.01, **_PAPER),
        Recipe("top-k", rule="top-k", load="imitate", penalty=0.1, **_PAPER),
        Recipe("calibrate", fit=True, tune="router", start="open", tokens=8_192),
    )
}


def named(name: str, **changes: Any) -> Recipe:
    """A recipe of the table, with changes; those that are None are left as they are.

    Raises:
        ValueError: no recipe of that name, or a change that it refuses.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name], **{key: value for key, value in changes.items() if value is not None})


def default_lr(parameters: int, tune: Tune = "full") -> float:
    """A peak learning rate by size: small models move fast, large ones at the paper's 3e-5; adapters faster."""
    rate = 2e-3 if parameters < 50e6 else 3e-4 if parameters < 500e6 else 3e-5
    return rate if tune == "full" else max(rate, 2e-4)
