"""Attention to keys that are there in part, in training: softmax(q k + log w) v.

Boundary: tensors in, tensors out; knows neither layers nor routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CHANNELS = 8  # kernels want widths that are multiples of it


class Presence(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` adds log w to the keys' scores, and w gets a gradient.

    A mask that is added would do the same; its gradient takes B H T T numbers. Here log w is a channel of the keys.

    Args:
        log_weights: log w of each key, [B, T].
    """

    def __init__(self, log_weights: Tensor) -> None:
        super().__init__()
        self.log_weights = log_weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(self.log_weights, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend(
    log_weights: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` with log w [B, T] added to the scores of keys, [B, heads, T, D]."""
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = F.scaled_dot_product_attention(
        _with(query, query.new_full((1, 1, 1), 1 / scale)), _with(key, log_weights[:, None].to(key.dtype)),
        F.pad(value, (0, _CHANNELS)), attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
    )
    return found[..., :width]


def _with(x: Tensor, channel: Tensor) -> Tensor:
    """x [B, H, T, D] with one more channel, [B or 1, 1, T or 1], and zeros up to the next width."""
    return torch.cat([x, channel[..., None].expand(*x.shape[:3], 1), x.new_zeros(*x.shape[:3], _CHANNELS - 1)], -1)
