"""bench and estimate: speed and memory, measured on this machine or worked out on paper."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from modification.cli.shared import check_vocabulary, layers_of, numbers
from modification.executor import executor_of
from modification.loading import as_mod, load_dense_or_mod
from modification.measure.bench import bench, check_asked, dense_twin, random_pair
from modification.measure.benchwords import growth, machine, missed, overheads, table, unsteady
from modification.measure.estimate import devices, estimate, notes, report
from modification.measure.onpaper import config_of, dense_config, own_layers
from modification.measure.plots import plot
from modification.model import MoDModel

_ROUNDS = 5  # of a bench, at least, for medians with a spread
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add(commands: Any) -> None:
    """The parsers of this file's commands."""
    time = commands.add_parser("bench", help="measure speed and memory, dense against routed")
    time.add_argument("model", nargs="?", help="a model folder or Hub id; or give --random")
    time.add_argument("--random", metavar="CONFIG", help="random weights of a folder, config.json, Hub id or preset")
    time.add_argument("--dense", metavar="PARENT", help="dense parent (default: the MoD model restored)")
    time.add_argument("--contexts", default="512,2048", help="prompt lengths in tokens (default: %(default)s)")
    time.add_argument("--batch", default="1", help="rows at a time, e.g. 1,8 (default: %(default)s)")
    time.add_argument("--ragged", action="store_true", help="a batch's prompts have from a context down to half of it")
    time.add_argument("--load", default="1,0.5,0.25", help="loads of the MoD layers (default: %(default)s)")
    time.add_argument("--new-tokens", type=int, default=64, help="decode steps a round (default: %(default)s)")
    time.add_argument("--rounds", type=int, default=_ROUNDS, help="rounds after one to warm up (default: %(default)s)")
    time.add_argument("--layers", help="MoD layers of a --random or dense model (default: its own, or inner)")
    time.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as in the files; --random: fp32)")
    time.add_argument("--quantization", choices=["4bit", "8bit"], help="bitsandbytes weights; routers stay as they are")
    time.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    time.add_argument("--no-stock", action="store_true", help="leave transformers' generate out (long contexts)")
    time.add_argument("--compiled", action="store_true", help="also: generate with a static cache, compiled")
    time.add_argument("--overheads", action="store_true", help="also: no routers; no trace or stream")
    time.add_argument("--json", type=Path, help="also write the results there")
    time.add_argument("--plots", type=Path, help="folder for plots (HTML)")
    time.set_defaults(run=_bench)

    guess = commands.add_parser("estimate", help="memory, work and speed-up of any size, on paper")
    guess.add_argument("model", metavar="CONFIG_OR_MODEL", help="a folder, a config.json, a Hub id or a preset's name")
    guess.add_argument("--context", type=int, default=4096, help="tokens per row (default: %(default)s)")
    guess.add_argument("--batch", type=int, default=1, help="rows (default: %(default)s)")
    guess.add_argument("--load", type=float, default=0.5, help="of the MoD layers (default: %(default)s)")
    guess.add_argument("--layers", help="inner, interleaved or indices (default: the MoD model's own, or inner)")
    guess.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: %(default)s")
    guess.add_argument("--device", choices=devices(), default="h200", help="default: %(default)s")
    guess.add_argument("--new-tokens", type=int, default=512, help="for the whole request (default: %(default)s)")
    guess.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    guess.set_defaults(run=_estimate)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.json and arguments.json.is_dir():  # told now, not after the measuring
        raise ValueError(f"--json {arguments.json} is a folder: give a file")
    for path in (arguments.json and arguments.json.parent, arguments.plots):
        if path:
            path.mkdir(parents=True, exist_ok=True)
    lists = {
        "contexts": numbers("--contexts", arguments.contexts, int), "batches": numbers("--batch", arguments.batch, int),
        "loads": numbers("--load", arguments.load, float),
    }
    asked: Any = {name: list(dict.fromkeys(values)) for name, values in lists.items()}  # each once
    asked |= {"new_tokens": arguments.new_tokens, "rounds": arguments.rounds}
    check_asked(**asked)  # before a model is made
    parent, model = _pair(arguments)
    note = executor_of(model).note
    rough = ", too few to rely on: take five" if arguments.rounds < _ROUNDS else ""
    print(f"{machine(model.device)}; {model.dtype}; {note}; medians of {arguments.rounds} rounds, "
          f"± half the interquartile range{rough}", flush=True)
    results = bench(
        model, parent, **asked, stock=not arguments.no_stock, compiled=arguments.compiled,
        overheads=arguments.overheads, ragged=arguments.ragged,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print("\n".join([table(results), *missed(results), *unsteady(results), *overheads(results), *growth(results)]))
    line = json.dumps({
        "command": "bench", "model": arguments.model or arguments.random, "machine": machine(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "quantization": arguments.quantization, "executor": note,
        "rounds": arguments.rounds, "ragged": arguments.ragged,
        "results": [dataclasses.asdict(result) for result in results],
    })
    print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    if arguments.plots:
        print("plots:", *plot(results, arguments.plots), file=sys.stderr)


def _pair(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The dense parent and the MoD model, on the device asked for."""
    if (arguments.model is None) == (arguments.random is None):
        raise ValueError("bench: give a model, or --random with a shape, and not both")
    device = _device(arguments.device)
    dtype = _DTYPES.get(arguments.dtype)
    if arguments.random is not None:
        if arguments.dense or arguments.quantization:
            raise ValueError("bench: --dense and --quantization need a model, not --random")
        config = config_of(arguments.random)
        pair = random_pair(dense_config(config), dtype or torch.float32, _layers(arguments, config))
        return pair[0].to(device), pair[1].to(device)
    options = {"dtype": dtype, "quantization": arguments.quantization, "device_map": {"": device}}
    layers = layers_of("inner" if arguments.layers is None else arguments.layers)
    model: Any = as_mod(load_dense_or_mod(arguments.model, **options)[0], layers)
    if arguments.dense:
        parent = load_dense_or_mod(arguments.dense, **options)[0]
        if isinstance(parent, MoDModel):
            raise ValueError(f"--dense {arguments.dense} is a MoD model: give a dense one")
        _check_parent(arguments.dense, parent, model)
        return parent, model
    return dense_twin(model), model


def _layers(arguments: argparse.Namespace, config: Any) -> Any:
    """The MoD layers asked for; else the config's own, or the inner ones."""
    return own_layers(config) if arguments.layers is None else layers_of(arguments.layers)


def _check_parent(name: str, parent: Any, model: Any) -> None:
    """A dense side of another size or type would be compared with what it is no parent of."""
    check_vocabulary("--dense", name, parent, model)
    for size in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        theirs, ours = (getattr(one, size, None) for one in (parent.config, dense_config(model.config)))
        if theirs != ours:
            raise ValueError(f"--dense {name} has {size} {theirs}, the MoD model {ours}: give its parent")
    if parent.dtype != model.dtype:
        raise ValueError(f"--dense {name} is {parent.dtype}, the MoD model {model.dtype}: give --dtype")


def _device(name: str | None) -> str:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {chosen}: expected cpu or cuda")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {chosen}: torch finds no CUDA device here")
    try:
        index = torch.device(chosen).index or 0
    except RuntimeError:
        raise ValueError(f"--device {chosen}: expected cpu, cuda or cuda and a number, as in cuda:1") from None
    if chosen.startswith("cuda") and index >= torch.cuda.device_count():
        raise ValueError(f"--device {chosen}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return chosen


def _estimate(arguments: argparse.Namespace) -> None:
    if arguments.new_tokens < 0:
        raise ValueError(f"--new-tokens {arguments.new_tokens}: must be 0 or more")
    config = config_of(arguments.model)
    found = estimate(
        config, context=arguments.context, batch=arguments.batch, load=arguments.load,
        dtype=_DTYPES[arguments.dtype], layers=_layers(arguments, config), device=devices()[arguments.device],
    )
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(found), "speed_up": found.speed_up(arguments.new_tokens)}))
    else:
        print(
            f"{arguments.model}: {arguments.batch} x {arguments.context:,} tokens, load {arguments.load:g} in "
            f"{len(found.mod_layers)} of {config.num_hidden_layers} layers, {arguments.dtype}, {arguments.device}"
        )
        print(report(found, arguments.new_tokens))
        context = getattr(config, "max_position_embeddings", None)
        for note in notes(found, arguments.context, context, devices()[arguments.device].memory):
            print(note)
