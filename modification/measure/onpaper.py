"""Configs of models that are only told of, from folders, files, the Hub or presets; models of them without memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modification.architectures import PREFIX
from modification.config import MoDConfig
from modification.errors import reason
from modification.integrity import check_config, read_config
from modification.loading import HUB_ID
from modification.measure.presets import preset

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def config_of(source: str) -> Any:
    """The config of a model folder, a config.json, a Hub id (``owner/name``) or a preset's name.

    Raises:
        ValueError: none of these, or a kind of model whose cost isn't known here.
    """
    if not source.strip():
        raise ValueError("no model is named: give a folder, a config.json, a Hub id or a preset")
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (RuntimeError, OSError, ValueError):  # ~nobody; a name too long, or with a null byte
        there = False
    if not there and source.endswith(".json"):
        raise ValueError(f"{source}: there is no such file")
    if there or HUB_ID.fullmatch(source):
        config: Any = _read(str(path) if there else source)
    else:
        config = preset(source)
    experts: int = next((count for name in _EXPERTS if (count := getattr(config, name, None))), 0)
    met: int = getattr(config, "num_experts_per_tok", None) or 0
    if experts and not met:
        raise ValueError(f"{source} is a mixture of experts that does not say how many a token meets: not estimated")
    if experts and not 1 <= met <= experts:
        raise ValueError(f"{source}: num_experts_per_tok={met}: a token can meet 1 to {experts} of {experts} experts")
    return config


def dense_config(config: Any) -> Any:
    """The dense parent's config, of a MoD model's; a dense model's own."""
    if not getattr(config, "mod", None):
        return config
    # Converted in memory, its type may still be the parent's.
    fields = {name: value for name, value in config.to_dict().items() if name not in ("mod", "model_type")}
    return AutoConfig.for_model(config.model_type.removeprefix(PREFIX), **fields)


def own_mod(config: Any) -> MoDConfig:
    """The MoD settings of a converted model's config; the defaults for a dense one's."""
    return MoDConfig.from_dict(config.mod) if getattr(config, "mod", None) else MoDConfig()


def own_layers(config: Any) -> Any:
    """The MoD layers that a converted model's config names; the inner ones of a dense model."""
    return own_mod(config).layers


def on_paper(config: Any) -> nn.Module:
    """The dense model on the meta device: shapes without memory."""
    config = copy.deepcopy(dense_config(config))
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is type(shared) is int and heads % shared:
        raise ValueError(f"num_attention_heads={heads}, num_key_value_heads={shared}: the one must be divisible by the "
                         "other")
    config.dtype = None  # or torch's default would be another meanwhile, for all threads
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a config that doesn't add up makes transformers raise
        raise ValueError(f"no {config.model_type} can be made of this config: {reason(error)}") from error
    return model


def _read(source: str) -> Any:
    path = Path(source).expanduser()
    path = path / "config.json" if (folder := path.is_dir()) else path
    try:
        if folder and not path.is_file():
            raise ValueError("the folder has no config.json")
        if not path.is_file():
            path = Path(hf_hub_download(source, "config.json"))
        check_config(path, read_config(path))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a missing or damaged config makes the readers raise
        raise ValueError(f"{source} has no config that can be read: {reason(error)}") from error
