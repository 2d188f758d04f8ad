"""Where routers start: their layers in the order in which the parent can do without them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from modification.conversion.checks import processes
from modification.measure.quality import reference_of

ORDER_TOKENS = 2_048
_ROUNDS = 6  # of measuring what is left; in deeper models several layers go at once


def stagger(model: Any, blocks: npt.NDArray[np.int32]) -> list[int]:
    """Start the routers of a freshly converted model so that at p the p * M layers that matter least are closed.

    At every p the model then is its parent with whole layers dropped, in the order of :func:`removal_order`: the
    rival of routing is where training starts. The k-th of M layers has scores near (k - 1/2) / M.

    Args:
        blocks: calibration text, [N, T] token ids; some thousand tokens do.

    Returns:
        The MoD layers' indices in that order.
    """
    order = removal_order(model, blocks)
    if processes()[1] > 1:  # rounding may decide: the first process's holds
        order = broadcast_object_list([order])[0]
    layers = model.family.decoder_layers(model)
    for place, index in enumerate(order):
        share = (place + 0.5) / len(order)
        layers[index].router.bias.data.fill_(math.log(share / (1 - share)))
    return order


@torch.no_grad()
def removal_order(model: Any, blocks: npt.NDArray[np.int32]) -> list[int]:
    """MoD layers, by index, that which is missed least first.

    The next are those whose absence, beside that of those before them, costs least in loss on a text [N, T].
    """
    model.eval()
    left, order = list(model.mod_layers), list[int]()
    with tqdm(total=len(left), unit="layer", desc="order", disable=processes()[0] > 0) as bar:
        for measured, gone in rounds(len(left)):
            if measured:
                left.sort(key=lambda index: _loss_without(model, blocks, {*order, index}))
            order, left = order + left[:gone], left[gone:]
            bar.update(gone)
    return order


def rounds(layers: int) -> list[tuple[int, int]]:
    """Layers that each round measures, one reading of the text for each, and that it takes away."""
    gone = math.ceil(layers / _ROUNDS)
    left = range(layers, 0, -gone)
    return [(now if now > gone else 0, min(now, gone)) for now in left]


def _loss_without(model: Any, blocks: npt.NDArray[np.int32], closed: set[int]) -> float:
    """Nats per token with some layers closed; fresh routers' scores lie between 0 and 1."""
    p = torch.tensor([[1.0 if index in closed else 0.0 for index in model.mod_layers]])
    return reference_of(model, blocks, p=p)[1]
