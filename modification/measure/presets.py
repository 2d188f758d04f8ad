"""Shapes of well-known models as configs in code, so that their cost can be worked out without a download."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def _llama(width: int, depth: int, heads: int, kv: int, inner: int, vocabulary: int, context: int, **more: Any) -> Any:
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocabulary,
        "max_position_embeddings": context, "head_dim": width // heads, "tie_word_embeddings": False, **more,
    }


def presets() -> dict[str, dict[str, Any]]:
    """Config fields by name; sizes as in the models' own config files."""
    return {
        "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
        "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
        "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
        "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, 131072),
        "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, 128256, 131072),
        "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, 131072, tie_word_embeddings=True),
        "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, 131072, tie_word_embeddings=True),
        "qwen3-0.6b": _llama(1024, 28, 16, 8, 3072, 151936, 40960, model_type="qwen3", head_dim=128,
                             tie_word_embeddings=True),
        "qwen3-4b": _llama(2560, 36, 32, 8, 9728, 151936, 40960, model_type="qwen3", head_dim=128,
                           tie_word_embeddings=True),
        "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, 40960, model_type="qwen3", head_dim=128),
        "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32768, 32768, model_type="mistral", sliding_window=None),
        # For timing on small machines: about GPT-2's size, the shape of the shipped storyteller, and half of it.
        "llama-134m": _llama(768, 12, 12, 12, 2048, 32000, 131072),
        "llama-22m": _llama(384, 14, 6, 2, 896, 4096, 131072, tie_word_embeddings=True),
        "llama-10m": _llama(256, 12, 4, 2, 688, 4096, 131072, tie_word_embeddings=True),
    }


def preset(name: str) -> PreTrainedConfig:
    """The config of a preset.

    Raises:
        ValueError: no such name; lists those there are.
    """
    known = presets()
    if name not in known:
        raise ValueError(f"{name!r} is neither a model folder, config.json, Hub id nor preset: {', '.join(known)}")
    fields = dict(known[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
