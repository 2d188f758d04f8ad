"""convert and sweep: a MoD model from a dense one, and what it costs in quality."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from modification.architectures import ConversionError
from modification.cli.shared import layers_of
from modification.config import MoDConfig
from modification.conversion.data import pack, read_documents
from modification.conversion.recipes import AnyP
from modification.conversion.train import train
from modification.loading import load, load_dense_or_mod
from modification.measure.quality import sweep, table
from modification.model import MoDModel

_HELD_OUT = 128  # blocks, at most, unless asked for more


def add(commands: Any) -> None:
    """The parsers of this file's commands."""
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
    convert.add_argument("--held-out", type=int, help="blocks kept for the report (default: an eighth, at most 128)")
    convert.add_argument("--bf16", action="store_true", help="mixed precision on a CPU that has bf16 units")
    convert.add_argument("--seed", type=int, default=0)
    convert.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    convert.set_defaults(run=_convert)

    over = commands.add_parser("sweep", help="held-out loss and load over a grid of p")
    over.add_argument("model")
    over.add_argument("--data", type=Path, required=True)
    over.add_argument("--split", help="use only JSON lines whose `split` is this")
    over.add_argument("--tokens", type=int, default=32_768)
    over.add_argument("--block", type=int, default=256)
    over.set_defaults(run=_sweep)


def _convert(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_dense_or_mod(arguments.parent, dtype=torch.float32)
    if isinstance(model, MoDModel):
        raise ConversionError(f"{arguments.parent} is a MoD model already: give its dense parent")
    config = MoDConfig(layers=layers_of(arguments.layers), kv=arguments.kv)
    recipe = AnyP(
        tokens=arguments.tokens, block=arguments.block, batch=arguments.batch, lr=arguments.lr, bf16=arguments.bf16,
        seed=arguments.seed,
    )
    if arguments.held_out is not None and arguments.held_out < 1:
        raise ValueError(f"--held-out {arguments.held_out}: must be 1 block or more")
    documents = read_documents(arguments.data, tokenizer, arguments.split)
    wanted = arguments.tokens + (arguments.held_out or _HELD_OUT) * recipe.block
    blocks = pack(documents, recipe.block, wanted)
    count = arguments.held_out or min(_HELD_OUT, max(1, len(blocks) // 8))
    if len(blocks) < 2 * count:
        raise ValueError(
            f"{arguments.data} holds {blocks.size} tokens: with {count} blocks of {recipe.block} held out, too few "
            "are left to train on; give more text, or a smaller --held-out or --block"
        )
    held_out, blocks = blocks[:count], blocks[count:]
    print(f"{blocks.size:,} training tokens, {held_out.size:,} held out, {recipe.steps} steps", flush=True)
    rows = train(model, tokenizer, config, recipe, blocks, held_out, arguments.out, arguments.resume)
    print(table(rows))
    print(f"written to {arguments.out}")


def _sweep(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    blocks = pack(read_documents(arguments.data, tokenizer, arguments.split), arguments.block, arguments.tokens)
    print(table(sweep(model, blocks)))
