"""Which executor runs a model: the fast one if nothing speaks against it and its logits are the stock path's."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modification.architectures import Family
from modification.config import MoDConfig
from modification.errors import out_of_memory, reason
from modification.executor.base import Executor, Pass, Stock
from modification.executor.blocks import blocks_of
from modification.executor.fast import Fast
from modification.executor.native import NativeDecoder, library, native_obstacle
from modification.routing import is_router
from modification.threads import heed_limits

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies don't depend on the length
PROBE = 24  # tokens of the check: a prompt, more of it, then single tokens
NEAR = 1e-3  # scores that rounding may bring to either side of p
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}  # of the largest logit


def executor_of(model: Any, compiled: bool = True) -> Executor:
    """The executor for a MoD model; the choice is checked once and kept until weights, types, hooks or RoPE change.

    Args:
        compiled: put ``torch.compile`` around a layer's pieces where that pays; False where it would not last.
    """
    held, signature = model.executor_slot, _signature(model)
    if held.value is None or held.signature != signature:
        held.value, held.signature = choose(model, compiled), signature
    found: Executor = held.value
    return found


def choose(model: Any, compiled: bool = True) -> Executor:
    """The fast executor, or the stock one with the reason in its note."""
    heed_limits()
    why = obstacle(model)
    ways = [True, False] if compiled and model.device.type == "cuda" else [False]
    for way in ways if why is None else []:
        if way:
            logging.getLogger("modification").warning("Compiling the layers for this GPU (a minute or two)...")
        try:
            fast = fast_executor(model, compiled=way)
            difference = disagreement(model, fast)
        except Exception as error:  # a compiler that is missing or fails, a kernel that a device lacks
            if out_of_memory(error):
                raise
            why = f"the fast path fails: {reason(error)}"
            continue
        if difference <= TOLERANCE[model.dtype]:
            return fast
        why = f"the fast path's logits differ by {difference:.2g} of the largest one"
    return Stock(model, str(why))


def fast_executor(model: Any, routed: bool = True, compiled: bool | None = None) -> Fast:
    """The fast executor, unchecked; not ``routed``, it runs the dense parent. ``compiled`` by default on CUDA."""
    blocks = blocks_of(model, routed)
    why, native = native_obstacle(model, blocks), None
    if why is None:
        built, why = library()
        native = None if built is None else NativeDecoder(model, blocks, built)
    note = f"fast: {why}" if native is not None else f"fast: torch ({why})"
    together, why = _together(model, blocks[0].head)
    compiled = model.device.type == "cuda" if compiled is None else compiled
    return Fast(model, blocks, native, note + why, compiled, together)


def _together(model: Any, head: int) -> tuple[Any, str]:
    """Attention of several rows in one launch, or None; and what is to be said about it. For GPUs."""
    if model.device.type != "cuda":
        return None, ""
    config = model.config
    try:
        from modification.executor.ragged import ragged_attention

        heads = config.num_attention_heads, config.num_key_value_heads
        return ragged_attention(*heads, head, model.dtype, model.device), ""
    except Exception as error:  # no Triton, or one that this device or its compiler can't serve
        if out_of_memory(error):
            raise
        return None, f"; rows attend one by one ({reason(error)})"


def shape_obstacle(family: Family, config: Any, mod: MoDConfig) -> str | None:
    """Why the fast executor can't run models of this kind; None if it can."""
    if not family.llama_shaped:
        return f"{config.model_type} is not Llama-shaped"
    if mod.kv != "evict" or mod.gate != "straight_through":
        return f"kv={mod.kv!r} with gate={mod.gate!r} runs there only"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if rope in ROPE_TYPES else f"RoPE of type {rope!r}"


def obstacle(model: Any) -> str | None:
    """Why the fast executor can't run this model at all; None if it can."""
    if (why := shape_obstacle(model.family, model.config, model.mod_config)) is not None:
        return why
    if model.training:
        return "the model is in training mode"
    if model.dtype not in TOLERANCE:
        return f"dtype {model.dtype}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over devices"
    if any(_hooked(module) for module in model.modules()):
        return "hooks are attached"
    if 2 * len(model.model.rotary_emb.inv_freq) != blocks_of(model)[0].head:
        return "RoPE covers a part of the head"
    return None


def _hooked(module: Any) -> bool:
    """Whether calling it does more than its class says."""
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        return True
    return bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def disagreement(model: Any, fast: Executor) -> float:
    """Largest difference between the two paths' logits, over the largest logit: prefill and decode, with every MoD
    layer run and with every other one skipped, save by gates that have reached 1."""
    every_other = tuple(float(at % 2 == 0) for at in range(len(model.mod_layers)))
    return max((_difference(model, fast, p) for p in (0.0, every_other)), key=_nan_first)


def _difference(model: Any, fast: Executor, p: float | tuple[float, ...]) -> float:
    length = min(PROBE, getattr(model.config, "max_position_embeddings", None) or PROBE)
    ids = torch.arange(length, device=model.device) % model.config.vocab_size
    differences = []
    with torch.inference_mode():
        whole = p if isinstance(p, float) else [p]
        out = model(input_ids=ids[None], p=whole, use_cache=False, output_router_scores=True)
        logits, scale = out.logits[0].float(), max(out.logits.abs().max().item(), 1e-6)
        scores, routed = (torch.cat(part).cpu().numpy() for part in (out.router_scores, out.routed))
        cache = model.new_cache()
        for first, end in _pieces(length):
            if end - first > 1:
                found = fast.prefill(ids[first:end], cache, p)
            else:
                found = fast.decode([int(ids[first])], [cache], [p])
            if _rounding_decided(found, scores[:, first:end], routed[:, first:end]):
                break
            differences.append((found.logits[0].float() - logits[end - 1]).abs().max().item() / scale)
        cache.reset()
    worst: float = max(differences, key=_nan_first, default=0.0)
    return worst


def _rounding_decided(found: Pass, scores: npt.NDArray[Any], routed: npt.NDArray[Any]) -> bool:
    """Whether decisions differ from those expected, [M, n], by scores that are alike, which is no fault."""
    flipped = found.routed != routed
    if not flipped.any():
        return False
    lowest = flipped.any(1).argmax()  # the layer: what differs above it follows from it
    return bool(np.abs(found.scores - scores)[lowest, flipped[lowest]].max() <= NEAR)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _pieces(length: int) -> list[tuple[int, int]]:
    """A prompt, a second one after it, then single tokens."""
    bounds = sorted({0, min(12, length), min(20, length), *range(min(20, length), length + 1)})
    return list(itertools.pairwise(bounds))


def _signature(model: Any) -> tuple[Any, ...]:
    """Changes with the weights' places and types, the modules' classes and hooks, RoPE, and the routers' content."""
    places = tuple((id(parameter), parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())
    modules = tuple((type(module), _hooked(module)) for module in model.modules())
    routers = [parameter for name, parameter in model.named_parameters() if is_router(name)]
    here = [part.detach().float().flatten().cpu() for part in routers if not part.is_meta]  # the rest lies on a disk
    content = hash(torch.cat(here).numpy().tobytes()) if here else 0
    rotary = getattr(model.base_model, "rotary_emb", None)
    turns = [(id(part), part.data_ptr(), 0 if part.is_inference() else part._version) for part in model.buffers()]
    scaling = getattr(rotary, "attention_scaling", None)
    return (*places, *modules, *turns, content, scaling, model.training, str(model.config.mod))
