"""The families, one row each, and how their layers are taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modification.architectures.family import Family, Sublayers


def _pre_norm(
    attention: str = "self_attn", norm: str = "input_layernorm", mlp: str = "mlp",
    mlp_norm: str = "post_attention_layernorm",
) -> Callable[[Any], Sublayers]:
    """x + Attn(LN x), then h + MLP(LN h): most families."""

    def take_apart(layer: Any) -> Sublayers:
        attend, before, mix, between = (getattr(layer, name) for name in (attention, norm, mlp, mlp_norm))
        return Sublayers(lambda x, arguments: attend(before(x), **arguments)[0], lambda h: mix(between(h)))

    return take_apart


def _shared_norm(attention: str = "self_attn", norm: str = "input_layernorm") -> Callable[[Any], Sublayers]:
    """x + Attn(LN x) + MLP(LN x), one norm for both: cohere, gptj."""

    def take_apart(layer: Any) -> Sublayers:
        attend, before, mix = getattr(layer, attention), getattr(layer, norm), layer.mlp
        return Sublayers(lambda x, arguments: attend(before(x), **arguments)[0], lambda x: mix(before(x)), True)

    return take_apart


def _sandwich(layer: Any) -> Sublayers:
    """Norms before and after both sub-blocks: gemma 2 and 3."""
    attend, before, after = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    mix, mix_before, mix_after = layer.mlp, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    return Sublayers(
        lambda x, arguments: after(attend(before(x), **arguments)[0]), lambda h: mix_after(mix(mix_before(h)))
    )


def _post_norm(layer: Any) -> Sublayers:
    """Norms after both sub-blocks only: olmo2."""
    attend, after = layer.self_attn, layer.post_attention_layernorm
    mix, mix_after = layer.mlp, layer.post_feedforward_layernorm
    return Sublayers(lambda x, arguments: after(attend(x, **arguments)[0]), lambda h: mix_after(mix(h)))


def _scaled(layer: Any) -> Sublayers:
    """Both branches times a constant: granite."""
    parts, scale = _pre_norm()(layer), layer.residual_multiplier
    return Sublayers(lambda x, arguments: scale * parts.attend(x, arguments), lambda h: scale * parts.mix(h))


def _neox(layer: Any) -> Sublayers:
    parts = _pre_norm("attention")(layer)
    return Sublayers(parts.attend, parts.mix, bool(layer.use_parallel_residual))


def _stablelm(layer: Any) -> Sublayers:
    return _shared_norm()(layer) if layer.use_parallel_residual else _pre_norm()(layer)


def _opt(layer: Any) -> Sublayers:
    """The MLP is two bare projections."""
    attend, before, between = layer.self_attn, layer.self_attn_layer_norm, layer.final_layer_norm
    up, act, down = layer.fc1, layer.activation_fn, layer.fc2
    return Sublayers(
        lambda x, arguments: attend(before(x), **arguments)[0], lambda h: down(act(up(between(h))))
    )


def _bloom(layer: Any) -> Sublayers:
    """Attention and MLP add the residual themselves, so they are given none."""
    attend, before = layer.self_attention, layer.input_layernorm
    mix, between = layer.mlp, layer.post_attention_layernorm
    return Sublayers(
        lambda x, arguments: attend(before(x), torch.zeros_like(x), **arguments)[0],
        lambda h: mix(between(h), torch.zeros_like(h)),
    )


def _falcon(layer: Any) -> Sublayers:
    """Three layouts by config: two norms in parallel, one norm in parallel, or one after the other."""
    config = layer.config
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        parts = _pre_norm("self_attention", "ln_attn", "mlp", "ln_mlp")(layer)
        return Sublayers(parts.attend, parts.mix, True)
    if config.parallel_attn:
        return _shared_norm("self_attention")(layer)
    return _pre_norm("self_attention")(layer)


def _falcon_heads(config: Any) -> int:
    """The newer layout repeats its key heads before it stores them; multi-query attention stores one."""
    return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_attention_heads)


FAMILIES = {
    family.model_type: family
    for family in (
        *(
            Family(name, sublayers=_pre_norm(), llama_shaped=True) for name in ("llama", "mistral", "qwen2", "qwen3")
        ),
        *(
            Family(name, sublayers=_pre_norm())
            for name in ("phi3", "smollm3", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
        ),
        Family("gemma2", sublayers=_sandwich),
        Family("gemma3_text", sublayers=_sandwich),
        Family("olmo2", sublayers=_post_norm),
        Family("granite", sublayers=_scaled),
        Family("stablelm", sublayers=_stablelm),
        Family("cohere", sublayers=_shared_norm()),
        Family("opt", layers="model.decoder.layers", sublayers=_opt),
        Family(
            "gpt2", layers="transformer.h", attention="attn", sublayers=_pre_norm("attn", "ln_1", "mlp", "ln_2"),
        ),
        Family(
            "gpt_neox", layers="gpt_neox.layers", attention="attention", cache_argument="layer_past", sublayers=_neox,
        ),
        Family(
            "gptj", layers="transformer.h", attention="attn", cache_argument="layer_past",
            sublayers=_shared_norm("attn", "ln_1"), passes_keywords=False, returns_tuple=True,
        ),
        Family(
            "bloom", layers="transformer.h", attention="self_attention", cache_argument="layer_past",
            sublayers=_bloom, passes_keywords=False, returns_tuple=True,
        ),
        Family(
            "falcon", layers="transformer.h", attention="self_attention", cache_argument="layer_past",
            sublayers=_falcon, heads=_falcon_heads, passes_keywords=False, returns_tuple=True,
        ),
    )
}
