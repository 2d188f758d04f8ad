"""What the engine must know of a family of decoder layers. Boundary: names and small functions, no model of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]


class ConversionError(ValueError):
    """The model can't be made a MoD model; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class Sublayers:
    """A decoder layer as two branches beside its residual stream, norms and scales included.

    Attributes:
        attend: (x [B, T, D], the layer's keyword arguments) -> what attention adds to x.
        mix: (h [B, T, D]) -> what the MLP, or the experts, add to h.
        parallel: both read the same x.
    """

    attend: Callable[[Tensor, Arguments], Tensor]
    mix: Callable[[Tensor], Tensor]
    parallel: bool = False


def no_sublayers(layer: Any) -> Sublayers:
    """Of a family whose layers were never taken apart."""
    raise ConversionError(
        f"{type(layer).__name__}: gate='paper' scales attention and MLP apart, and this family's were never taken "
        "apart here; use gate='straight_through'"
    )


def stored_heads(config: Any) -> int:
    """Key heads that attention stores."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's decoder layer is put together.

    Attributes:
        model_type: the config's ``model_type``.
        layers: path from the causal LM to its list of decoder layers.
        attention: name of a layer's attention.
        cache_argument: name under which a layer receives its cache.
        sublayers: takes a layer apart, for the paper's gate.
        heads: how many key heads attention stores, by config.
        passes_keywords: whether the model hands unknown keyword arguments on to its layers.
        returns_tuple: whether a layer returns (hidden states, attention weights).
        llama_shaped: RMS norms before both sub-blocks, separate q, k, v projections with RoPE over the whole
            head, a gated MLP: what the fast executor runs.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    cache_argument: str = "past_key_values"
    sublayers: Callable[[Any], Sublayers] = no_sublayers
    heads: Callable[[Any], int] = stored_heads
    passes_keywords: bool = True
    returns_tuple: bool = False
    llama_shaped: bool = False

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        found = model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found

    def gated_block(self, layer: Any, x: Tensor, gate: Tensor, arguments: Arguments) -> Tensor:
        """The paper's block: h = x + g * Attn(LN x); y = h + g * MLP(LN h). x [B, T, D], gate [B, T, 1]."""
        parts = self.sublayers(layer)
        h = x + gate * parts.attend(x, arguments)
        return h + gate * parts.mix(x if parts.parallel else h)
