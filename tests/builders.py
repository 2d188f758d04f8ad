"""Tiny random models of every family, and what tests compare with: tolerances, safe thresholds, padding, data."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import Original
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modification import MoDConfig, convert
from modification.executor.native import library

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MODIFICATION_SHARED", REPO.parent / "shared"))

VOCABULARY = 97  # the 95 printable ASCII characters, a start and an end: `tiny_tokenizer` fits
WIDTH = 32
DEPTH = 5
WINDOW = 4
PAD = VOCABULARY - 1  # never among `tokens`

# The one place that says how near is equal; logits of the tiny models are of order 1.
TOLERANCE = {
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
    torch.bfloat16: {"atol": 0.15, "rtol": 0.05},
}

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 256, "bos_token_id": 95, "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 256, "bos_token_id": 95,
    "eos_token_id": None, "pad_token_id": None,
}
_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_FALCON = {**{name: value for name, value in _COMMON.items() if name != "intermediate_size"}, "ffn_hidden_size": 48}

# Variant -> model type and config. What a name says after its family is what the config changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-window": ("qwen2", {**_GROUPED, **_SLIDING}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma2-window": ("gemma2", {**_GROUPED, **_KINDS, "head_dim": 8, "attn_logit_softcapping": 2.0,
                                 "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8}),
    "gemma3_text-window": ("gemma3_text", {**_GROUPED, **_KINDS, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", _GROUPED),
    "phi3-window": ("phi3", {**_GROUPED, "sliding_window": WINDOW}),
    "olmo2": ("olmo2", _GROUPED),
    "granite": ("granite", {**_GROUPED, "residual_multiplier": 0.6, "embedding_multiplier": 2.0,
                            "attention_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": None}),
    "stablelm": ("stablelm", {**_GROUPED, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": ("stablelm", {**_GROUPED, "use_parallel_residual": True, "use_qkv_bias": True}),
    "cohere": ("cohere", {**_GROUPED, "use_qk_norm": True, "tie_word_embeddings": True, "logit_scale": 0.5}),
    "falcon": ("falcon", _FALCON),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "opt": ("opt", {**{name: value for name, value in _COMMON.items() if name != "intermediate_size"},
                    "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4,
                        "bos_token_id": 95, "eos_token_id": None, "pad_token_id": None}),
    "gpt2": ("gpt2", {**_GPT2, "n_inner": 48}),
    "gptj": ("gptj", {**_GPT2, "n_inner": 48, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {**_COMMON, "use_parallel_residual": False}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24,
                                "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "num_experts": 4, "head_dim": 8}),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 2.0}),
}
# Last modules of the attention and the MLP branch, where they are not those two themselves.
BRANCH_ENDS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("self_attn", "fc2"),
}
ALL = tuple(VARIANTS)
# One attention kernel only; elsewhere sdpa and eager are the same function.
EAGER_ONLY = ("gemma2-window", "bloom", "gptj")
# One of each kind of cache and block: plain, windowed, absolute positions.
FEW = ("llama", "mistral-window", "gpt2")


def dense_model(
    variant: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, kernel: str | None = None,
    **changes: Any,
) -> Any:
    """A tiny random dense model, in eval mode, with weights large enough for attention to matter."""
    return _dense(variant, seed, dtype, kernel, tuple(changes.items())).copied()


@functools.cache
def _dense(
    variant: str, seed: int, dtype: torch.dtype, kernel: str | None, changes: tuple[tuple[str, Any], ...]
) -> Original:
    model_type, settings = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **{**settings, **dict(changes)})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=kernel or ("eager" if variant in EAGER_ONLY else "sdpa")
    )
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=noise)
            if weight.dim() > 1:
                weight.copy_(0.2 * values)
            else:
                weight.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * values)
    return Original(model.to(dtype).eval())


def mod_model(
    variant: str = "llama", config: MoDConfig | None = None, *, seed: int = 0, spread: float = 1.5, **options: Any
) -> Any:
    """A tiny MoD model whose scores are spread around a half."""
    return _mod(variant, config or MoDConfig(), seed, spread, tuple(options.items())).copied()


@functools.cache
def _mod(variant: str, config: MoDConfig, seed: int, spread: float, options: tuple[tuple[str, Any], ...]) -> Original:
    model = convert(dense_model(variant, seed=seed, **dict(options)), config)
    scatter_routers(model, spread, seed)
    return Original(model)


def scatter_routers(model: Any, spread: float = 1.5, seed: int = 0) -> None:
    """Random routers: logits of standard deviation ``spread`` around 0, so that at p = 0.5 half the tokens run."""
    noise = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for router in routers(model):
            weight = torch.randn(router.weight.shape, generator=noise)
            router.weight.copy_(weight * spread / weight.shape[-1] ** 0.5)
            router.bias.copy_(0.1 * torch.randn(1, generator=noise))


def routers(model: Any) -> list[Any]:
    """The routers of a MoD model, in the order of its layers."""
    layers = model.family.decoder_layers(model)
    return [layers[index].router for index in model.mod_layers]


def tokens(batch: int = 1, length: int = 14, seed: int = 0) -> Tensor:
    """Random token ids, [B, T]."""
    return torch.randint(0, VOCABULARY - 2, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def safe_threshold(model: Any, ids: Tensor, near: float = 0.5, reach: float = 0.08, **call: Tensor) -> float:
    """The p around ``near`` that is farthest from every score, so that rounding can't flip a decision.

    Decisions in one layer move the scores of the next, so every candidate is tried.
    """
    tried = torch.linspace(near - reach, near + reach, 4, device=ids.device)
    together = {name: value.repeat(len(tried), 1) for name, value in call.items()}
    p = tried.repeat_interleave(len(ids))  # each row its own
    out = model(ids.repeat(len(tried), 1), p=p, output_router_scores=True, use_cache=False, **together)
    margins = (torch.stack(out.router_scores).float() - p[:, None]).abs().transpose(0, 1)
    widest, best = margins.reshape(len(tried), -1).amin(1).max(0)
    assert widest > 1e-5, "no threshold is clear of every score"
    return float(tried[best])


def padded(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Rows [T_i] as one batch: input_ids, attention_mask and position_ids [B, T], padded on ``side``."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[at, place], mask[at, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def assert_close(actual: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Equal within the one tolerance of the dtype; ``where`` [B, T] picks tokens."""
    if where is not None:
        actual, expected = actual[where.bool()], expected[where.bool()]
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance["atol"], rtol=tolerance["rtol"])


def assert_differs(actual: Tensor, expected: Tensor) -> None:
    """Further apart than rounding could bring them, by far."""
    assert (actual - expected).abs().max() > 100 * TOLERANCE[torch.float32]["atol"]


def in_chunks(model: Any, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None, **call: Any) -> dict[str, Any]:
    """Run ids [B, T] piece by piece over one cache; logits [B, T, V], scores and routed [M, B, T], and the cache."""
    cache = model.new_cache()
    logits, scores, routed, start = [], [], [], 0
    assert sum(sizes) == ids.shape[1]
    for size in sizes:
        end = start + size
        piece = dict(call)
        if mask is not None:
            piece["attention_mask"] = mask[:, :end]
            piece["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        out = model(ids[:, start:end], past_key_values=cache, output_router_scores=True, **piece)
        logits.append(out.logits)
        scores.append(torch.stack(out.router_scores))
        routed.append(torch.stack(out.routed))
        start = end
    return {"logits": torch.cat(logits, 1), "scores": torch.cat(scores, 2), "routed": torch.cat(routed, 2),
            "cache": cache}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, then a start (95) and an end (96): 97 in all."""
    vocabulary = {chr(32 + at): at for at in range(95)} | {"<s>": 95, "</s>": 96}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="?")


def save_folder(model: Any, folder: Path) -> Path:
    """A model folder with the tiny tokenizer in it."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shared(*parts: str) -> Path:
    """A path among the shared data, or a skipped test that says what is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is missing: set MODIFICATION_SHARED to the folder that holds {'/'.join(parts)}")
    return path


@contextmanager
def paper_hooks(dense: Any, mod: Any) -> Iterator[None]:
    """Make a dense model compute the paper's gated block, by hooks that know nothing of routed layers.

    Both sub-blocks' outputs are multiplied by g = sigmoid(W rms_norm(x) + b) of the layer's input.
    """
    family, layers = mod.family, mod.family.decoder_layers(dense)
    handles, gates = [], {}

    def remember(index: int, router: Any) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
            gates[index] = torch.sigmoid(normed @ router.weight[0] + router.bias)[..., None]
        return hook

    def scale(index: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> Any:
            whole = out[0] if isinstance(out, tuple) else out
            added = args[1] if family.model_type == "bloom" else 0.0  # there the branch adds the residual itself
            gate = gates[index].view(*whole.shape[:-1], 1)  # opt lays all tokens in one row
            scaled = added + gate * (whole - added)
            return (scaled, *out[1:]) if isinstance(out, tuple) else scaled
        return hook

    for index, router in zip(mod.mod_layers, routers(mod), strict=True):
        note = remember(index, copy.deepcopy(router))
        handles.append(layers[index].register_forward_pre_hook(note, with_kwargs=True))
        for end in BRANCH_ENDS.get(family.model_type, (family.attention, "mlp")):
            handles.append(getattr(layers[index], end).register_forward_hook(scale(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """So many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernels() -> Any:
    """The compiled CPU kernels; the test is skipped where they can't be built."""
    built, why = library()
    if built is None:
        pytest.skip(f"no kernels on this machine: {why}")
    return built
