"""A Llama-shaped decoder layer taken apart: what comes before attention, attention, what comes after.

Torch on any device. The layer's own modules are called, so adapters and quantised projections work as they
are. Shapes: N tokens, W width, H query heads, G key heads, D head width, K stored keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from modification.architectures import head_width, rotate

Rotation = tuple[Tensor, Tensor]  # cos and sin, [N, D]


class Block:
    """One layer; plain functions of its modules."""

    def __init__(self, layer: Any, head: int, router: Any, window: int | None) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = (getattr(self.attention, name, None) for name in ("q_norm", "k_norm"))
        self.head, self.router, self.window = head, router, window

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, W] -> queries [H, N, D], keys and values [G, N, D], with RoPE."""
        normed = self.norm(x)
        shape = (len(x), -1, self.head)
        q, k = self.attention.q_proj(normed).view(shape), self.attention.k_proj(normed).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        v = self.attention.v_proj(normed).view(shape)
        return rotate(q.transpose(0, 1), *rotation), rotate(k.transpose(0, 1), *rotation), v.transpose(0, 1)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection and MLP on attention's result [N, H * D], with both residuals."""
        h = x + self.attention.o_proj(mixed)
        out: Tensor = h + self.mlp(self.mlp_norm(h))
        return out


def blocks_of(model: Any, routed: bool = True) -> list[Block]:
    """A MoD model's layers, taken apart; not ``routed``, those of its dense parent."""
    head = head_width(model.config)
    return [
        Block(layer, head, getattr(layer, "router", None) if routed else None, window)
        for layer, window in zip(model.family.decoder_layers(model), model.windows, strict=True)
    ]


def stacked_routers(blocks: Sequence[Block], width: int) -> tuple[Tensor, Tensor]:
    """Weights [M, W] and biases [M] of all routers, float32."""
    routers = [block.router for block in blocks if block.router is not None]
    if not routers:
        return torch.empty(0, width, dtype=torch.float32), torch.empty(0, dtype=torch.float32)
    weights = torch.cat([router.weight.detach().float() for router in routers])
    return weights, torch.cat([router.bias.detach().float() for router in routers])


def attend(q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None = None, window: int | None = None) -> Tensor:
    """Causal attention of the newest N tokens over K stored ones, themselves last: -> [N, H * D].

    Args:
        q: [H, N, D].
        k, v: [G, K, D] in the order of their columns.
        columns: [K], needed with a ``window``.
    """
    tokens, keys = q.shape[1], k.shape[1]
    on_cpu = q.device.type == "cpu"  # elsewhere asking for a column would wait for the device
    if window is not None and columns is not None and (not on_cpu or int(columns[-1] - columns[0]) >= window):
        distance = columns[-tokens:, None] - columns[None]
        out = _sdpa(q, k, v, attn_mask=(distance >= 0) & (distance < window))
    elif tokens == 1:
        out = _lone(q, k, v)
    elif tokens == keys:
        out = _sdpa(q, k, v, is_causal=True)
    elif on_cpu:
        out = _over_past(q, k, v)
    else:
        out = _sdpa(q, k, v, attn_mask=causal_lower_right(tokens, keys))
    return out.transpose(0, 1).reshape(tokens, -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    group = q.shape[0] // k.shape[0]
    if group > 1 and q.device.type != "cpu":
        options["enable_gqa"] = True
    elif group > 1:  # CPU kernels want as many key heads as query heads
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0]


def _lone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query sees every key; a group's queries share their keys, uncopied."""
    grouped = q.reshape(1, k.shape[0], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k[None], v[None]).reshape(q.shape)


def _over_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Past keys (all visible) and new ones (causal) apart, joined by their log-sum-exps: no mask of N x K."""
    heads, tokens, width = q.shape
    past, groups = k.shape[1] - tokens, k.shape[0]
    grouped = q.reshape(1, groups, -1, width)
    old, old_weight = _flash(grouped, k[None, :, :past], v[None, :, :past], False)
    group = heads // groups
    fresh_k, fresh_v = (part[:, past:].repeat_interleave(group, 0)[None] for part in (k, v))
    new, new_weight = _flash(q[None], fresh_k, fresh_v, True)
    share = torch.sigmoid(old_weight.reshape(heads, tokens) - new_weight[0])[..., None]
    return (old.reshape(q.shape) * share + new[0] * (1 - share)).to(q.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [1, H, N, D] and its log-sum-exp [1, H, N]."""
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, weight
