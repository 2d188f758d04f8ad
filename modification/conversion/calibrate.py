"""Make the dial true after training: an affine change of the routers' logits, folded into their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modification.layer import MoDLayer
from modification.measure.quality import evaluate

_LEVELS = np.linspace(0.1, 0.9, 9)


@torch.no_grad()
def fit_dial(model: Any, blocks: npt.NDArray[np.int32], rounds: int = 2) -> tuple[float, float]:
    """Scale and shift all routers alike so that load is about 1 - p.

    Finds, for each load on a grid, the threshold that now reaches it, and fits logit(1 - load) as a
    line in that threshold's logit. One line for all layers keeps their order of scores, and with it what
    training learned. Returns the scale and shift that were applied.

    Args:
        blocks: calibration text, [N, T] token ids.
        rounds: repetitions; decisions in one layer move scores in the next.
    """
    model.eval()
    scale, shift = 1.0, 0.0
    for _ in range(rounds):
        reached = np.array([1 - evaluate(model, blocks, float(p)).load for p in _LEVELS]).clip(0.005, 0.995)
        wanted, current = _logit(reached), _logit(_LEVELS)
        weight = np.sqrt(reached * (1 - reached))
        slope, offset = np.polyfit(current, wanted, 1, w=weight)
        slope = float(np.clip(slope, 0.25, 4.0))
        _rescale(model, slope, float(offset))
        scale, shift = scale * slope, shift * slope + float(offset)
    return scale, shift


def _rescale(model: Any, slope: float, offset: float) -> None:
    for layer in model.family.decoder_layers(model):
        if isinstance(layer, MoDLayer):
            layer.router.weight.mul_(slope)
            layer.router.bias.mul_(slope).add_(offset)


def _logit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.log(values / (1 - values)))
