"""Sizes read off a config: windows, heads, bytes of the cache; and the rotary embedding in its usual form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modification.architectures.family import stored_heads
from modification.architectures.table import FAMILIES

PREFIX = "mod_"  # a converted model's type is its family's with this in front


def window_of(config: Any, layer: int) -> int | None:
    """Sliding-window length of a layer, in tokens; None where attention is full."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return int(window)


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The same of every layer."""
    return tuple(window_of(config, layer) for layer in range(config.num_hidden_layers))


def entry_width(config: Any) -> int:
    """Numbers in one token's keys and values in one layer."""
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    heads = stored_heads(config) if family is None else family.heads(config)
    return int(2 * heads * head_width(config))


def entry_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer."""
    return entry_width(config) * dtype.itemsize


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in its rotate-half form; heads [..., D], cos and sin that broadcast to it."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin
