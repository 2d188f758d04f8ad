"""Training objectives as pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modification.routing import straight_through

_EPS = 1e-6


def draw_thresholds(batch: int, dense_share: float, p_range: tuple[float, float]) -> Tensor:
    """One p per row, [B]: ``dense_share`` of the rows at 0, the rest one from each equal slice of the range."""
    routed = batch - int(batch * dense_share)
    low, high = p_range
    spread = (torch.arange(routed) + torch.rand(routed)) / routed
    return torch.cat([torch.zeros(batch - routed), low + (high - low) * spread])


def row_loads(scores: tuple[Tensor, ...], routed: tuple[Tensor, ...], p: Tensor) -> Tensor:
    """Share of (MoD layer, token) pairs that ran, per row [B]; differentiable by straight-through gates.

    Args:
        scores, routed: gates and decisions per MoD layer, [B, T] each.
        p: thresholds, [B].
    """
    threshold = p[:, None]
    gates = [run + straight_through(torch.logit(g, eps=_EPS), threshold) for g, run in zip(scores, routed, strict=True)]
    return torch.stack(gates).mean(dim=(0, 2))


def load_penalty(loads: Tensor, p: Tensor) -> Tensor:
    """Mean over rows of (load - (1 - p))^2."""
    return (loads - (1 - p)).square().mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, nats, mean over [B, T-1]; logits [B, T, V]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of next-token distributions, nats, mean over tokens; logits [B, T, V]."""
    return F.kl_div(
        F.log_softmax(student.flatten(0, -2).float(), -1), F.log_softmax(teacher.flatten(0, -2).float(), -1),
        reduction="batchmean", log_target=True,
    )
