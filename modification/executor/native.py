"""Decoding with the kernels of kernels.cpp: built once per machine, read from a cache after that.

Mirrors the structs of kernels.cpp. Weights, keys and values are passed by address and never copied, so the
addresses are checked before each generation (``choose.executor_of``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modification.cache import RaggedCache
from modification.config import Threshold, threshold_at
from modification.executor.base import Pass
from modification.executor.blocks import Block, stacked_routers

SOURCE = Path(__file__).with_name("kernels.cpp")
# Fast maths short of -ffast-math: that one would also change how the whole process treats denormals.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
)
BUILD_SECONDS = 300
_Pointer, _Count = ctypes.c_void_p, ctypes.c_int64
_PARTS = (
    "norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "mlp_norm", "gate", "up",
    "down",
)


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _Count) for name in ("width", "heads", "kv_heads", "head", "inner", "routers")),
        *((name, ctypes.c_float) for name in ("epsilon", "router_epsilon", "scale")), ("half", ctypes.c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in _PARTS]


class _Row(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("keys", "values", "columns")),
        *((name, _Count) for name in ("capacity", "start", "end", "index", "column", "window")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("layers", "routed", "rows")), ("depth", _Count), ("count", _Count),
        ("dial", _Pointer), ("points", _Count),
        *((name, _Pointer) for name in ("routers", "biases", "thresholds", "anchored", "cosines", "sines")),
        *((name, _Pointer) for name in ("x", "logits", "gates", "runs")),
    ]


class NativeDecoder:
    """One decode step of a Llama-shaped MoD model on the CPU.

    Args:
        model: float32 or bfloat16, plain linear layers, SiLU MLPs (see :func:`native_obstacle`).
        blocks: its layers.
        library: the built kernels.
    """

    def __init__(self, model: Any, blocks: Sequence[Block], library: ctypes.CDLL) -> None:
        self.model, self.blocks, self.library = model, blocks, library
        config, base = model.config, model.model
        self.embedding, self.anchors = base.embed_tokens.weight.detach(), model.mod_config.anchors
        layers, depth = [_layer(block) for block in blocks], len(blocks)
        self.layers = (_Pointer * depth)(*(ctypes.addressof(layer) for layer in layers))
        self.routed = (ctypes.c_uint8 * depth)(*(block.router is not None for block in blocks))
        # Storage must outlive a generation, even if the model is moved or cast meanwhile.
        self.kept = [*layers, *(weight.detach() for weight in model.parameters())]
        self.routers, self.biases = stacked_routers(blocks, config.hidden_size)
        dial = model.mod_config.dial
        self.dial = (ctypes.c_double * len(dial))(*dial)
        head, kv_heads = blocks[0].head, config.num_key_value_heads
        self.shape = _Shape(
            config.hidden_size, config.num_attention_heads, kv_heads, head, config.intermediate_size, len(self.biases),
            config.rms_norm_eps, torch.finfo(torch.float32).eps, blocks[0].attention.scaling,
            int(model.dtype == torch.bfloat16),
        )
        self.head, self.norm = model.lm_head.weight.detach(), base.norm.weight.detach()
        self.like = torch.empty(kv_heads, 0, head, dtype=model.dtype)

    def decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        """One token of each of B rows; see :meth:`Executor.decode`."""
        count, routers = len(tokens), int(self.shape.routers)
        places, held = [cache.get_seq_length() for cache in caches], [cache.nbytes() for cache in caches]
        stores = [[cache.layers[index].row() for cache in caches] for index in range(len(self.blocks))]
        grown = {row for layer in stores for row, store in enumerate(layer) if store.end == store.capacity}
        rows = (_Row * (len(stores) * count))()
        for at, (layer, block) in enumerate(zip(stores, self.blocks, strict=True)):
            for row, store in enumerate(layer):
                self._place(rows[at * count + row], store, row, places[row], block.window)
        x, gates, runs = self._run(tokens, places, rows, p)
        ran, written = iter(runs.reshape(routers, count).tolist()), [0] * count
        for layer, routed in zip(stores, self.routed, strict=True):
            for row, (store, run) in enumerate(zip(layer, next(ran) if routed else [1] * count, strict=True)):
                store.end += run
                written[row] += run
        for row, cache in enumerate(caches):
            stored = held[row].stored + written[row] * cache.entry_bytes
            cache.advance_all(1, None if row in grown else (stored, held[row].allocated))
        logits, likeliest = self._head(x)
        return Pass(logits, gates.reshape(routers, count), runs.reshape(routers, count).astype(bool), likeliest)

    def _run(self, tokens: Sequence[int], places: list[int], rows: Any, p: Sequence[Threshold]) -> tuple[Any, Any, Any]:
        """All layers: the rows' last hidden states [B, W], gates and decisions [M * B]."""
        count, routers = len(tokens), int(self.shape.routers)
        x = self.embedding[torch.tensor(tokens, device="cpu")].float()
        cosines, sines = self._angles(places)
        bounds = [threshold_at(one, at) for at in range(routers) for one in p]
        thresholds, anchored = np.array(bounds, np.float32), np.array(places, np.int64) < self.anchors
        gates, runs = np.empty(routers * count, np.float32), np.empty(routers * count, np.uint8)
        logits = np.empty(routers * count, np.float32)
        step = _Step(
            ctypes.addressof(self.layers), ctypes.addressof(self.routed), ctypes.addressof(rows), len(self.blocks),
            count, ctypes.addressof(self.dial), len(self.dial), self.routers.data_ptr(), self.biases.data_ptr(),
            thresholds.ctypes.data, anchored.ctypes.data, cosines.data_ptr(), sines.data_ptr(), x.data_ptr(),
            logits.ctypes.data, gates.ctypes.data, runs.ctypes.data,
        )
        self.library.mod_step(ctypes.byref(self.shape), ctypes.byref(step), torch.get_num_threads())
        return x, gates, runs

    def _place(self, row: _Row, store: Any, index: int, column: int, window: int | None) -> None:
        store.make_place(self.like)
        row.keys, row.values, row.columns = store.addresses
        row.capacity, row.start, row.end = store.capacity, store.start, store.end
        row.index, row.column, row.window = index, column, window or 0

    def _angles(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE, [B, D / 2]."""
        rotary = self.model.model.rotary_emb
        angles = torch.tensor(places, dtype=torch.float32, device="cpu")[:, None] * rotary.inv_freq.float()
        scaling: float = rotary.attention_scaling
        return angles.cos() * scaling, angles.sin() * scaling

    def _head(self, x: Tensor) -> tuple[Tensor, list[tuple[int, float]]]:
        """Logits [B, V], and each row's likeliest token with its log-probability."""
        weight, count = self.head, len(x)
        out = torch.empty(count, len(weight), dtype=torch.float32, device="cpu")  # whatever the defaults are
        best, logprobs = (_Count * count)(), (ctypes.c_float * count)()
        self.library.mod_head(
            self.norm.data_ptr(), weight.data_ptr(), ctypes.byref(self.shape), x.data_ptr(), count,
            len(weight), out.data_ptr(), best, logprobs, torch.get_num_threads(),
        )
        return out, list(zip(best, logprobs, strict=True))


def native_obstacle(model: Any, blocks: Sequence[Block]) -> str | None:
    """Why the kernels can't run this model; None if they can."""
    if model.device.type != "cpu":
        return f"the weights are on {model.device.type}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"{str(model.dtype).removeprefix('torch.')} has no CPU kernel"
    if model.config.hidden_act != "silu":
        return f"activation {model.config.hidden_act} has no CPU kernel"
    parts = [part for block in blocks for part in _modules(block).values() if part is not None] + [model.lm_head]
    linear = [part for part in parts if hasattr(part, "in_features")]
    if any(type(part) is not nn.Linear for part in linear):
        return "some projections are not plain linear layers"
    if model.lm_head.bias is not None or any(part.bias is not None for b in blocks for part in b.mlp.children() if
                                             isinstance(part, nn.Linear)):
        return "biases in the MLP or the head have no CPU kernel"
    if type(model.model.embed_tokens) is not nn.Embedding:
        return "the embedding is not a plain one"
    tensors = [tensor for part in [*parts, model.model.norm, model.model.embed_tokens] for tensor in part.parameters()]
    if any(tensor.dtype != model.dtype or not tensor.is_contiguous() for tensor in tensors):
        return "the weights are not all of one type and contiguous"
    if any(_shapes(block) != _expected(model.config, block) for block in blocks):
        return "a layer's weights have other sizes than the config says"
    return None


def _shapes(block: Block) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part.weight.shape) for name, part in _modules(block).items() if part is not None}


def _expected(config: Any, block: Block) -> dict[str, tuple[int, ...]]:
    """The sizes that the kernels count on."""
    width, inner, head = config.hidden_size, config.intermediate_size, block.head
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes: dict[str, tuple[int, ...]] = {
        "norm": (width,), "q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries),
        "mlp_norm": (width,), "gate": (inner, width), "up": (inner, width), "down": (width, inner),
    }
    if block.q_norm is not None:
        sizes |= {"q_norm": (head,), "k_norm": (head,)}
    return sizes


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or None, and what is to be said about it. Built at first use, then read from a cache."""
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
    if not compiler:
        return None, "no C++ compiler found (g++ or clang++)"
    try:
        path = cache_folder() / f"kernels-{_key(compiler)}.so"
        if not path.is_file():
            build(compiler, path)
        return _typed(ctypes.CDLL(str(path))), "compiled CPU kernels"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"the CPU kernels could not be built: {_reason(error)}"


def cache_folder() -> Path:
    """Where built kernels are kept: MODIFICATION_CACHE, or the user's cache folder."""
    given = os.environ.get("MODIFICATION_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "modification"


def build(compiler: Sequence[str], path: Path) -> None:
    """Compile the kernels to ``path``; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    logging.getLogger("modification").warning("Compiling the CPU kernels, once on this machine (about 10 seconds)...")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True,
            timeout=BUILD_SECONDS,
        )
        made.replace(path)


def _key(compiler: Sequence[str]) -> str:
    """Names a build: another source, flag, compiler or processor makes another file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
    parts = (SOURCE.read_text(), " ".join(FLAGS), version, platform.machine(), platform.processor(), flags)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' arguments."""
    p, n, i = _Pointer, _Count, ctypes.c_int32
    library.mod_step.argtypes = [p, p, i]
    library.mod_head.argtypes = [p, p, p, p, n, n, p, p, p, i]
    for function in (library.mod_step, library.mod_head):
        function.restype, function.errcheck = i, _memory  # type: ignore[assignment]
    return library


def _memory(code: int, function: Any, arguments: Any) -> None:
    """Kernels return 1 where memory ran out."""
    if code:
        raise MemoryError("the kernels found no memory for their intermediate results")


def _modules(block: Block) -> dict[str, Any]:
    attention, mlp = block.attention, block.mlp
    return {
        "norm": block.norm, "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
        "q_norm": block.q_norm, "k_norm": block.k_norm, "mlp_norm": block.mlp_norm, "gate": mlp.gate_proj,
        "up": mlp.up_proj, "down": mlp.down_proj,
    }


def _layer(block: Block) -> Any:
    """The addresses of a layer's weights."""
    found: dict[str, int | None] = dict.fromkeys(_PARTS)
    for name, part in _modules(block).items():
        if part is not None:
            found[name] = part.weight.data_ptr()
            if name in "qkvo" and part.bias is not None:
                found[f"{name}_bias"] = part.bias.data_ptr()
    return _Layer(**found)


def _reason(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)
