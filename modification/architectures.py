"""The one place that knows model families: where layers and sub-blocks live, what arguments are called.

Adding a family is adding a row to ``FAMILIES``; nothing else in the project names one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Position = tuple[Tensor, Tensor] | None
ProjectKV = Callable[[nn.Module, Tensor, Position], tuple[Tensor, Tensor]]


class ConversionError(ValueError):
    """The model can't be made a MoD model; the message says what was looked for."""


def _split_kv(attention: Any, x: Tensor, position: Position) -> tuple[Tensor, Tensor]:
    """Separate k_proj and v_proj, per-head key norm where there is one (Llama, Mistral, Qwen)."""
    shape = (*x.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(x).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    return _rotated(keys.transpose(1, 2), position), attention.v_proj(x).view(shape).transpose(1, 2)


def _gpt2_kv(attention: Any, x: Tensor, position: Position) -> tuple[Tensor, Tensor]:
    """One fused Conv1D: queries, keys and values side by side."""
    _, keys, values = attention.c_attn(x).split(attention.split_size, dim=2)
    shape = (*x.shape[:-1], -1, attention.head_dim)
    return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)


def _neox_kv(attention: Any, x: Tensor, position: Position) -> tuple[Tensor, Tensor]:
    """One fused Linear: query, key and value interleaved head by head; rotary on a part of the head."""
    qkv = attention.query_key_value(x).view(*x.shape[:-1], -1, 3 * attention.head_size).transpose(1, 2)
    _, keys, values = qkv.chunk(3, dim=-1)
    return _rotated(keys, position), values


def _rotated(keys: Tensor, position: Position) -> Tensor:
    """RoPE on the leading dimensions that cos and sin cover; keys [B, H, T, D]."""
    if position is None:
        return keys
    cos, sin = (part.unsqueeze(1) for part in position)
    turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    return torch.cat((rotate(turned, cos, sin), rest), dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in its rotate-half form; heads [..., D], cos and sin that broadcast to it."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


def _never(layer: Any) -> bool:
    return False


def _neox_parallel(layer: Any) -> bool:
    return bool(layer.use_parallel_residual)


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's decoder layer is put together.

    Attributes:
        model_type: the config's ``model_type``.
        layers: path from the causal LM to its list of decoder layers.
        attention, mlp, attention_norm, mlp_norm: names of the layer's children.
        cache_argument: name under which a layer receives its cache.
        project_kv: (attention, normed x [B, T, D], cos/sin) -> keys and values [B, H, T, D].
        parallel: whether attention and MLP read the same residual.
        llama_shaped: RMS norms before both sub-blocks, separate q, k, v projections with RoPE over the whole
            head, a gated MLP: what the fast executor runs.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    cache_argument: str = "past_key_values"
    project_kv: ProjectKV = _split_kv
    parallel: Callable[[Any], bool] = _never
    llama_shaped: bool = False

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        found = model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found

    def keys_values(self, layer: nn.Module, x: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        """Keys and values that ``layer`` would store for x [B, T, D], without running it."""
        normed = layer.get_submodule(self.attention_norm)(x)
        return self.project_kv(layer.get_submodule(self.attention), normed, position)

    def gated_block(self, layer: Any, x: Tensor, gate: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The paper's block: h = x + g * Attn(LN x); y = h + g * MLP(LN h). x [B, T, D], gate [B, T, 1]."""
        attention, mlp = getattr(layer, self.attention), getattr(layer, self.mlp)
        norm, mlp_norm = getattr(layer, self.attention_norm), getattr(layer, self.mlp_norm)
        h: Tensor = x + gate * attention(norm(x), **arguments)[0]
        out: Tensor = h + gate * mlp(mlp_norm(x if self.parallel(layer) else h))
        return out


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", llama_shaped=True),
        Family("mistral", llama_shaped=True),
        Family("qwen2", llama_shaped=True),
        Family("qwen3", llama_shaped=True),
        Family(
            "gpt2", layers="transformer.h", attention="attn", attention_norm="ln_1", mlp_norm="ln_2",
            project_kv=_gpt2_kv,
        ),
        Family(
            "gpt_neox", layers="gpt_neox.layers", attention="attention", cache_argument="layer_past",
            project_kv=_neox_kv, parallel=_neox_parallel,
        ),
    )
}
ATTENTION_KERNELS = ("sdpa", "eager")


def family_of(model: nn.Module) -> Family:
    """The family of a causal LM.

    Raises:
        ConversionError: an unknown family, layers that aren't where they should be, or an attention
            kernel that can't take a mask per call.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConversionError(
            f"{type(model).__name__} (model type {model_type!r}) is not a supported family: looked for "
            f"{', '.join(FAMILIES)}"
        )
    check_layers(model, family)
    kernel = config._attn_implementation
    if kernel not in ATTENTION_KERNELS:
        raise ConversionError(
            f"attention implementation {kernel!r} can't attend over ragged rows: load the model with "
            f"attn_implementation set to one of {', '.join(ATTENTION_KERNELS)}"
        )
    return family


def check_layers(model: nn.Module, family: Family) -> None:
    """Raise ConversionError if the family's layers or their children are not in their places."""
    try:
        layers = family.decoder_layers(model)
    except (AttributeError, AssertionError):
        raise ConversionError(f"{type(model).__name__}: looked for decoder layers at {family.layers}, found none; "
                              "only causal language models with a head can be converted") from None
    wanted = (family.attention, family.mlp, family.attention_norm, family.mlp_norm)
    for index, layer in enumerate(layers):
        missing = [name for name in wanted if not hasattr(layer, name)]
        if missing:
            raise ConversionError(
                f"{type(model).__name__}: layer {index} has no {', '.join(missing)}; looked for {', '.join(wanted)}"
            )


def window_of(config: Any, layer: int) -> int | None:
    """Sliding-window length of a layer, in tokens; None where attention is full."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return window


def entry_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * heads * head_width(config) * dtype.itemsize)


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
