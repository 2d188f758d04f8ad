"""The router, the threshold rule and the gather/scatter of routed tokens.

Boundary: tensors in, tensors out; knows neither layers nor caches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from modification.config import MoDConfig

# Fresh routers open wide: sigmoid(2) = 0.88 lets tokens run up to p = 0.88; the paper's gate
# scales the block, so it starts nearer to 1 (sigmoid(4) = 0.98).
INITIAL_BIAS = {"straight_through": 2.0, "paper": 4.0}
OPEN = 40.0  # a logit at which the gate is 1 in float32
_LOGIT_STD = 0.3  # of a fresh router, whatever the width
_P_FLOOR = 1e-4
_ROUTER = re.compile(r"(?:^|\.)\d+\.router\.(?:weight|bias)$")
RunBlock = Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]  # layer, x and stock arguments -> what comes out
_THIN = 1e-9  # between two scores of a dial; nearer ones count as one


def is_router(name: str) -> bool:
    """Whether a parameter's name is a MoD router's, and not that of a mixture of experts."""
    return _ROUTER.search(name) is not None


class Router(nn.Module):
    """g = sigmoid(W x + b) on the RMS-normalised hidden state: [B, T, D] -> logits [B, T], float32.

    The paper scores x itself; normalising first makes the score independent of the residual
    stream's scale, which grows with depth. The weights are bare parameters, not an ``nn.Linear``,
    so that quantisers leave them in full precision.
    """

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))
        self.initial_bias = bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights; a parameter just read from a checkpoint is left alone."""
        init.normal_(self.weight, std=_LOGIT_STD / self.weight.shape[1] ** 0.5)
        init.constant_(self.bias, self.initial_bias)

    def forward(self, x: Tensor) -> Tensor:
        # Mixed precision must not touch the score: it is compared with p.
        with torch.autocast(x.device.type, enabled=False):
            normed = F.rms_norm(x.float(), x.shape[-1:])
            logit = F.linear(normed, self.weight.float(), self.bias.float()).squeeze(-1)
        # A broken router must not lose tokens: NaN opens the gate.
        return torch.nan_to_num(logit, nan=OPEN, posinf=OPEN, neginf=-OPEN)


class RoutingCall:
    """What one forward call asks of its MoD layers, and what they report back.

    It travels through the stock model as a keyword argument, so that p, masks and records belong
    to the call and never to the model. No dataclass: FSDP copies those, and casts their tensors.

    Attributes:
        config: the model's MoD settings.
        p: thresholds, [B, 1], or [B, M] with one for each of M MoD layers.
        order: indices of the MoD layers, M of them.
        path: ``"gathered"`` (skips) or ``"masked"`` (computes all, hides; the reference).
        columns: places of the new tokens in the padded sequence, [T].
        kernel: the attention implementation, "sdpa" or "eager".
        valid: False at padding, [B, T]; None when there is none.
        anchored: tokens that run whatever their score, [B, T]; None when there are none.
        shown: False at columns of the past that are hidden from the new tokens, [B, past + T]; None when none is.
        documents: which of a row's packed documents a token belongs to, [B, T]; None when a row is one document.
        between: in training, shares of the block's output that some tokens get instead of all or none of it,
            [B, M, T]; 1 or more elsewhere. See ``MoDLayer``.
        rule: "threshold", or "top-k" (a row's 1 - p of tokens with the highest scores; looks ahead: training only).
        run_block: what computes a layer's block in place of its own code: the same, compiled; None for that code.
        scores, routed: gates and decisions per MoD layer index, [B, T] each, if ``record``.
    """

    def __init__(
        self, config: MoDConfig, p: Tensor, path: str, columns: Tensor, kernel: str = "sdpa",
        order: tuple[int, ...] = (), valid: Tensor | None = None, anchored: Tensor | None = None,
        rule: str = "threshold", record: bool = False,
    ) -> None:
        self.config, self.p, self.path, self.columns, self.kernel = config, p, path, columns, kernel
        self.order, self.valid, self.anchored, self.rule, self.record = order, valid, anchored, rule, record
        self.dial = torch.tensor(config.dial, dtype=torch.float32, device=p.device) if config.dial else None
        self.shown: Tensor | None = None
        self.documents: Tensor | None = None
        self.between: Tensor | None = None
        self.run_block: RunBlock | None = None
        self.scores: dict[int, Tensor] = {}
        self.routed: dict[int, Tensor] = {}

    def decide(self, layer: int, gate: Tensor) -> Tensor:
        """Which tokens run, [B, T] bool: g >= p (paper, threshold-p), anchors always, padding never."""
        threshold = self.threshold(layer).to(gate.device)
        run = gate >= threshold if self.rule == "threshold" else top_share(gate, 1 - threshold)
        if self.anchored is not None:
            run = run | self.anchored.to(gate.device)
        if self.valid is not None:
            run = run & self.valid.to(gate.device)
        if self.record:
            self.scores[layer], self.routed[layer] = gate, run
        return run

    def read(self, gate: Tensor) -> Tensor:
        """Scores in [0, 1] as the dial reads gates [B, T]; what scales a block is the gate itself."""
        return gate if self.dial is None else bend(gate, self.dial.to(gate.device))

    def threshold(self, layer: int) -> Tensor:
        """The rows' thresholds in one MoD layer, [B, 1]."""
        at = 0 if self.p.shape[1] == 1 else self.order.index(layer)
        return self.p[:, at : at + 1]

    def share(self, layer: int) -> Tensor | None:
        """Shares of a layer's output that tokens get, [B, T], see ``between``; None where none is partial."""
        return None if self.between is None else self.between[:, self.order.index(layer)]

    def real(self, like: Tensor) -> Tensor:
        """True at real tokens, False at padding, [B, T] like ``like``."""
        return torch.ones_like(like) if self.valid is None else self.valid.to(like.device)


def bend(gate: Tensor, dial: Tensor) -> Tensor:
    """Raw scores as the dial reads them, see ``MoDConfig.dial``: piecewise linear and rising, 0 to 1.

    Args:
        gate: raw scores in [0, 1], any shape, float32.
        dial: [n].
    """
    at = torch.searchsorted(dial, gate.contiguous(), right=True)
    ends = F.pad(F.pad(dial, (1, 0)), (0, 1), value=1.0)
    low, high = ends[at], ends[at + 1]
    return (at + ((gate - low) / (high - low).clamp_min(_THIN)).clamp(0, 1)) / (len(dial) + 1)


def top_share(gate: Tensor, share: Tensor) -> Tensor:
    """The rule of Mixture-of-Depths (arXiv 2404.02258): of each row [B, T], the ``share`` [B, 1] with top scores."""
    place = gate.argsort(dim=1, descending=True).argsort(dim=1)
    return place < (share * gate.shape[1]).round()


def straight_through(logit: Tensor, p: Tensor) -> Tensor:
    """A zero whose gradient is that of sigmoid(logit(g) - logit(p)), [B, T].

    Added to the hard 0/1 decision it gives processed and skipped tokens' gates a gradient alike.
    """
    soft = torch.sigmoid(logit - torch.logit(p.to(logit.device).float(), eps=_P_FLOOR))
    return soft - soft.detach()


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Routed tokens of a batch as a dense block.

    Attributes:
        rows: batch rows with at least one routed token, [R].
        index: token indices per row, in order, [R, N]; each row is filled up with some of its own
            skipped tokens to the longest row's N.
        filled: False where ``index`` is such a filler, [R, N]; None when there is none.
        counts: routed tokens per selected row.
    """

    rows: Tensor
    index: Tensor
    filled: Tensor | None
    counts: list[int]

    def gather(self, x: Tensor) -> Tensor:
        """[B or 1, T, ...] -> [R, N, ...]."""
        rows = self.rows if x.shape[0] > 1 else torch.zeros_like(self.rows)
        return x[rows[:, None], self.index]

    def scatter(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, T, D] with the routed tokens replaced by y [R, N, D]."""
        if self.filled is not None:
            y = torch.where(self.filled[..., None], y, self.gather(x))
        out = x.clone()
        out[self.rows[:, None], self.index] = y
        return out


def select(run: Tensor) -> Selection | None:
    """Lay out the routed tokens of ``run`` [B, T]; None when nothing runs. One host synchronisation."""
    if run.numel() == 1:  # decoding one row: nothing to sort
        first = torch.zeros(1, dtype=torch.long, device=run.device)
        return Selection(first, first[None], None, [1]) if bool(run) else None
    counts = run.sum(1).tolist()
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return None
    kept = [counts[row] for row in rows]
    row_index = torch.tensor(rows, device=run.device)
    longest, shortest = max(kept), min(kept)
    # Stable: routed tokens first and in order, then skipped ones as fillers, none twice.
    index = torch.argsort((~run[row_index]).to(torch.uint8), dim=1, stable=True)[:, :longest]
    filled = None
    if shortest < longest:
        filled = torch.arange(longest, device=run.device) < torch.tensor(kept, device=run.device)[:, None]
    return Selection(row_index, index, filled, kept)
