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

_TOKENS = 2_048  # at a time, of short blocks
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
    model: Any, blocks: npt.NDArray[np.int32], p: float, batch: int | None = None,
    reference: npt.NDArray[np.int32] | None = None,
) -> Quality:
    """Loss and load of ``model`` at threshold ``p`` over blocks [N, T] of token ids.

    Args:
        batch: blocks at a time; by default 8, more where they are short.
        reference: likeliest next tokens to agree with, [N, T], as ``reference_of`` gives them.
    """
    losses: list[float] = []
    ran = torch.zeros(len(model.mod_layers))
    agreed, batch = 0, batch or _rows(blocks)
    for at, ids in enumerate(batches(blocks, batch, model.device)):
        out = model(input_ids=ids, p=p, use_cache=False, output_router_scores=True)
        losses.extend(_block_losses(out.logits, ids))
        ran += torch.stack([routed.sum() for routed in out.routed]).float().cpu()
        if reference is not None:
            own = out.logits.argmax(-1).cpu().numpy()
            agreed += int((own == reference[at * batch : at * batch + len(own)]).sum())
    loads = ran / blocks.size
    error = float(np.std(losses) / math.sqrt(len(losses)))
    agreement = None if reference is None else agreed / blocks.size
    return Quality(p, float(np.mean(losses)), error, loads.mean().item(), tuple(loads.tolist()), blocks.size, agreement)


@torch.no_grad()
def reference_of(
    model: Any, blocks: npt.NDArray[np.int32], batch: int | None = None, **call: Any
) -> tuple[npt.NDArray[np.int32], float]:
    """The likeliest next token after each token of blocks [N, T], and the loss as ``evaluate`` has it, in one reading.

    A MoD model is asked at ``p=...``; a dense one needs no more.
    """
    found, losses = [], list[float]()
    for ids in batches(blocks, batch or _rows(blocks), model.device):
        logits = model(input_ids=ids, use_cache=False, **call).logits
        found.append(logits.argmax(-1).cpu().numpy())
        losses.extend(_block_losses(logits, ids))
    return np.concatenate(found).astype(np.int32), float(np.mean(losses))


def sweep(
    model: Any, blocks: npt.NDArray[np.int32], grid: Iterable[float] = GRID,
    reference: npt.NDArray[np.int32] | None = None,
) -> list[Quality]:
    """``evaluate`` at every p of a grid."""
    model.eval()
    return [evaluate(model, blocks, p, reference=reference) for p in grid]


def batches(blocks: npt.NDArray[np.int32], size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Blocks of token ids [N, T] on a device, ``size`` at a time."""
    for start in range(0, len(blocks), size):
        yield torch.from_numpy(blocks[start : start + size].astype(np.int64)).to(device)


def _rows(blocks: npt.NDArray[np.int32]) -> int:
    """Blocks at a time: a call costs more than its tokens where they are few."""
    return max(8, _TOKENS // int(blocks.shape[1]))


def _block_losses(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Mean cross-entropy of each block, nats per token."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    found: list[float] = nats.view(len(ids), -1).mean(1).tolist()
    return found
