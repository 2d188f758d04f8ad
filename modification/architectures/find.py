"""Which family a model is of: by name, or by the structure of its layers; what can't be routed is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from modification.architectures.family import ConversionError, Family
from modification.architectures.table import FAMILIES

ATTENTION_KERNELS = ("sdpa", "eager")
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
_STRUCTURE = ("layers", "attention", "cache_argument", "returns_tuple")


def family_of(model: nn.Module) -> Family:
    """The family of a causal LM; one that is not in the table is read off its structure.

    Raises:
        ConversionError: a model that can't be routed, layers that aren't where they should be, or an attention
            kernel that can't take a mask per call.
    """
    config: Any = getattr(model, "config", None)
    refuse(config, type(model).__name__)
    family = FAMILIES.get(str(config.model_type)) or structured_family(model)
    check_layers(model, family)
    kernel = config._attn_implementation
    if kernel not in ATTENTION_KERNELS:
        raise ConversionError(
            f"attention implementation {kernel!r} can't attend over ragged rows: load the model with "
            f"attn_implementation set to one of {', '.join(ATTENTION_KERNELS)}"
        )
    return family


def refuse(config: Any, name: str) -> None:
    """Raise ConversionError for kinds of models that have no plain stack of decoder layers."""
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise ConversionError(f"{name} has no model type: looked for a Hugging Face model with a config, found none")
    if getattr(config, "is_encoder_decoder", False):
        raise ConversionError(f"{name} ({model_type}) is an encoder-decoder: only decoders can be routed")
    if config.get_text_config() is not config:
        raise ConversionError(
            f"{name} ({model_type}) wraps a language model among other parts: convert its text model by itself"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ConversionError(f"{name} ({model_type}) attends in both directions: routing needs causal attention")
    if getattr(config, "is_decoder", None) is False and getattr(config, "add_cross_attention", None) is False:
        raise ConversionError(f"{name} ({model_type}) is an encoder (is_decoder is false): routing needs a decoder")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConversionError(
            f"{name} ({model_type}) has layers of kind {', '.join(sorted(kinds))}: only full and sliding-window "
            "attention can be routed, since a skipped token must leave nothing behind"
        )


def structured_family(model: nn.Module) -> Family:
    """A family read off the model: a list of decoder layers, each with one attention and a cache argument.

    Raises:
        ConversionError: no such list, or a layer without attention, as in state-space models.
    """
    config: Any = model.config
    name, count = type(model).__name__, getattr(config, "num_hidden_layers", None)
    lists = [
        (path, module) for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and path.count(".") <= 3
    ]
    if not lists:
        raise ConversionError(f"{name} ({config.model_type}): looked for a list of {count} decoder layers, found none")
    path, layers = lists[0]
    attentions = [_attention(layer, f"{name} ({config.model_type}), layer {at}") for at, layer in enumerate(layers)]
    arguments = inspect.signature(type(layers[0]).forward).parameters
    cache = next((argument for argument in CACHE_ARGUMENTS if argument in arguments), None)
    if cache is None:
        raise ConversionError(
            f"{name} ({config.model_type}): its layers take no cache; looked for an argument named "
            f"{', '.join(CACHE_ARGUMENTS)}"
        )
    if len(set(attentions)) > 1:
        raise ConversionError(f"{name} ({config.model_type}): attention is named differently from layer to layer")
    return Family(
        str(config.model_type), layers=path, attention=attentions[0], cache_argument=cache, passes_keywords=False,
    )


def _attention(layer: nn.Module, where: str) -> str:
    """The name of a layer's one attention."""
    found = [name for name, child in layer.named_children() if "attention" in type(child).__name__.lower()]
    if len(found) != 1:
        kinds = ", ".join(type(child).__name__ for child in layer.children())
        raise ConversionError(
            f"{where}: looked for one attention, found {len(found)} among {kinds}; state-space, recurrent and "
            "hybrid layers carry a state from token to token and can't skip one"
        )
    return found[0]


def structure_of(family: Family) -> dict[str, Any] | None:
    """What must be saved to find a family again that is not in the table; None for one that is."""
    if family.model_type in FAMILIES:
        return None
    return {name: getattr(family, name) for name in _STRUCTURE}


def structured(model_type: str, saved: object) -> Family:
    """The family that ``structure_of`` described.

    Raises:
        ConversionError: the description is not one.
    """
    if not isinstance(saved, Mapping) or set(saved) != set(_STRUCTURE):
        raise ConversionError(f"model type {model_type!r}: its layers' structure must be saved as {_STRUCTURE}")
    texts = [saved[name] for name in _STRUCTURE[:-1]]
    if not all(isinstance(text, str) and all(part.isidentifier() for part in text.split(".")) for text in texts):
        raise ConversionError(f"model type {model_type!r}: {texts} are not names of parts of a model")
    layers, attention, cache = texts
    return Family(
        model_type, layers=layers, attention=attention, cache_argument=cache, passes_keywords=False,
        returns_tuple=saved["returns_tuple"] is True,
    )


def check_layers(model: nn.Module, family: Family) -> None:
    """Raise ConversionError if the family's layers or their children are not in their places."""
    name = type(model).__name__
    try:
        layers = family.decoder_layers(model)
    except (AttributeError, AssertionError):
        raise ConversionError(f"{name}: looked for decoder layers at {family.layers}, found none; "
                              "only causal language models with a head can be converted") from None
    for index, layer in enumerate(layers):
        if not hasattr(layer, family.attention):
            raise ConversionError(f"{name}: layer {index} has no {family.attention}")
        if family.model_type in FAMILIES:
            try:
                family.sublayers(layer)
            except AttributeError as error:
                raise ConversionError(f"{name}: layer {index} can't be taken apart: {error}") from None
