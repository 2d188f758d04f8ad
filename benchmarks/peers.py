"""One dense Llama, several engines: seconds of prefill and of each decoded token, on the same weights.

    PYTHONPATH=. python benchmarks/peers.py FOLDER --contexts 512,2048 --threads 2 --json peers.json

Engines: stock transformers (always), llama.cpp (through GGUF files written here), ONNX Runtime GenAI (through its
model builder), and whatever ``main`` is given as ``build``: see :func:`ours`. Before anything is timed, an engine's
logits are held against transformers' in float32 on the same rounded weights, over a prompt and a few single tokens; if
they are further apart than its type allows, it is refused. Token ids are random and fed, never sampled, so that every
engine does the same work. Rounds alternate between the engines; ratios are taken within a round, so that a machine
that slows down for a while slows all of them. ``pip install -r benchmarks/requirements-peers.txt`` gets the engines.

Left as the engines have it: llama.cpp keeps keys and values in f16 (its flash attention would turn f32 ones into f16
at every step) and, below f32, rounds activations too; its cache and ONNX Runtime's are there before the clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

FloatArray = npt.NDArray[np.float32]

LIMITS = {"f32": 2e-2, "bf16": 1e-1, "q8_0": 1e-1, "q4_0": 1e-1}  # by type of weights; of the largest logit
CHECK = (24, 8)  # tokens of the check: a prompt, then single ones
SETTLE = 0.1  # seconds between runs, for the threads of the engine before to go to sleep
PACKAGES = ("torch", "transformers", "llama_cpp_python", "gguf", "onnxruntime", "onnxruntime-genai", "onnx")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was asked for."""

    folder: Path
    contexts: tuple[int, ...] = (512, 2048)
    new_tokens: int = 64
    rounds: int = 5
    threads: int = 2
    engines: tuple[str, ...] = ("llamacpp", "ort")
    dtype: str = "f32"
    quantised: bool = False
    work: Path = Path("runs/peers")

    @property
    def room(self) -> int:
        """Tokens that the longest run holds."""
        return max(*self.contexts, sum(CHECK)) + self.new_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run took."""

    prefill_seconds: float
    decode_seconds_per_token: float


class Unsupported(Exception):
    """An engine can't run this, for the reason given."""


class Engine(ABC):
    """Something that runs token ids through a model.

    Attributes:
        name: as it stands in the table; unique.
        note: for people: how it was set up; read at the end.
    """

    name: str
    note: str = ""

    @abstractmethod
    def run(self, prompt_ids: list[int], follow_ids: list[int]) -> Timing:
        """Time the prompt, to the last token's logits, and then each of the tokens that follow, one by one."""


class Fed(Engine):
    """An engine that is fed ids, and whose logits can be checked.

    Attributes:
        kind: type of its weights, a key of ``LIMITS``.
    """

    kind: str

    @abstractmethod
    def reset(self, room: int) -> None:
        """Forget everything; at most ``room`` tokens will come."""

    @abstractmethod
    def feed(self, ids: list[int]) -> None:
        """Run these after what was fed, and be done when it returns."""

    @abstractmethod
    def last_logits(self) -> FloatArray:
        """Logits [V] of the last token fed."""

    def run(self, prompt_ids: list[int], follow_ids: list[int]) -> Timing:
        """Time a prompt and the tokens that follow."""
        self.reset(len(prompt_ids) + len(follow_ids))
        started = time.perf_counter()
        self.feed(prompt_ids)
        prefilled = time.perf_counter()
        for token in follow_ids:
            self.feed([token])
        ended = time.perf_counter()
        return Timing(prefilled - started, (ended - prefilled) / len(follow_ids))

    def logits(self, prompt_ids: list[int], follow_ids: list[int]) -> FloatArray:
        """Logits [1 + len(follow_ids), V] after the prompt and after each token that follows."""
        self.reset(len(prompt_ids) + len(follow_ids))
        rows = []
        for ids in (prompt_ids, *([token] for token in follow_ids)):
            self.feed(ids)
            rows.append(self.last_logits().copy())
        return np.stack(rows)


Build = Callable[[Path, Settings], Iterable[Engine]]


def ours(folder: Path, settings: Settings, build: Build | None) -> list[Engine]:
    """This project's engines on the MoD version of the dense weights in ``folder``; none without ``build``.

    ``build(folder, settings)`` makes one engine at p = 0 (load 1), and one for each load to be shown. They alternate
    with the others. One whose logits should be the dense model's extends :class:`Fed`, and is then checked as well.
    """
    return [] if build is None else list(build(folder, settings))


# --- transformers


class Stock(Fed):
    """Transformers' own forward with its growing cache."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.name, self.kind = stock_name(dtype), dtype
        self.note = f"{model.config._attn_implementation} attention, DynamicCache"
        self._model = model

    def reset(self, room: int) -> None:
        """A fresh cache."""
        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> None:
        """One forward."""
        out = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = out.logits

    def last_logits(self) -> FloatArray:
        """Of the last forward."""
        found: FloatArray = self._logits[0, -1].float().numpy()
        return found


def stock_name(dtype: str) -> str:
    """What ratios are taken to."""
    return f"transformers {dtype}"


# --- llama.cpp


def llama_tensors(model: Any) -> Iterator[tuple[str, FloatArray]]:
    """A Hugging Face Llama's weights under the names that llama.cpp gives them, in float32."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = name.split(".")
        array = tensor.float()
        if parts[-2] in heads:
            array = interleaved(array, heads[parts[-2]])
        yield llama_name(parts), array.numpy()
    factors = rope_factors(model)
    if not np.allclose(factors, 1.0, rtol=1e-6):
        yield "rope_freqs.weight", factors


def llama_name(parts: Sequence[str]) -> str:
    """``model.layers.3.mlp.up_proj.weight``, split at its dots, as llama.cpp calls it: ``blk.3.ffn_up.weight``."""
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{block}{names[parts[-2]]}.{parts[-1]}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows for a RoPE that turns neighbours, where transformers' turns row i with i + half."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(model: Any) -> FloatArray:
    """What the plain RoPE frequencies are divided by to get the model's: all ones unless they are scaled."""
    rotary, config = model.model.rotary_emb, model.config
    frequencies = rotary.inv_freq.double().numpy()
    if rotary.attention_scaling != 1.0 or 2 * len(frequencies) != config.head_dim:
        raise ValueError("RoPE that scales attention or covers a part of the head is not exported")
    exponents = np.arange(len(frequencies)) / len(frequencies)
    factors: FloatArray = (config.rope_parameters["rope_theta"] ** -exponents / frequencies).astype(np.float32)
    return factors


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Write the weights as a GGUF file: matrices as ``kind``, vectors in f32, and no vocabulary but its size."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, array in llama_tensors(model):
        stored = stored_type(array.shape, kind)
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_type(shape: Sequence[int], kind: str) -> Any:
    """The GGUF type of a tensor in a file of this kind: its own if it is a matrix whose rows make whole blocks."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind.upper()]
    fits = len(shape) == 2 and shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else gguf.GGMLQuantizationType.F32


def rounded(model: Any, kind: str) -> Any:
    """The model with matrices rounded as a file of this kind has them, still in float32; a copy, unless f32."""
    if kind == "f32":
        return model
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        if kind == "bf16":
            parameter.data = parameter.data.bfloat16().float()
        else:
            parameter.data = through_gguf(parameter.data, kind)
    return twin


def through_gguf(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight when it was stored."""
    import gguf

    stored = stored_type(weight.shape, kind)
    array = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), stored), stored)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


class LlamaCpp(Fed):
    """llama.cpp's decode on a GGUF file; the context is made once and emptied for every run."""

    def __init__(self, path: Path, kind: str, settings: Settings) -> None:
        import llama_cpp

        self.name, self.kind = f"llama.cpp {kind}", kind
        self._api = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        load = llama_cpp.llama_model_default_params()
        load.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), load)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._context = llama_cpp.llama_init_from_model(self._model, self._parameters(settings))
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        system = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.note = f"flash attention, keys and values in f16; {system}"

    def _parameters(self, settings: Settings) -> Any:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = settings.room
        parameters.n_ubatch, parameters.n_seq_max = 512, 1
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.type_k = parameters.type_v = self._api.GGML_TYPE_F16
        parameters.offload_kqv = parameters.op_offload = False
        return parameters

    def reset(self, room: int) -> None:
        """Empty the cache."""
        self._api.llama_memory_clear(self._memory, False)

    def feed(self, ids: list[int]) -> None:
        """One decode call; llama.cpp counts positions itself and keeps the last token's logits alone."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode says {code}")
        self._api.llama_synchronize(self._context)

    def last_logits(self) -> FloatArray:
        """Of the last token fed; a view that the next call overwrites."""
        place = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(place, (self._vocabulary,))


def llama_engines(model: Any, settings: Settings, store: Path) -> list[Engine]:
    """llama.cpp on the weights in each type asked for."""
    import llama_cpp  # noqa: F401  (before files are written for it)

    kinds = (settings.dtype, *(("q8_0", "q4_0") if settings.quantised else ()))
    return [LlamaCpp(made(store / f"{kind}.gguf", write_gguf, model, kind), kind, settings) for kind in kinds]


# --- ONNX Runtime GenAI


def write_onnx(model: Any, out: Path, dtype: str) -> None:
    """Export with GenAI's model builder, logits for the last token alone."""
    from onnxruntime_genai.models import builder

    precision = {"f32": "fp32", "bf16": "bf16"}[dtype]
    staged, cache = out.with_name("source"), out.with_name("cache")
    stage(model, staged)
    places = ("", str(staged), str(out), precision, "cpu", str(cache))
    options = builder.parse_extra_options(*places, ["prune_lm_head=true", "hf_token=false"])
    builder.create_model(*places, **options)


def stage(model: Any, folder: Path) -> None:
    """Save what the builder reads: weights, special tokens, and a tokenizer, which it wants but which is not used."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["bos_token_id"] = config["eos_token_id"] = config["pad_token_id"] = 0
    path.write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = Tokenizer(WordLevel({"<0>": 0}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>").save_pretrained(folder)


class OnnxRuntime(Fed):
    """ONNX Runtime GenAI on an exported folder; a generator is made for every run, outside of the time."""

    def __init__(self, folder: Path, dtype: str, settings: Settings) -> None:
        import onnxruntime_genai

        self.name, self.kind = f"ONNX Runtime {dtype}", dtype
        self.note = "GenAI, CPU, one buffer for past and present keys and values"
        self._api = onnxruntime_genai
        self._generator: Any = None
        onnxruntime_genai.disable_telemetry_events()
        config = onnxruntime_genai.Config(str(folder))
        session = {"intra_op_num_threads": settings.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)

    def reset(self, room: int) -> None:
        """A fresh generator."""
        self._generator = None  # frees its buffers before there are new ones
        parameters = self._api.GeneratorParams(self._model)
        parameters.set_search_options(max_length=room, batch_size=1, do_sample=False)
        self._generator = self._api.Generator(self._model, parameters)

    def feed(self, ids: list[int]) -> None:
        """Append, which runs them."""
        self._generator.append_tokens(np.array(ids, dtype=np.int32))

    def last_logits(self) -> FloatArray:
        """Of the last token fed."""
        found: FloatArray = self._generator.get_logits()[0, -1]
        return found


def ort_engines(model: Any, settings: Settings, store: Path) -> list[Engine]:
    """ONNX Runtime GenAI on the weights."""
    import onnxruntime_genai  # noqa: F401  (before files are written for it)

    dtype = settings.dtype
    folder = made(store / f"onnx-{dtype}", write_onnx, model, dtype)
    try:
        return [OnnxRuntime(folder, dtype, settings)]
    except Exception as error:
        if dtype == "f32":
            raise
        raise Unsupported(f"{dtype} is not supported by this CPU build ({first_line(error)})") from error


# --- files


def store_of(settings: Settings) -> Path:
    """Where exports of these weights lie: a folder named after the weights' files and the packages' versions."""
    files = sorted(path for path in settings.folder.iterdir() if path.suffix in (".json", ".safetensors"))
    stamp = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    digest = hashlib.sha256((stamp + repr(versions())).encode()).hexdigest()[:12]
    return settings.work / f"{settings.folder.resolve().name}-{digest}"


def made(path: Path, write: Callable[[Any, Path, str], None], model: Any, kind: str) -> Path:
    """``path``, which ``write`` makes unless an earlier run did; one that is cut short leaves nothing of that name."""
    if not path.exists():
        say(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            with contextlib.redirect_stdout(sys.stderr):
                write(model, Path(scratch) / path.name, kind)
            (Path(scratch) / path.name).rename(path)
    return path


def load_dense(folder: Path, dtype: str) -> Any:
    """The folder's model with transformers, from safetensors alone.

    Raises:
        ValueError: it is not a dense Llama.
    """
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "llama":
        raise ValueError(f"{folder} is not a dense Llama: its model_type is {kind!r}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True).eval()


# --- the run


@dataclass(slots=True)
class Peers:
    """The engines of a run, and for each one that can't be timed the reason."""

    vocabulary: int
    engines: list[Engine]
    missing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], list[Engine]]) -> None:
        """Add what ``make`` gives, or note why it can't."""
        try:
            self.engines += make()
        except Unsupported as error:
            self.missing[name] = str(error)
        except ImportError as error:
            self.missing[name] = f"not installed ({first_line(error)})"
        except Exception as error:
            self.missing[name] = f"failed: {first_line(error)}"

    def check(self, model: Any) -> None:
        """Drop engines whose logits are too far from those of ``model``, a float32 one, on weights of their type."""
        prompt, follow = random_ids(self.vocabulary, *CHECK, seed=1)
        checked = [engine for engine in self.engines if isinstance(engine, Fed)]
        expected = {
            kind: Stock(rounded(model, kind), kind).logits(prompt, follow)
            for kind in ("f32", *sorted({engine.kind for engine in checked} - {"f32"}))
        }
        for engine in checked:
            logits, limit = engine.logits(prompt, follow), LIMITS[engine.kind]
            difference = apart(logits, expected[engine.kind])
            self.differences[engine.name] = {
                "to_same_weights": difference, "to_float32_weights": apart(logits, expected["f32"]), "limit": limit
            }
            say(f"{engine.name}: logits differ by {difference:.2g} of the largest, {limit:g} is allowed")
            if not difference <= limit:
                self.refused[engine.name] = f"logits differ by {difference:.2g} of the largest, {limit:g} is allowed"
                self.engines.remove(engine)


def apart(logits: FloatArray, expected: FloatArray) -> float:
    """The largest difference, over the largest expected logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def gather(settings: Settings, build: Build | None) -> Peers:
    """Make all engines and check their logits."""
    reference = load_dense(settings.folder, "f32")
    if settings.room > reference.config.max_position_embeddings:
        raise ValueError(f"the model has {reference.config.max_position_embeddings} positions, not {settings.room}")
    plain = reference if settings.dtype == "f32" else load_dense(settings.folder, settings.dtype)
    store, peers = store_of(settings), Peers(reference.config.vocab_size, [Stock(plain, settings.dtype)])
    makers = {"llamacpp": llama_engines, "ort": ort_engines}
    for name in settings.engines:
        peers.add(name, partial(makers[name], reference, settings, store))
    peers.engines += ours(settings.folder, settings, build)
    peers.check(reference)
    if (name := stock_name(settings.dtype)) in peers.refused:
        raise ValueError(f"{name} can't be what the others are compared with: {peers.refused[name]}")
    return peers


Times = dict[str, list[Timing]]


def measure(engines: Sequence[Engine], context: int, vocabulary: int, settings: Settings) -> Times:
    """Times of every engine in each round but the first; the rounds start at one engine after the other."""
    prompt, follow = random_ids(vocabulary, context, settings.new_tokens, seed=context)
    times: Times = {engine.name: [] for engine in engines}
    for turn in range(settings.rounds + 1):
        say(f"context {context}, round {turn} of {settings.rounds}{' (dropped)' if turn == 0 else ''}")
        first = turn % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            gc.collect()
            time.sleep(SETTLE)
            times[engine.name].append(engine.run(prompt, follow))
    return {name: found[1:] for name, found in times.items()}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of what rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """``median (low-high)``, each number in this format."""
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one context; ratios say how many times as fast as stock it is, within a round."""

    engine: str
    context: int
    prefill_seconds: Spread
    decode_tokens_per_second: Spread
    prefill_ratio: Spread
    decode_ratio: Spread


def summarise(times: Times, context: int, stock: str) -> list[Row]:
    """Rows of one context."""
    rows = []
    for name, found in times.items():
        pairs = list(zip(times[stock], found, strict=True))
        rows.append(Row(
            name, context,
            Spread.of([timing.prefill_seconds for timing in found]),
            Spread.of([1 / timing.decode_seconds_per_token for timing in found]),
            Spread.of([base.prefill_seconds / timing.prefill_seconds for base, timing in pairs]),
            Spread.of([base.decode_seconds_per_token / timing.decode_seconds_per_token for base, timing in pairs]),
        ))
    return rows


def table(rows: Iterable[Row]) -> str:
    """Rows in Markdown: medians, with the smallest and the largest."""
    lines = [
        "| engine | context | prefill, s | decode, tokens/s | prefill, times stock | decode, times stock |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.engine} | {row.context} | {row.prefill_seconds.text('.3f')} "
        f"| {row.decode_tokens_per_second.text('.1f')} "
        f"| {row.prefill_ratio.text('.2f')} | {row.decode_ratio.text('.2f')} |"
        for row in rows
    ]
    return "\n".join(lines)


def report(settings: Settings, peers: Peers, rows: Iterable[Row]) -> dict[str, Any]:
    """Everything that a run found, for JSON."""
    asked = asdict(settings) | {"folder": str(settings.folder), "work": str(settings.work)}
    return {
        "settings": asked, "machine": machine(), "versions": versions(),
        "notes": {engine.name: engine.note for engine in peers.engines},
        "missing": peers.missing, "refused": peers.refused, "logit_differences": peers.differences,
        "rows": [asdict(row) for row in rows],
    }


# --- small things


def random_ids(vocabulary: int, prompt: int, follow: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it."""
    ids = np.random.default_rng(seed).integers(vocabulary, size=prompt + follow).tolist()
    return ids[:prompt], ids[prompt:]


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Processor and cores that this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "cores": cores()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]


def say(text: str) -> None:
    """Progress, on stderr: stdout has the table and the JSON line."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, build: Build | None = None) -> int:
    """Run; 1 if an engine was refused for its logits, 2 and a sentence on bad input."""
    try:
        settings, out = parse(argv)
        torch.set_num_threads(settings.threads)
        peers = gather(settings, build)
        rows: list[Row] = []
        for context in settings.contexts:
            times = measure(peers.engines, context, peers.vocabulary, settings)
            rows += summarise(times, context, stock_name(settings.dtype))
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    print(table(rows), end="\n\n")
    for name, why in (peers.missing | peers.refused).items():
        print(f"{name}: {why}", end="\n\n")
    line = json.dumps(report(settings, peers, rows))
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    return 1 if peers.refused else 0


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path | None]:
    """Settings from the command line, and where JSON goes."""
    parser = argparse.ArgumentParser(prog="peers", description="Time engines on the weights of one dense Llama.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder: config.json and safetensors")
    parser.add_argument("--contexts", default="512,2048", help="prompt lengths (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one that is dropped (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every engine (default: %(default)s)")
    parser.add_argument("--engines", default="llamacpp,ort", help="beside stock (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32", help="of the weights (default: %(default)s)")
    parser.add_argument("--quantised", action="store_true", help="llama.cpp on q8_0 and q4_0 too")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="for exports (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the JSON line here too")
    asked = parser.parse_args(argv)
    names = tuple(name for name in asked.engines.split(",") if name)
    if unknown := set(names) - {"llamacpp", "ort"}:
        raise ValueError(f"--engines {','.join(sorted(unknown))}: expected llamacpp, ort or both")
    settings = Settings(
        asked.folder, numbers(asked.contexts), asked.new_tokens, asked.rounds, asked.threads, names, asked.dtype,
        asked.quantised, asked.work,
    )
    if min(*settings.contexts, settings.new_tokens, settings.rounds, settings.threads, 1) < 1:
        raise ValueError("contexts, --new-tokens, --rounds and --threads must be 1 or more")
    if settings.threads > cores():
        say(f"warning: {settings.threads} threads on {cores()} cores")
    return settings, asked.json


def numbers(text: str) -> tuple[int, ...]:
    """``512,2048`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--contexts {text}: expected numbers like 512,2048") from None


if __name__ == "__main__":
    sys.exit(main())
