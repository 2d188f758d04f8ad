"""A Llama-shaped decoder layer taken apart: what comes before attention, attention, what comes after.

Torch on any device. The layer's own modules are called, so adapters and quantised projections work as they
are. Shapes: N tokens, W width, H query heads, G key heads, D head width, K stored keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from modification.architectures import head_width, rotate
from modification.executor.products import SHARED, Products

Rotation = tuple[Tensor, Tensor]  # cos and sin, [N, D]
_QUERIES = 512  # that look through a sliding window together on a CPU: bounds the mask


class Block:
    """One layer; plain functions of its modules.

    Attributes:
        direct: its projections are plain ones on a CPU and its MLP is SiLU's: ``products`` makes them.
        products: set for a thread by :meth:`using`.
    """

    direct = False
    products: Products

    def __init__(self, layer: Any, head: int, router: Any, window: int | None) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = (getattr(self.attention, name, None) for name in ("q_norm", "k_norm"))
        self.head, self.router, self.window = head, router, window

    def using(self, products: Products) -> Block:
        """The same layer with what makes its products."""
        block = copy.copy(self)
        block.products = products
        return block

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, W] -> queries [H, N, D], keys and values [G, N, D], with RoPE."""
        normed = self.norm(x)
        return self._queries(normed, rotation), *self._entries(normed, rotation)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Queries alone."""
        return self._queries(self.norm(x), rotation)

    def entries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values alone."""
        return self._entries(self.norm(x), rotation)

    def _queries(self, normed: Tensor, rotation: Rotation) -> Tensor:
        return rotate(self._heads(self.attention.q_proj, normed, self.q_norm), *rotation)

    def _entries(self, normed: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        k = self._heads(self.attention.k_proj, normed, self.k_norm)
        return rotate(k, *rotation), self._heads(self.attention.v_proj, normed)

    def _heads(self, part: Any, normed: Tensor, norm: Any = None) -> Tensor:
        """A projection's result, head by head: [., N, D]."""
        made = self._linear(part, normed).view(len(normed), -1, self.head)
        return (made if norm is None else norm(made)).transpose(0, 1)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection and MLP on attention's result [N, H * D], with both residuals."""
        h = x + self._linear(self.attention.o_proj, mixed)
        return h + self._mlp(self.mlp_norm(h))

    def _mlp(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not self.direct:
            out: Tensor = mlp(x)
            return out
        wide = F.silu(self._linear(mlp.gate_proj, x), inplace=True).mul_(self._linear(mlp.up_proj, x))
        return self._linear(mlp.down_proj, wide)

    def _linear(self, part: Any, x: Tensor) -> Tensor:
        if self.direct and (x.dtype == torch.float32 or len(x) >= SHARED):
            return self.products(x, part)
        out: Tensor = part(x)
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


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, handed to a device without waiting for it."""
    made = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def attend(q: Tensor, k: Tensor, v: Tensor, columns: Tensor | None = None, window: int | None = None) -> Tensor:
    """Causal attention of the newest N tokens over K stored ones, themselves last: -> [N, H * D].

    Args:
        q: [H, N, D].
        k, v: [G, K, D] in the order of their columns.
        columns: [K], needed with a ``window``.
    """
    tokens, keys = q.shape[1], k.shape[1]
    on_cpu = q.device.type == "cpu"  # elsewhere asking for a column would wait for the device
    if window is not None and columns is not None and not on_cpu:
        out = _sdpa(q, k, v, attn_mask=_visible(columns[-tokens:], columns, window))
    elif window is not None and columns is not None and int(columns[-1] - columns[0]) >= window:
        out = _through_window(q, k, v, columns, window)
    elif tokens == 1:
        out = _lone(q, k, v)
    elif tokens == keys:
        out = _sdpa(q, k, v, is_causal=True)
    elif on_cpu:
        out = _over_past(q, k, v)
    else:
        out = _sdpa(q, k, v, attn_mask=causal_lower_right(tokens, keys))
    return out.transpose(0, 1).reshape(tokens, -1)


def _visible(own: Tensor, columns: Tensor, window: int) -> Tensor:
    """Which stored columns [K] the tokens at ``own`` [N] see: [N, K]."""
    seen = columns[None] <= own[:, None]  # no table of distances: that would be eight times as large
    return seen.logical_and_(columns[None] > (own - window)[:, None])


def _through_window(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, window: int) -> Tensor:
    """Some queries at a time, each lot over the keys that any of it sees."""
    found = []
    for own, lot in zip(torch.split(columns[-q.shape[1] :], _QUERIES), torch.split(q, _QUERIES, 1), strict=True):
        bounds = torch.stack([own[0] - window + 1, own[-1] + 1])
        first, end = torch.searchsorted(columns, bounds).tolist()
        mask = _visible(own, columns[first:end], window)
        found.append(_sdpa(lot, k[:, first:end], v[:, first:end], attn_mask=mask))
    return torch.cat(found, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    masked = type(options.get("attn_mask")) is Tensor  # fused kernels that take masks or float32 refuse `enable_gqa`
    if q.device.type == "cpu" or masked or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(*_side_by_side(q, k, v), **options).reshape(q.shape)
    if q.shape[0] > k.shape[0]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0]


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[G, H / G, N or K, D] each: as many key heads as query heads, none of them copied."""
    groups, group = k.shape[0], q.shape[0] // k.shape[0]
    k, v = (part[:, None].expand(-1, group, -1, -1) for part in (k, v))
    return q.reshape(groups, group, *q.shape[1:]), k, v


def _lone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query sees every key; a group's queries share their keys, uncopied."""
    grouped = q.reshape(1, k.shape[0], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k[None], v[None]).reshape(q.shape)


def _over_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Past keys (all visible) and new ones (causal) apart, joined by their log-sum-exps: no mask of N x K."""
    heads, tokens, width = q.shape
    past, groups = k.shape[1] - tokens, k.shape[0]
    old, old_weight = _flash(q.reshape(1, groups, -1, width), k[None, :, :past], v[None, :, :past], False)
    new, new_weight = _flash(*_side_by_side(q, k[:, past:], v[:, past:]), True)
    share = torch.sigmoid(old_weight.reshape(heads, tokens) - new_weight.reshape(heads, tokens))[..., None]
    mixed = new.reshape(q.shape)
    return mixed.add_(old.reshape(q.shape).sub_(mixed).mul_(share))  # in place: a chunk has many of them


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] and its log-sum-exp [B, H, N]."""
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, weight
