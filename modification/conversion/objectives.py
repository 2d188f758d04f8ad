"""Training objectives as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modification.routing import straight_through

_EPS = 1e-6
Scores = Sequence[Tensor]  # gates or decisions per MoD layer, [B, T] each


def draw_thresholds(
    batch: int, dense_share: float, p_range: tuple[float, float], generator: torch.Generator | None = None
) -> Tensor:
    """One p per row, [B]: ``dense_share`` of the rows at 0, the rest one from each equal slice of the range."""
    routed = batch - int(batch * dense_share)
    if not routed:
        return torch.zeros(batch)
    low, high = p_range
    spread = (torch.arange(routed) + torch.rand(routed, generator=generator)) / routed
    return torch.cat([torch.zeros(batch - routed), low + (high - low) * spread])


def draw_between(share: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Even draws from (0, 1) at a ``share`` of places, 1 elsewhere."""
    drawn, chosen = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) < share
    return torch.where(chosen, drawn, 1.0)


def row_loads(scores: Scores, routed: Scores, p: Tensor) -> Tensor:
    """Share of (MoD layer, token) pairs that ran, per row [B]; differentiable by straight-through gates, p [B]."""
    threshold = p[:, None]
    gates = [run + straight_through(torch.logit(g, eps=_EPS), threshold) for g, run in zip(scores, routed, strict=True)]
    return torch.stack(gates).mean(dim=(0, 2))


def load_penalty(loads: Tensor, p: Tensor) -> Tensor:
    """Mean over rows of (load - (1 - p))^2."""
    return (loads - (1 - p)).square().mean()


def load_reducing(scores: Scores, routed: Scores) -> Tensor:
    """The paper's R without its factor: sum over MoD layers of F_j G_j, F_j without gradient."""
    return torch.stack([r.float().mean() * g.mean() for g, r in zip(scores, routed, strict=True)]).sum()


def imitation(scores: Scores, chosen: Scores, p: Tensor) -> Tensor:
    """Cross-entropy of "g >= p" against what was chosen, nats, mean over layers and tokens; p [B]."""
    bias = torch.logit(p[:, None].float(), eps=_EPS)
    return torch.stack([
        F.binary_cross_entropy_with_logits(torch.logit(g, eps=_EPS) - bias, run.float())
        for g, run in zip(scores, chosen, strict=True)
    ]).mean()


def next_token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of each next token, nats, mean over those labelled.

    Args:
        logits: [B, T, V].
        labels: [B, T]; -100 where there is nothing to learn.
        weights: of each row's tokens in the mean, [B].
    """
    learnt = Learnt.of(labels, weights)
    return learnt.mean(surprise(learnt.pick(logits), learnt.wanted))


@dataclass(frozen=True, slots=True, eq=False)
class Learnt:
    """Where a batch has a next token to learn: places in its flattened tokens, tokens and weights, [N] each.

    Attributes:
        total: what sums are divided by: the weights' own sum, or what that comes to on average where several processes
            have a part of the batch each.
    """

    places: Tensor
    wanted: Tensor
    weights: Tensor
    total: Tensor

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None = None) -> Learnt:
        """Of labels [B, T], -100 where there is nothing to learn, and weights of the rows, [B]."""
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        each = torch.ones(len(rows), device=labels.device) if weights is None else weights.float()[rows]
        return cls(rows * labels.shape[1] + columns, labels[rows, columns + 1], each, each.sum())

    def pick(self, logits: Tensor) -> Tensor:
        """[B, T, V] -> [N, V]."""
        return logits.flatten(0, 1).index_select(0, self.places)

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> the weighted mean; 0 where nothing is to be learnt."""
        return (values * self.weights).sum() / self.total.clamp_min(1e-6)


def surprise(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of each wanted token [N] under logits [N, V], nats, [N]."""
    return F.cross_entropy(logits.float(), wanted, reduction="none")


def excess(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each token, nats, [N]; logits [N, V]."""
    ours, theirs = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def surprise_and_excess(student: Tensor, teacher: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Both at once: compiled, they pass over the vocabulary as few times as can be."""
    return surprise(student, wanted), excess(student, teacher)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's mean cross-entropy over its labelled tokens, nats, [B]."""
    return torch.stack([next_token_loss(row[None], label[None]) for row, label in zip(logits, labels, strict=True)])


def hidden_distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |student - teacher|^2 / |teacher|^2; hidden states [B, T, D], the embedding's left out."""
    return torch.stack([
        (ours.float() - theirs.float()).square().sum() / theirs.float().square().sum()
        for theirs, ours in zip(teacher[1:], student[1:], strict=True)
    ]).mean()
