"""llama.cpp through GGUF files: writing them, what they leave of the weights, and its engine."""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.engine import QUANTISED, Engine, Fed, FloatArray, Settings
from benchmarks.peers.files import made


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
        yield tensor_name(parts), array.numpy()
    factors = rope_factors(model)
    if not np.allclose(factors, 1.0, rtol=1e-6):
        yield "rope_freqs.weight", factors


def tensor_name(parts: Sequence[str]) -> str:
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

        self.name, self.kind = llama_name(kind), kind
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


def llama_name(kind: str) -> str:
    """What its engine on weights of this type is called."""
    return f"llama.cpp {kind}"


def llama_engines(model: Any, settings: Settings, store: Path) -> list[Engine]:
    """llama.cpp on the weights in each type asked for."""
    import llama_cpp  # noqa: F401  (before files are written for it)

    kinds = (settings.dtype, *(QUANTISED if settings.quantised else ()))
    return [LlamaCpp(made(store / f"{kind}.gguf", write_gguf, model, kind), kind, settings) for kind in kinds]
