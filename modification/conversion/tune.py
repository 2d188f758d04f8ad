"""Which weights a conversion trains: all, a low-rank change of the projections (peft), or the routers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modification.conversion.muon import MuonWithAdamW
from modification.conversion.recipes import Recipe, default_lr
from modification.loading import ADAPTER
from modification.routing import is_router


def prepare(model: PreTrainedModel, recipe: Recipe) -> Callable[[Path | None], None]:
    """Fix what a recipe does not train, and put its adapters in.

    Returns what to do when training is over: merge the adapters into the weights, or, given a folder, take them
    out of the model and keep them there.

    Raises:
        ValueError: LoRA is asked for and peft is not installed.
    """
    if recipe.tune == "full":
        return _nothing
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_router(name))
    return _nothing if recipe.tune == "router" else _adapt(model, recipe.lora_rank)


def optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's, with the routers at a rate of their own."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    size = sum(weight.numel() for name, weight in model.named_parameters() if not is_router(name))
    lr = recipe.lr or default_lr(size, recipe.tune)
    matrices = _matrices(model, trained) if recipe.optimizer == "muon" else {}
    groups = [
        {"params": [weight for name, weight in trained if is_router(name)], "lr": recipe.router_lr},
        {"params": [weight for name, weight in trained if not is_router(name) and name not in matrices], "lr": lr},
    ]
    groups = [group for group in groups if group["params"]]
    if matrices:
        return MuonWithAdamW(list(matrices.values()), lr, groups)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _matrices(model: PreTrainedModel, trained: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """What Muon is for, by name: two-dimensional weights of the decoder layers."""
    layers = {id(weight) for layer in model.family.decoder_layers(model) for weight in layer.parameters()}
    return {
        name: weight for name, weight in trained if id(weight) in layers and weight.ndim == 2 and not is_router(name)
    }


def _nothing(folder: Path | None) -> None:
    """Nothing to merge."""


def _adapt(model: PreTrainedModel, rank: int) -> Callable[[Path | None], None]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("tune='lora' needs peft: pip install peft") from None
    projections = sorted({
        name.rpartition(".")[2]
        for layer in model.family.decoder_layers(model)
        for name, part in layer.named_modules() if _is_projection(part)
    })
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections, bias="none")
    # The adapters go into the model itself; the wrapper is needed to take them out again.
    wrapper: Any = get_peft_model(model, config)
    model._hf_peft_config_loaded = bool(getattr(model, "is_quantized", False))  # Trainer asks, of quantised models
    for name, weight in model.named_parameters():
        if is_router(name):
            weight.requires_grad_(True)

    def finish(folder: Path | None) -> None:
        model._hf_peft_config_loaded = False
        if folder is None:
            wrapper.merge_and_unload()
        else:
            wrapper.save_pretrained(folder / ADAPTER)
            wrapper.unload()

    return finish


def _is_projection(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
