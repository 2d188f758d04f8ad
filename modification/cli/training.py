"""convert, dial and sweep: a MoD model from a dense one, its dial on your text, and what it costs in quality."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modification.architectures import ConversionError, family_of
from modification.cli.shared import check_block, check_vocabulary, layers_of, numbers
from modification.config import MoDConfig
from modification.conversion import layers as choosing
from modification.conversion.calibrate import CALIBRATION_TOKENS, bend_dial
from modification.conversion.checks import CHECKPOINTS, REPORT, Options
from modification.conversion.data import Text, pack, read_documents, token_ids
from modification.conversion.recipes import RECIPES, Recipe, named
from modification.conversion.sources import Reading, read_text
from modification.loading import load_dense_or_mod
from modification.measure.evalharness import evaluate_tasks
from modification.measure.quality import reference_of, sweep
from modification.measure.report import rows_of, table
from modification.model import MoDModel

_DIALLED = (0.1, 0.25, 0.5, 0.75, 0.9)  # thresholds that `dial` reports
_RANKED_BLOCKS = 16  # of the text, to choose layers by


def add(commands: Any) -> None:
    """The parsers of this file's commands."""
    convert = commands.add_parser(
        "convert", help="convert a dense model by a recipe", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a dense model by a recipe; OUT gets the model, report.json and a card.",
    )
    convert.add_argument("parent", help="dense model: a folder or a Hub id")
    convert.add_argument("out", type=Path, help="folder for the MoD model, its report and its checkpoints")
    text = convert.add_argument_group("text")
    text.add_argument(
        "--data", action="append", required=True, metavar="SOURCE",
        help=".txt, .jsonl (both optionally .xz or .gz), .parquet, hub:owner/name, or self (text that the parent "
        "samples); may be given several times",
    )
    text.add_argument("--shares", help="of the training tokens, one for each --data, like 0.7,0.3 (default: alike)")
    text.add_argument("--reweight", action="store_true", help="move the sources' weights towards those that lag behind")
    text.add_argument("--split", help="use only rows whose `split` is this; of a hub data set, its split")
    text.add_argument("--responses", action="store_true", help="learn what the assistant says alone")
    text.add_argument("--held-out", type=int, help="blocks kept for the report (default: an eighth, at most 128)")
    text.add_argument("--held-out-data", metavar="SOURCE", help="take them from here")
    text.add_argument("--held-out-split", help="and of there only rows whose `split` is this")
    how = convert.add_argument_group("recipe")
    how.add_argument("--recipe", default="any-p", choices=list(RECIPES), help="default: %(default)s")
    how.add_argument("--tune", choices=["full", "lora", "router"], help="what is trained (default: full)")
    how.add_argument("--lora-rank", type=int, help="default: 16")
    how.add_argument("--keep-adapter", action="store_true", help="leave LoRA's change beside the model, unmerged")
    how.add_argument(
        "--layers", default="inner", help="inner, interleaved, indices like 1,3, auto:K or auto:K:rank (default: inner)"
    )
    how.add_argument("--kv", default="evict", choices=["evict", "keep"], help="keys and values of skipped tokens")
    how.add_argument("--fixed-p", type=float, dest="p", help="train for this threshold alone")
    how.add_argument("--teacher", help="another model of the same vocabulary to learn from (default: the parent)")
    for weight in ("ce", "kl", "hidden", "penalty"):
        how.add_argument(f"--{weight}", type=float, help=f"weight of the {_TERMS[weight]}")
    how.add_argument("--start", choices=["ordered", "open"],
                     help="routers start with whole layers closed at p, those missed least first, or open everywhere")
    how.add_argument("--paired", action="store_true", help="every row also at p = 0, which teaches it at its own p")
    how.add_argument("--path", choices=["masked", "gathered"], help="gathered skips in training too (default: masked)")
    run = convert.add_argument_group("run")
    run.add_argument("--tokens", type=int, help="training tokens (default: 3,000,000; calibrate: 8,192)")
    run.add_argument("--block", type=int, help="tokens per row (default: 256)")
    run.add_argument("--batch", type=int, help="rows per step, over all processes (default: 8)")
    run.add_argument("--accumulate", type=int, help="parts that a step is done in (default: 1)")
    run.add_argument("--lr", type=float, help="peak learning rate (default: by model size)")
    run.add_argument("--router-lr", type=float, help="peak learning rate of the routers (default: 0.005)")
    run.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: for the layers' matrices (default: adamw)")
    run.add_argument("--compile", action="store_true", help="compile MoD layers' blocks and the loss; for GPUs")
    run.add_argument("--bf16", action="store_true", help="mixed precision on a CPU that has bf16 units")
    run.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more work")
    run.add_argument("--load-in-4bit", action="store_true", help="QLoRA: a 4-bit parent; with CUDA and --tune lora")
    run.add_argument("--fsdp", action="store_true", help="shard the model over processes (with accelerate launch)")
    run.add_argument("--save-steps", type=int, help="steps between checkpoints (default: by length, 20 to 200)")
    run.add_argument("--report-to", default="", help="Trainer's trackers, like tensorboard,wandb (default: none)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    convert.set_defaults(run=_convert)

    dial = commands.add_parser("dial", help="make a MoD model's load 1 - p on your own text; no weight changes")
    dial.add_argument("model", type=Path, help="folder of a MoD model; its config.json is written anew")
    dial.add_argument("--data", type=Path, required=True, help="text to calibrate on")
    dial.add_argument("--split", help="use only rows whose `split` is this")
    dial.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="default: %(default)s")
    dial.add_argument("--block", type=int, default=256)
    dial.set_defaults(run=_dial)

    over = commands.add_parser("sweep", help="held-out loss, load and savings over a grid of p")
    over.add_argument("model")
    what = over.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="text to measure on")
    what.add_argument("--tasks", help="lm-eval tasks to run, like hellaswag,piqa (needs lm-eval)")
    over.add_argument("--dense", help="dense parent to compare top tokens with (default: the model at p = 0)")
    over.add_argument("--split", help="use only rows whose `split` is this")
    over.add_argument("--tokens", type=int, default=32_768)
    over.add_argument("--block", type=int, default=256)
    over.add_argument("--p", default="0,0.5", help="thresholds for --tasks (default: %(default)s)")
    over.add_argument("--limit", type=int, help="examples per task")
    over.set_defaults(run=_sweep)


_TERMS = {
    "ce": "next token's cross-entropy", "kl": "divergence from the teacher", "hidden": "distance of hidden states",
    "penalty": "load's term",
}


def _convert(arguments: argparse.Namespace) -> None:
    from modification.conversion.train import train  # brings transformers' Trainer along: seconds for every command

    recipe = _recipe(arguments)
    if arguments.load_in_4bit and recipe.tune == "lora":
        arguments.keep_adapter = True  # 4-bit weights can't take a change in
    _check_flags(arguments, recipe)
    reading = Reading(
        tuple(arguments.data), tuple(numbers("--shares", arguments.shares, float)) if arguments.shares else None,
        arguments.split, arguments.responses, arguments.held_out, arguments.held_out_data, arguments.held_out_split,
        arguments.reweight,
    )
    model, tokenizer = _parent(arguments, recipe)
    family_of(model)  # refused before any work
    check_block(recipe.block, model)
    if arguments.layers.startswith("auto"):
        choosing.check(arguments.layers, model.config.num_hidden_layers)
    else:
        MoDConfig(layers=layers_of(arguments.layers)).layer_indices(model.config.num_hidden_layers)
    teacher = load_dense_or_mod(arguments.teacher, dtype=torch.float32)[0] if arguments.teacher else None
    if teacher is not None:
        check_vocabulary("--teacher", arguments.teacher, teacher, model)
    text = read_text(reading, tokenizer, model, recipe.tokens, recipe.block, arguments.seed)
    layers, ranking = _layers(arguments.layers, model, text)
    config = MoDConfig(layers=layers, kv=arguments.kv)
    options = Options(
        resume=arguments.resume, keep_adapter=arguments.keep_adapter, save_steps=arguments.save_steps,
        report_to=tuple(filter(None, arguments.report_to.split(","))), fsdp=arguments.fsdp,
        compile=arguments.compile,
        facts={"parent": Path(arguments.parent).name if Path(arguments.parent).is_dir() else arguments.parent,
               "layer_ranking": ranking},
    )
    print(f"{text.blocks.size:,} training tokens, {text.held_out.size:,} held out, {recipe.steps} steps", flush=True)
    try:
        rows = train(model, tokenizer, config, recipe, text, arguments.out, options, teacher)
    finally:
        _part()
    if rows:
        print(table(rows, "the parent's"))
        print(f"written to {arguments.out}")


def _part() -> None:
    """Leave the other processes, where there are some, before the interpreter ends: connections that are still open
    then have threads that outlive what they use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_flags(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Flags that would do nothing, and what is known to fail before anything is loaded."""
    for wrong, why in (
        (arguments.keep_adapter and recipe.tune != "lora", "--keep-adapter: only --tune lora makes an adapter"),
        (arguments.lora_rank is not None and recipe.tune != "lora", "--lora-rank: only --tune lora has a rank"),
        (recipe.fit and recipe.tune != "router",
         f"--tune {recipe.tune}: {recipe.name} trains nothing; it fits the routers alone"),
        (recipe.optimizer == "muon" and recipe.tune == "router", "--optimizer muon: routers have no matrices to train"),
        (arguments.start == "ordered" and (recipe.fit or recipe.gate == "paper"),
         f"--start ordered: {recipe.name} has its own start; leave the flag out"),
        (arguments.compile and recipe.fit, f"--compile: {recipe.name} has no loss"),
        (arguments.compile and recipe.gate == "paper" and not recipe.kl,
         f"--compile: it is for blocks without the paper's gate and for a loss with --kl; {recipe.name} has neither"),
        (arguments.held_out_split and not arguments.held_out_data, "--held-out-split: give --held-out-data with it"),
        (arguments.save_steps is not None and arguments.save_steps < 1,
         f"--save-steps {arguments.save_steps}: must be 1 or more"),
        ((arguments.out / REPORT).exists(),
         f"{arguments.out} holds a finished conversion: choose another folder, or remove it first"),
    ):
        if wrong:
            raise ValueError(why)
    if arguments.resume and not (arguments.out / CHECKPOINTS).is_dir():
        print(f"--resume: {arguments.out} holds no checkpoint, so this run starts from the beginning", flush=True)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = {name: getattr(arguments, name) for name in (
        "tune", "lora_rank", "p", "start", "ce", "kl", "hidden", "penalty", "path", "tokens", "block", "batch",
        "accumulate", "optimizer", "lr", "router_lr", "seed",
    )}
    flags = {name: getattr(arguments, name) or None for name in ("bf16", "checkpoint_activations", "paired")}
    return named(arguments.recipe, **given, **flags)


def _parent(arguments: argparse.Namespace, recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    quantization: Any = "4bit" if arguments.load_in_4bit else None
    if quantization and recipe.tune != "lora":
        raise ValueError("--load-in-4bit: 4-bit weights can't be trained; add --tune lora")
    if quantization and not torch.cuda.is_available():
        raise ValueError("--load-in-4bit: training on 4-bit weights needs CUDA, and there is none here")
    model, tokenizer = load_dense_or_mod(
        arguments.parent, dtype=None if quantization else torch.float32, quantization=quantization, device_map=_device()
    )
    if isinstance(model, MoDModel):
        raise ConversionError(f"{arguments.parent} is a MoD model already: give its dense parent")
    return model, tokenizer


def _device() -> str | None:
    """This process's GPU, if there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None


def _layers(asked: str, model: Any, text: Text) -> tuple[Any, list[float] | None]:
    """The MoD layers, and every layer's measure where they were chosen by one."""
    if not asked.startswith("auto"):
        return layers_of(asked), None
    chosen, measured = choosing.choose(model, asked, token_ids(text.blocks[:_RANKED_BLOCKS]))
    print("layers by measure, least first: " + ", ".join(
        f"{at} ({measured[at]:.3g})" for at in sorted(range(len(measured)), key=measured.__getitem__)
    ))
    return chosen, measured


def _dial(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_dense_or_mod(arguments.model)
    if not isinstance(model, MoDModel):
        raise ConversionError(f"{arguments.model} is a dense model: it has no dial yet; convert it first")
    check_block(arguments.block, model)
    blocks = pack(read_documents(arguments.data, tokenizer, arguments.split), arguments.block, arguments.tokens)
    before = sweep(model, blocks, _DIALLED)
    knots = bend_dial(model, blocks)
    path = arguments.model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["mod"]["dial"] = list(knots)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(config, indent=2), encoding="utf-8")
    aside.replace(path)  # whole or not at all
    for old, new in zip(before, sweep(model, blocks, _DIALLED), strict=True):
        print(f"p {old.p:g}: load {old.load:.3f} before, {new.load:.3f} now (measured)")


def _sweep(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_dense_or_mod(arguments.model)
    if not isinstance(model, MoDModel):
        raise ConversionError(f"{arguments.model} is a dense model: it has no p to sweep over; convert it first")
    if arguments.tasks:
        grid = numbers("--p", arguments.p, float)
        print(evaluate_tasks(model, tokenizer, arguments.tasks.split(","), grid, arguments.limit))
        return
    check_block(arguments.block, model)
    reference = None
    if arguments.dense:
        dense, _ = load_dense_or_mod(arguments.dense)
        if isinstance(dense, MoDModel):
            raise ValueError(f"--dense {arguments.dense} is a MoD model: give a dense one")
        check_vocabulary("--dense", arguments.dense, dense, model)
    blocks = pack(read_documents(arguments.data, tokenizer, arguments.split), arguments.block, arguments.tokens)
    if arguments.dense:
        reference, _ = reference_of(dense, blocks)
    print(table(rows_of(model, blocks, reference=reference), "the parent's" if arguments.dense else "p = 0"))
