"""Command line: convert, generate, sweep, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modification.architectures import ConversionError, entry_bytes
from modification.config import MoDConfig
from modification.conversion.data import pack, read_documents
from modification.conversion.recipes import AnyP
from modification.conversion.train import train
from modification.generate import generate
from modification.loading import LoadError, encode_prompt, load, load_dense_or_mod
from modification.measure.quality import sweep, table
from modification.model import MoDModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 and a sentence on bad input."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.threads is not None:
            _set_threads(arguments.threads)
        arguments.run(arguments)
    except (LoadError, ConversionError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _set_threads(count: int) -> None:
    if count < 1:
        raise ValueError(f"--threads {count}: must be 1 or more")
    torch.set_num_threads(count)


def _convert(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_dense_or_mod(arguments.parent, dtype=torch.float32)
    if isinstance(model, MoDModel):
        raise ConversionError(f"{arguments.parent} is a MoD model already: give its dense parent")
    config = MoDConfig(layers=_layers(arguments.layers), kv=arguments.kv)
    recipe = AnyP(
        tokens=arguments.tokens, block=arguments.block, batch=arguments.batch, lr=arguments.lr, bf16=arguments.bf16,
        seed=arguments.seed,
    )
    if arguments.held_out < 1:
        raise ValueError(f"--held-out {arguments.held_out}: must be 1 block or more")
    documents = read_documents(arguments.data, tokenizer, arguments.split)
    wanted = arguments.tokens + arguments.held_out * recipe.block
    blocks = pack(documents, recipe.block, wanted)
    if len(blocks) < 2 * arguments.held_out:
        raise ValueError(
            f"{arguments.data} holds {blocks.size} tokens: with {arguments.held_out} blocks of {recipe.block} held "
            "out, too few are left to train on; give more text or a smaller --held-out"
        )
    held_out, blocks = blocks[: arguments.held_out], blocks[arguments.held_out :]
    print(f"{blocks.size:,} training tokens, {held_out.size:,} held out, {recipe.steps} steps", flush=True)
    rows = train(model, tokenizer, config, recipe, blocks, held_out, arguments.out, arguments.resume)
    print(table(rows))
    print(f"written to {arguments.out}")


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


def _sweep(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    blocks = pack(read_documents(arguments.data, tokenizer, arguments.split), arguments.block, arguments.tokens)
    print(table(sweep(model, blocks)))


def _inspect(arguments: argparse.Namespace) -> None:
    model, _ = load_dense_or_mod(arguments.model)
    config: Any = model.config
    mod = isinstance(model, MoDModel)
    print(json.dumps({
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "mod_layers": list(model.mod_layers) if isinstance(model, MoDModel) else [],
        "mod": config.mod if mod else None,
        "kv_bytes_per_token_dense": config.num_hidden_layers * entry_bytes(config, model.dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
    }, indent=1))


def _layers(text: str) -> Any:
    if text in ("inner", "interleaved"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers {text}: expected inner, interleaved or indices like 1,3,5") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modification", description="Mixture-of-Depths models with a dial.")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    commands = parser.add_subparsers(required=True, metavar="command")

    convert = commands.add_parser("convert", help="convert a dense model and train it for every p")
    convert.add_argument("parent", help="dense model: a folder or a Hub id")
    convert.add_argument("out", type=Path, help="folder for the MoD model, its report and its checkpoints")
    convert.add_argument("--data", type=Path, required=True, help=".txt or .jsonl, optionally .xz or .gz")
    convert.add_argument("--split", help="use only JSON lines whose `split` is this")
    convert.add_argument("--tokens", type=int, default=3_000_000, help="training tokens (default: %(default)s)")
    convert.add_argument("--layers", default="inner", help="inner, interleaved or indices like 1,3 (default: inner)")
    convert.add_argument("--kv", default="evict", choices=["evict", "keep"], help="keys and values of skipped tokens")
    convert.add_argument("--block", type=int, default=256, help="tokens per row (default: %(default)s)")
    convert.add_argument("--batch", type=int, default=8, help="rows per step (default: %(default)s)")
    convert.add_argument("--lr", type=float, help="peak learning rate (default: by model size)")
    convert.add_argument("--held-out", type=int, default=128, help="blocks kept for the report (default: %(default)s)")
    convert.add_argument("--bf16", action="store_true", help="mixed precision on a CPU that has bf16 units")
    convert.add_argument("--seed", type=int, default=0)
    convert.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    convert.set_defaults(run=_convert)

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

    over = commands.add_parser("sweep", help="held-out loss and load over a grid of p")
    over.add_argument("model")
    over.add_argument("--data", type=Path, required=True)
    over.add_argument("--split", help="use only JSON lines whose `split` is this")
    over.add_argument("--tokens", type=int, default=32_768)
    over.add_argument("--block", type=int, default=256)
    over.set_defaults(run=_sweep)

    look = commands.add_parser("inspect", help="what a model folder holds")
    look.add_argument("model")
    look.set_defaults(run=_inspect)
    return parser
