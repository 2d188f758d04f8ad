"""Quality of a MoD model over p: held-out loss and load on packed text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

GRID = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True, slots=True)
class Quality:
    """Measured at one threshold.

    Attributes:
        p: the threshold.
        loss: cross-entropy in nats per token.
        error: standard error of ``loss`` over blocks.
        load: share of (MoD layer, token) pairs that ran.
        layer_loads: load of each MoD layer.
        tokens: tokens scored.
        agreement: share of tokens whose likeliest next token is the reference's; None without one.
    """

    p: float
    loss: float
    error: float
    load: float
    layer_loads: tuple[float, ...]
    tokens: int
    agreement: float | None = None


@torch.no_grad()
def evaluate(
    model: Any, blocks: npt.NDArray[np.int32], p: float, batch: int = 8, reference: npt.NDArray[np.int32] | None = None
) -> Quality:
    """Loss and load of ``model`` at threshold ``p`` over blocks [N, T] of token ids.

    Args:
        reference: likeliest next tokens to agree with, [N, T], as ``predictions`` gives them.
    """
    losses: list[float] = []
    ran = torch.zeros(len(model.mod_layers))
    agreed = 0
    for at, ids in enumerate(_batches(blocks, batch, model.device)):
        out = model(input_ids=ids, p=p, use_cache=False, output_router_scores=True)
        nats = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        losses.extend(nats.view(len(ids), -1).mean(1).tolist())
        ran += torch.stack([routed.sum() for routed in out.routed]).float().cpu()
        if reference is not None:
            own = out.logits.argmax(-1).cpu().numpy()
            agreed += int((own == reference[at * batch : at * batch + len(own)]).sum())
    loads = ran / blocks.size
    error = float(np.std(losses) / math.sqrt(len(losses)))
    agreement = None if reference is None else agreed / blocks.size
    return Quality(p, float(np.mean(losses)), error, loads.mean().item(), tuple(loads.tolist()), blocks.size, agreement)


@torch.no_grad()
def predictions(model: Any, blocks: npt.NDArray[np.int32], batch: int = 8, **call: Any) -> npt.NDArray[np.int32]:
    """The likeliest next token after each token of blocks [N, T]; a MoD model is asked at ``p=...``."""
    found = [
        model(input_ids=ids, use_cache=False, **call).logits.argmax(-1).cpu().numpy()
        for ids in _batches(blocks, batch, model.device)
    ]
    return np.concatenate(found).astype(np.int32)


def sweep(
    model: Any, blocks: npt.NDArray[np.int32], grid: Iterable[float] = GRID,
    reference: npt.NDArray[np.int32] | None = None,
) -> list[Quality]:
    """``evaluate`` at every p of a grid."""
    model.eval()
    return [evaluate(model, blocks, p, reference=reference) for p in grid]


def _batches(blocks: npt.NDArray[np.int32], size: int, device: torch.device) -> Iterator[torch.Tensor]:
    for start in range(0, len(blocks), size):
        yield torch.from_numpy(blocks[start : start + size].astype(np.int64)).to(device)
