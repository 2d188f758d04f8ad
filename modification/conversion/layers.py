"""Which layers to route, measured: by how much a layer turns the hidden states, or by the rank of its attention."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modification.architectures import family_of
from modification.measure.quality import batches

AUTO = re.compile(r"auto:(\d+)(?::(influence|rank))?")
_RANK_TOKENS = 128  # attention maps of this length are ranked


def choose(model: Any, text: str, blocks: npt.NDArray[np.int32]) -> tuple[tuple[int, ...], list[float]]:
    """The layers that ``auto:K`` or ``auto:K:rank`` picks: the K that matter least, and every layer's measure.

    Args:
        model: a dense causal LM.
        blocks: calibration text, [N, T] token ids.

    Raises:
        ValueError: no such form, or K is not from 1 to the number of layers.
    """
    depth = model.config.num_hidden_layers
    count, rank = check(text, depth)
    measured = attention_rank(model, blocks) if rank else influence(model, blocks)
    order = sorted(range(depth), key=measured.__getitem__)
    return tuple(sorted(order[:count])), measured


def check(text: str, depth: int) -> tuple[int, bool]:
    """K of ``auto:K``, and whether it is by rank, for a model of ``depth`` layers; ValueError as in ``choose``."""
    found = AUTO.fullmatch(text)
    if found is None:
        raise ValueError(f"layers={text!r}: expected auto:K or auto:K:rank, K layers to route")
    count = int(found[1])
    if not 1 <= count <= depth:
        raise ValueError(f"layers={text!r}: this model has {depth} layers, K must be from 1 to {depth}")
    return count, found[2] == "rank"


@torch.no_grad()
def influence(model: Any, blocks: npt.NDArray[np.int32], batch: int = 4) -> list[float]:
    """Block influence of each layer: mean of 1 - cos(its input, its output) over tokens (arXiv 2403.03853)."""
    totals, seen = torch.zeros(model.config.num_hidden_layers), 0
    for states in _layer_states(model, blocks, batch):
        pairs = itertools.pairwise(states)
        turned = [1 - torch.cosine_similarity(x.float(), y.float(), dim=-1).mean().item() for x, y in pairs]
        totals, seen = totals + torch.tensor(turned), seen + 1
    found: list[float] = (totals / seen).tolist()
    return found


@torch.no_grad()
def attention_rank(model: Any, blocks: npt.NDArray[np.int32], batch: int = 4) -> list[float]:
    """Mean numerical rank of each layer's attention maps, over heads and rows (ARank, arXiv 2410.13859)."""
    family, config = family_of(model), model.config
    kernel, totals = config._attn_implementation, np.zeros(config.num_hidden_layers)
    ids = next(batches(blocks[:batch, :_RANK_TOKENS], batch, model.device))
    model.set_attn_implementation("eager")  # the only one that returns maps
    try:
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kernel)
    if not maps or len(maps) != len(family.decoder_layers(model)):
        raise ValueError(f"{type(model).__name__} returns no attention maps: use auto:K, which needs none")
    for at, attention in enumerate(maps):
        totals[at] = torch.linalg.matrix_rank(attention.float()).float().mean().item()
    return [float(value) for value in totals]


def _layer_states(model: Any, blocks: npt.NDArray[np.int32], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of all layers and the output of the last one, before the final norm; [B, T, D] each, batch by batch."""
    layers = family_of(model).decoder_layers(model)
    states: list[Tensor] = []

    def remember(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not states:
            states.append(args[0] if args else kwargs["hidden_states"])
        states.append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(remember, with_kwargs=True) for layer in layers]
    try:
        for ids in batches(blocks, batch, model.device):
            states.clear()
            model(input_ids=ids, use_cache=False)
            yield tuple(states)
    finally:
        for handle in handles:
            handle.remove()
