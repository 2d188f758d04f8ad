"""Muon for matrices and AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for a model's matrices, AdamW beside it for embeddings, norms and routers.

    Muon orthogonalises each update (https://kellerjordan.github.io/posts/muon/), which is defined for matrices alone.
    Its steps are scaled to AdamW's size, so that a rate means the same for both.

    Needs torch 2.9 or newer.

    Args:
        matrices: weights for Muon, two-dimensional each.
        lr: their rate.
        others: parameter groups for AdamW, each with its own ``lr``; their weights don't decay.
        weight_decay: of the matrices.
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, others: list[dict[str, Any]], weight_decay: float = 0.0
    ) -> None:
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})
        self._join()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
        self._join()

    def _join(self) -> None:
        """The two see what a schedule writes into the joint groups."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
