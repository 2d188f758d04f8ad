"""Decoding with the kernels of kernels.cpp; all kernels are built once per machine, read from a cache after that.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modification.cache import RaggedCache
from modification.config import Threshold, threshold_at
from modification.errors import reason
from modification.executor.base import Pass
from modification.executor.blocks import Block, stacked_routers
from modification.storage import KINDS, Buffer

SOURCES = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "kernels.cpp", "products.cpp"))
# Fast maths short of -ffast-math: that one would also change how the whole process treats denormals.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
)
BUILD_SECONDS = 300
_Pointer, _Count, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_PARTS = (
    "norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "mlp_norm", "gate", "up",
    "down",
)


class _Layer(ctypes.Structure):
    _fields_ = (*((name, _Pointer) for name in _PARTS), ("window", _Count), ("routed", _Count))


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, _Count) for name in (
            "width", "heads", "kv_heads", "head", "inner", "routers", "depth", "vocabulary", "points", "anchors",
        )),
        *((name, ctypes.c_float) for name in ("epsilon", "router_epsilon", "scale", "turn_scale")), ("kind", _Count),
        *((name, _Pointer) for name in (
            "layers", "dial", "weights", "biases", "turns", "embedding", "norm", "vocabulary_weight",
        )),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("count", _Count),
        *((name, _Pointer) for name in (
            "tokens", "columns", "places", "thresholds", "logits", "gates", "runs", "best", "written", "logprobs",
        )),
    )


class NativeDecoder:
    """One decode step of a Llama-shaped MoD model on the CPU.

    A step is one call: what Python does around it runs with cold caches, after all weights have gone through them, and
    torch's own small operations take 50 to 200 µs each there.

    Args:
        model: float32 or bfloat16, plain linear layers, SiLU MLPs (see :func:`native_obstacle`).
        blocks: its layers.
        library: the built kernels.
    """

    def __init__(self, model: Any, blocks: Sequence[Block], library: ctypes.CDLL) -> None:
        self.library, config, base = library, model.config, model.model
        head, kv_heads, rotary = blocks[0].head, config.num_key_value_heads, base.rotary_emb
        self.like = torch.empty(kv_heads, 0, head, dtype=model.dtype, device="cpu")
        layers, dial = [_layer(block) for block in blocks], model.mod_config.dial
        weights, biases = stacked_routers(blocks, config.hidden_size)
        turns = rotary.inv_freq.detach().float().contiguous()
        lists = (_Pointer * len(layers))(*_addresses(*layers)), (ctypes.c_double * len(dial))(*dial)
        # Storage must outlive a generation, even if the model is moved or cast meanwhile.
        self.kept = [*layers, *lists, weights, biases, turns, *(weight.detach() for weight in model.parameters())]
        self.routers, self.vocabulary = len(biases), len(model.lm_head.weight)
        self.shape = _Shape(
            config.hidden_size, config.num_attention_heads, kv_heads, head, config.intermediate_size, self.routers,
            len(layers), self.vocabulary, len(dial), model.mod_config.anchors, config.rms_norm_eps,
            torch.finfo(torch.float32).eps, blocks[0].attention.scaling, rotary.attention_scaling, KINDS[model.dtype],
            *_addresses(*lists), weights.data_ptr(), biases.data_ptr(), turns.data_ptr(),
            base.embed_tokens.weight.data_ptr(), base.norm.weight.data_ptr(), model.lm_head.weight.data_ptr(),
        )

    def decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        """One token of each of B rows; see :meth:`Executor.decode`.

        Raises:
            IndexError: a token that the vocabulary lacks.
            ValueError: a cache holds entries of another type, or is that of two rows.
        """
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise IndexError(f"tokens {list(tokens)}: the vocabulary has 0 to {self.vocabulary - 1}")
        count = len(tokens)
        if count > 1 and len({id(cache) for cache in caches}) < count:
            raise ValueError("two rows of a batch have the same cache: give each its own")
        stores = [layer.row() for cache in caches for layer in cache.layers]
        bounds = [threshold_at(one, at) for at in range(self.routers) for one in p]
        given = (
            (_Count * count)(*tokens), (_Count * count)(*(cache.get_seq_length() for cache in caches)),
            (_Pointer * len(stores))(*_addresses(*stores)), (_Float * len(bounds))(*bounds),
        )
        logits, gates = (_Float * (count * self.vocabulary))(), (_Float * len(bounds))()
        runs, best, written = (ctypes.c_bool * len(bounds))(), (_Count * count)(), (_Count * count)()
        logprobs = (_Float * count)()
        step = _Step(count, *_addresses(*given, logits, gates, runs, best, written, logprobs))
        while self.library.mod_step(ctypes.byref(self.shape), ctypes.byref(step), torch.get_num_threads()):
            for at, store in enumerate(stores):
                if store.end >= store.capacity:
                    caches[at * count // len(stores)].sizes = None
                store.make_place(self.like)
        for cache, entries in zip(caches, written, strict=True):
            known = cache.sizes
            cache.advance_all(1, known and (known[0] + entries * cache.entry_bytes, known[1]))
        scores = np.frombuffer(memoryview(gates), np.float32).reshape(self.routers, count)
        routed = np.frombuffer(memoryview(runs), np.bool_).reshape(self.routers, count)
        return Pass(logits, scores, routed, list(zip(best, logprobs, strict=True)))

    def head(self, x: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, W], float32. In torch one row's product takes 2 to 3 times as long."""
        given = x.float().contiguous()
        logits = torch.empty(len(given), self.vocabulary, dtype=torch.float32, device="cpu")
        self.library.mod_head(
            ctypes.byref(self.shape), given.data_ptr(), len(given), logits.data_ptr(), torch.get_num_threads()
        )
        return logits


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
    if model.model.embed_tokens.weight.shape != model.lm_head.weight.shape:
        return "the embedding has other sizes than the head"
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
        units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        subprocess.run(
            [*compiler, *FLAGS, *units, "-o", str(made)], check=True, capture_output=True, text=True,
            timeout=BUILD_SECONDS,
        )
        made.replace(path)


def _key(compiler: Sequence[str]) -> str:
    """Names a build: another source, flag, compiler or processor makes another file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
    parts = [" ".join(FLAGS), version, platform.machine(), platform.processor(), flags]
    parts += [source.read_text() for source in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' arguments; the records that both sides know must be alike."""
    sizes = [library.mod_size(at) for at in range(4)]
    if sizes != [ctypes.sizeof(kind) for kind in (_Layer, _Shape, Buffer, _Step)]:
        raise OSError(f"the kernels' records have {sizes} bytes, not those of this module")
    library.mod_step.argtypes = [_Pointer, _Pointer, ctypes.c_int32]
    library.mod_head.argtypes = [_Pointer, _Pointer, _Count, _Pointer, ctypes.c_int32]
    library.mod_product_room.argtypes, library.mod_product_room.restype = [_Count] * 3 + [ctypes.c_int32], _Count
    library.mod_product.argtypes, library.mod_product.restype = [_Pointer] * 5 + [_Count] * 3 + [ctypes.c_int32], None
    for call in (library.mod_step, library.mod_head):
        call.restype, call.errcheck = ctypes.c_int32, _memory  # type: ignore[assignment]
    return library


def _memory(code: int, function: Any, arguments: Any) -> int:
    """Kernels return 1 where memory ran out."""
    if code == 1:
        raise MemoryError("the kernels found no memory for their intermediate results")
    return code


def _addresses(*parts: Any) -> Iterator[int]:
    return map(ctypes.addressof, parts)


def _modules(block: Block) -> dict[str, Any]:
    attention, mlp = block.attention, block.mlp
    return {
        "norm": block.norm, "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
        "q_norm": block.q_norm, "k_norm": block.k_norm, "mlp_norm": block.mlp_norm, "gate": mlp.gate_proj,
        "up": mlp.up_proj, "down": mlp.down_proj,
    }


def _layer(block: Block) -> Any:
    """The addresses of a layer's weights, and what else the kernels ask of it."""
    found: dict[str, Any] = {"window": block.window or 0, "routed": int(block.router is not None)}
    for name, part in _modules(block).items():
        if part is not None:
            found[name] = part.weight.data_ptr()
            if name in "qkvo" and part.bias is not None:
                found[f"{name}_bias"] = part.bias.data_ptr()
    return _Layer(**found)


def _reason(error: Exception) -> str:
    """What stopped the compiler; its command line is of no interest to a user."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the compiler took longer than {BUILD_SECONDS} s"
    if isinstance(error, subprocess.CalledProcessError):
        return reason(OSError(error.stderr)) if error.stderr else f"the compiler ended with status {error.returncode}"
    return reason(error)
