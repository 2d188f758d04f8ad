"""What a model of any size costs on paper: memory, FLOPs, bytes and time, dense against MoD. Nothing is loaded.

Times are the roofline's: a phase takes as long as its FLOPs at the device's peak or its bytes at the device's
bandwidth, whichever is longer (https://doi.org/10.1145/1498765.1498785). Real kernels reach a part of either,
so the ratio of two times says more than the times do. Every figure here is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from modification.architectures import family_of, refuse
from modification.config import LayerRule, MoDConfig
from modification.errors import out_of_memory, reason
from modification.executor.choose import shape_obstacle
from modification.measure.activations import fast_bytes, held, process_bytes, stock_bytes
from modification.measure.cost import ModelShape, layer_flops
from modification.measure.onpaper import dense_config, on_paper, own_mod
from modification.storage import SPARE

MOST_LAYERS = 2048  # of a model on paper, which is built layer by layer


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks from the maker's data sheet; those of CPU cores were measured on one machine.

    Attributes:
        flops: dense 16-bit matrix FLOPs per second.
        flops32: the same in float32, without rounding to shorter types.
        bandwidth: bytes per second from memory.
        memory: bytes.
        cpu: whether it is a processor's cores.
    """

    flops: float
    flops32: float
    bandwidth: float
    memory: float
    cpu: bool = False


def devices() -> dict[str, Device]:
    """Devices by name (data sheets: H200 and H100 SXM, A100 80 GB SXM, L4, RTX 4090; two cores of a server CPU)."""
    return {
        "h200": Device(989e12, 67e12, 4.8e12, 141e9),
        "h100": Device(989e12, 67e12, 3.35e12, 80e9),
        "a100": Device(312e12, 19.5e12, 2.0e12, 80e9),
        "l4": Device(121e12, 30e12, 0.3e12, 24e9),
        "rtx4090": Device(165e12, 82e12, 1.008e12, 24e9),
        "cpu-2-cores": Device(0.3e12, 0.19e12, 0.04e12, 16e9, cpu=True),
    }


@dataclass(frozen=True, slots=True)
class Cost:
    """One side of an estimate; bytes are for the whole batch.

    Attributes:
        weights, kv, activations: bytes; ``kv`` at the full context, spare room of the buffers included for MoD.
        prefill_flops: for all prompts; where the fast executor runs the model, the last layer's results but the last
            token's are not among them, dense or routed.
        decode_flops, decode_bytes: per step, one token of each row, at the full context.
        prefill_seconds, decode_seconds: at the device's peaks; decode per step.
        bound: what limits each phase, ``"compute"`` or ``"memory"``.
    """

    weights: int
    kv: int
    activations: int
    prefill_flops: int
    decode_flops: int
    decode_bytes: int
    prefill_seconds: float
    decode_seconds: float
    bound: tuple[str, str]

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.kv + self.activations


@dataclass(frozen=True, slots=True)
class Estimate:
    """Dense against MoD for one setting."""

    dense: Cost
    mod: Cost
    mod_layers: tuple[int, ...]

    def times(self, name: str) -> float | None:
        """How many times as much of a figure the dense side has; None where the MoD side has none."""
        dense, mod = (getattr(side, name) for side in (self.dense, self.mod))
        return dense / mod if mod else None

    def speed_up(self, new_tokens: int) -> float:
        """Of a whole request: the prompt, then ``new_tokens`` steps at the full context."""
        times = [side.prefill_seconds + new_tokens * side.decode_seconds for side in (self.dense, self.mod)]
        return times[0] / times[1]


def estimate(
    config: Any, *, context: int, batch: int = 1, load: float = 0.5, dtype: torch.dtype = torch.bfloat16,
    layers: LayerRule | tuple[int, ...] = "inner", device: Device | None = None,
) -> Estimate:
    """Cost of ``batch`` prompts of ``context`` tokens and of decoding after them.

    Args:
        config: of a dense or MoD model.
        load: share of tokens that run in each MoD layer.
        layers: which layers are MoD layers.

    Raises:
        ValueError: a value out of bounds, or a kind of model that can't be routed.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"context={context}, batch={batch}: both must be 1 or more")
    if not 0 <= load <= 1:
        raise ValueError(f"load={load}: must be a number from 0 to 1")
    refuse(dense_config(config), "this model")
    try:
        return _estimated(config, context, batch, load, dtype, layers, device or devices()["h200"])
    except ValueError:
        raise
    except Exception as error:  # whatever transformers' code of a family that nobody tried here raises
        if out_of_memory(error):
            raise
        raise ValueError(f"{config.model_type} can't be followed on paper ({reason(error)}): not estimated") from error


def _estimated(
    config: Any, context: int, batch: int, load: float, dtype: torch.dtype, layers: LayerRule | tuple[int, ...],
    machine: Device,
) -> Estimate:
    """The same of what is within bounds."""
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{config.model_type} stores keys and values of unlike widths: not estimated")
    if not 0 < config.num_hidden_layers <= MOST_LAYERS:
        raise ValueError(f"{config.num_hidden_layers} layers: models of 1 to {MOST_LAYERS:,} are estimated")
    mod_layers = MoDConfig(layers=layers).layer_indices(config.num_hidden_layers)
    parent = on_paper(config)
    weights = sum(p.numel() for p in parent.parameters())
    layers_on_paper = family_of(parent).decoder_layers(parent)
    shape = ModelShape.from_config(config, layers_on_paper, mod_layers)
    own = own_mod(config)
    if own.kv != "evict":
        raise ValueError(f"estimates count what eviction saves; this model has kv={own.kv!r}")
    fast = shape_obstacle(family_of(parent), parent.config, own) is None
    stock = 0 if fast else stock_bytes(parent, context, dtype)
    sides = [
        _cost(
            shape, weights, _fast_activations(parent.config, shape, context, share, dtype, machine) if fast else stock,
            context, batch, share, dtype.itemsize, machine, fast,
        )
        for share in (None, load)
    ]
    return Estimate(sides[0], sides[1], mod_layers)


def report(found: Estimate, new_tokens: int) -> str:
    """A Markdown table of both sides; every figure estimated."""
    rows = (
        ("weights, GB", "weights", 1e9), ("keys and values, GB", "kv", 1e9), ("activations, GB", "activations", 1e9),
        ("memory in all, GB", "memory", 1e9), ("prefill, TFLOP", "prefill_flops", 1e12),
        ("decode step, GFLOP", "decode_flops", 1e9), ("decode step, GB read", "decode_bytes", 1e9),
        ("prefill at the device's peak, s", "prefill_seconds", 1),
        ("decode step at the peak, ms", "decode_seconds", 1e-3),
    )
    lines = ["| estimated | dense | MoD | dense / MoD |", "|---|---|---|---|"]
    for label, name, unit in rows:
        dense, mod = (getattr(side, name) / unit for side in (found.dense, found.mod))
        times = found.times(name)
        lines.append(f"| {label} | {dense:.4g} | {mod:.4g} | {'-' if times is None else f'{times:.2f}'} |")
    lines.append(f"| bound by (prefill, decode) | {', '.join(found.dense.bound)} | {', '.join(found.mod.bound)} | |")
    lines.append(f"| prompt and {new_tokens} new tokens | | | {found.speed_up(new_tokens):.2f} |")
    return "\n".join(lines)


def notes(found: Estimate, tokens: int, context: int | None, memory: float) -> list[str]:
    """What the table doesn't say: ``tokens`` a row beyond the model's context, memory beyond the device's."""
    said = [] if context is None or tokens <= context else [
        f"{tokens:,} tokens a row are more than the model's context of {context:,}."
    ]
    return said + [
        f"{name}: {side.memory / 1e9:.4g} GB do not fit into the device's {memory / 1e9:.4g} GB."
        for name, side in (("dense", found.dense), ("MoD", found.mod)) if side.memory > memory
    ]


def kv_bytes(
    shape: ModelShape, context: int, batch: int, load: float | None, itemsize: int, most: bool = False
) -> int:
    """Keys and values at the full context; for MoD (``load`` given) with the buffers' spare room.

    Of a sliding window the stock cache keeps all but one, ours some more to step back to, and (``most``) a chunk of a
    prompt until it is through all layers.
    """
    entry, layers = shape.entry_width * itemsize, range(shape.depth)
    if load is None:
        return batch * entry * sum(min(context, (shape.window(layer) or context + 1) - 1) for layer in layers)
    tokens = {layer: held(shape, layer, context, most) for layer in layers}
    entries = sum(round(load * tokens[layer]) if layer in shape.mod_layers else tokens[layer] for layer in layers)
    return round(batch * entries * entry * (1 + 1 / SPARE))


def _fast_activations(
    config: Any, shape: ModelShape, context: int, load: float | None, dtype: torch.dtype, device: Device
) -> int:
    if device.cpu:
        return process_bytes(config, shape, context, dtype.itemsize)
    return fast_bytes(config, shape, context, dtype.itemsize, load)


def growth_bytes(shape: ModelShape, context: int, itemsize: int) -> int:
    """Old and new buffer of one layer's keys (or values) while it grows."""
    longest = max(held(shape, layer, context, most=True) for layer in range(shape.depth))
    return longest * shape.entry_width * itemsize // 2


def _cost(
    shape: ModelShape, weights: int, activations: int, context: int, batch: int, load: float | None, itemsize: int,
    device: Device, fast: bool,
) -> Cost:
    routed = 0 if load is None else len(shape.mod_layers)
    ran = None if load is None else [round(load * context)] * routed
    end = load if load is not None and shape.depth - 1 in shape.mod_layers else 1.0
    prefill = batch * shape.prefill_flops(context, ran, end if fast else None)
    # A token runs with probability `load` and then meets that share of the context, or of its window.
    shares = [load if load is not None and layer in shape.mod_layers else 1.0 for layer in range(shape.depth)]
    keys = [part * shape.visible(layer, context) for layer, part in enumerate(shares)]
    per_token = sum(part * layer_flops(shape, layer, 1, round(keys[layer])) for layer, part in enumerate(shares))
    step = 2 * shape.head_weights + round(per_token)
    # A layer's weights are read if any row runs it, an expert's if any of these rows meets it.
    read = sum(
        (weights - experts) * (1 - (1 - runs) ** batch)
        + experts / shape.expert_share * (1 - (1 - runs * shape.expert_share) ** batch)
        for weights, experts, runs in zip(shape.layer_weights, shape.each_experts, shares, strict=True)
    )
    entries = batch * sum(part * met for part, met in zip(shares, keys, strict=True))
    traffic = round(itemsize * (read + shape.head_weights + entries * shape.entry_width))
    router_bytes = 4 * routed * (shape.router_weights + 1)
    peak = device.flops if itemsize < 4 else device.flops32
    prefill_times = prefill / peak, (itemsize * weights + router_bytes) / device.bandwidth
    decode_times = batch * step / peak, traffic / device.bandwidth
    row, most = (kv_bytes(shape, context, 1, load, itemsize, high) for high in (False, True))
    return Cost(
        itemsize * weights + router_bytes, kv_bytes(shape, context, batch, load, itemsize),
        activations + growth_bytes(shape, context, itemsize) + most - row,
        prefill, batch * step, traffic, max(prefill_times), max(decode_times),
        (_bound(prefill_times), _bound(decode_times)),
    )


def _bound(times: tuple[float, float]) -> str:
    return "compute" if times[0] >= times[1] else "memory"
