"""Recipes: what a conversion optimises and how fast. Small frozen configs; the loop is in train.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AnyP:
    """One set of weights for every p, so that load is about 1 - p and p is a dial.

    Every row of a batch draws its own p: a share at p = 0, the rest spread over (0, 1). Decisions
    are hard with straight-through gates. The loss, averaged over tokens and rows, is

        ce * cross-entropy + kl * KL(dense parent || model) + penalty * (load - (1 - p))^2

    with the load taken over all MoD layers, so that layers may differ.

    Attributes:
        tokens: training tokens in all.
        block: tokens per row.
        batch: rows per step.
        lr: peak learning rate of the parent's weights; None chooses by size (``default_lr``).
        router_lr: peak learning rate of the routers.
        dense_share: share of rows at p = 0.
        p_range: from where the other rows draw p.
        warmup: share of the steps before the peak rate.
        bf16: compute in mixed precision; always on with CUDA, worth it on CPUs that have bf16 units.
    """

    tokens: int = 3_000_000
    block: int = 256
    batch: int = 8
    lr: float | None = None
    router_lr: float = 5e-3
    ce: float = 0.5
    kl: float = 0.5
    penalty: float = 1.0
    dense_share: float = 0.125
    p_range: tuple[float, float] = (0.02, 0.98)
    warmup: float = 0.03
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.tokens < self.block * self.batch:
            raise ValueError(
                f"tokens={self.tokens}: one step takes {self.block * self.batch} (block {self.block} x batch "
                f"{self.batch}); give at least that many"
            )
        for name in ("dense_share", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name in ("lr", "router_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"{name}={rate}: must be above 0 and below 1")
        low, high = self.p_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"p_range={self.p_range}: must be two rising numbers from 0 to 1")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.block * self.batch)


def default_lr(parameters: int) -> float:
    """A peak learning rate by size: small models move fast, large ones at the paper's 3e-5."""
    if parameters < 50e6:
        return 2e-3
    return 3e-4 if parameters < 500e6 else 3e-5
