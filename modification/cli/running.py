"""generate and inspect: use a model, and look at one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from modification.architectures import FAMILIES, ConversionError, entry_bytes
from modification.config import MoDConfig
from modification.executor import executor_of
from modification.generate import generate
from modification.loading import encode_prompt, load, load_dense_or_mod
from modification.model import MoDModel, convert
from modification.routing import is_router


def add(commands: Any) -> None:
    """The parsers of this file's commands."""
    speak = commands.add_parser("generate", help="stream text from a model")
    speak.add_argument("model")
    speak.add_argument("prompt")
    speak.add_argument("--p", type=float, default=0.5, help="threshold, 0 to 1 (default: %(default)s)")
    speak.add_argument("--max-new-tokens", type=int, default=200)
    speak.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    speak.add_argument("--top-p", type=float, default=1.0)
    speak.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: %(default)s)")
    speak.add_argument("--seed", type=int)
    speak.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    speak.set_defaults(run=_generate)

    look = commands.add_parser("inspect", help="what a model is, and what converting it would find and add")
    look.add_argument("model")
    look.set_defaults(run=_inspect)


def _generate(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    ids = encode_prompt(tokenizer, arguments.prompt, chat=not arguments.raw)
    made: list[int] = []
    shown, ran, total, step = "", 0, 0, None
    for step in generate(
        model, ids, p=arguments.p, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        top_p=arguments.top_p, top_k=arguments.top_k, seed=arguments.seed,
    ):
        ran, total = ran + int(step.routed.sum()), total + step.routed.size
        if not step.prefill:
            made.append(step.token)
            whole = tokenizer.decode(made, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):
                print(whole[len(shown):], end="", flush=True)
                shown = whole
    print()
    if step is not None:
        print(
            f"[p {arguments.p:g}, load {ran / total:.2f} (measured), KV {step.kv_stored:,} bytes (measured), "
            f"dense parent {step.kv_dense:,} (estimated)]", file=sys.stderr,
        )


def _inspect(arguments: argparse.Namespace) -> None:
    model, _ = load_dense_or_mod(arguments.model)
    config: Any = model.config
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(found | (_routed(model) if isinstance(model, MoDModel) else _convertible(model)), indent=1))


def _routed(model: MoDModel) -> dict[str, Any]:
    return {
        "kv_bytes_per_token_dense": _kv_bytes(model), "family": model.family.model_type,
        "mod_layers": list(model.mod_layers), "mod": model.config.mod, "executor": executor_of(model).note,
    }


def _kv_bytes(model: Any) -> int:
    """Keys and values of one token in all layers of the dense parent."""
    layers: int = model.config.num_hidden_layers
    return layers * entry_bytes(model.config, model.dtype)


def _convertible(model: Any) -> dict[str, Any]:
    """What a conversion would find and add; refused models say why."""
    try:
        convert(model, MoDConfig(layers=tuple(range(model.config.num_hidden_layers))))
    except ConversionError as error:
        return {"family": None, "can_be_mod_layers": [], "mod_layers": [], "mod": None, "refused": str(error)}
    layers = list(model.mod_layers)
    routers = sum(weight.numel() for name, weight in model.named_parameters() if is_router(name))
    known = model.family.model_type in FAMILIES
    return {
        "kv_bytes_per_token_dense": _kv_bytes(model),
        "family": model.family.model_type + ("" if known else ", by its structure"), "can_be_mod_layers": layers,
        "mod_layers": [], "mod": None, "conversion_adds_parameters_per_layer": routers // len(layers),
        "sliding_windows": sorted({window for window in model.windows if window is not None}),
    }
