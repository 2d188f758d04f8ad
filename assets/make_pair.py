"""Make the shipped pair from text: dense parent, any-p conversion, example trace. Resumable.

    PYTHONPATH=. python assets/make_pair.py TEXT.jsonl[.xz] [--name Llama-Storyteller-10M] [--work runs/storyteller]

TEXT holds one JSON object a line with `prompt` and `response`, and `split` "train" or "val". Any text of
that form makes another pair: give it another --name (a model trained on text that Llama wrote must start
its name with "Llama"). Interrupted, the same command goes on from the last checkpoint. What is done
already is not done again: remove a folder under --work to redo it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_parent import SECOND, TOKENS, make_parent, tokens_seen
from mixture import SECOND_READING, THIRD_READING, Kind, mixed_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.service import Request
from app.service.loaded import Loaded
from app.service.runs import record
from modification import MoDConfig, load
from modification.conversion.calibrate import bend_dial
from modification.conversion.checks import Options
from modification.conversion.data import Text, pack, read_documents
from modification.conversion.recipes import Recipe
from modification.conversion.train import train
from modification.measure.cost import ModelShape
from modification.routing import is_router

ASSETS = Path(__file__).resolve().parent
DIAL_TOKENS = 49_152
ONWARDS_TOKENS = 3_600_000  # of the conversion's second stage
HELD_OUT_BLOCKS = 48
EXAMPLE = "Write a bedtime story called `The Lantern in the Snow`."


def make_pair(text: Path, name: str, work: Path, parent_tokens: int, mod_tokens: int) -> None:
    """Run every stage that is not done yet and write the two folders under ``assets/``."""
    parent = make_parent(text, work, parent_tokens)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    converted, onwards = work / "mod", work / "mod-onwards"
    if not (converted / "report.json").is_file():
        _convert(text, work / SECOND / "final", tokenizer, converted, mod_tokens, {"parent": name})
    if not (onwards / "report.json").is_file():
        _go_on(text, converted, parent, tokenizer, onwards, {"parent": name})
    dense, mod = ASSETS / name, ASSETS / f"{name}-MoD"
    _ship(AutoModelForCausalLM.from_pretrained(parent), tokenizer, dense)
    model = load(onwards)[0]
    documents = list(read_documents(text, tokenizer, "train"))
    np.random.default_rng(3).shuffle(documents)
    bend_dial(model, pack(documents, 512, DIAL_TOKENS))  # on the text as it comes, without the facts mixed in
    _ship(model, tokenizer, mod)
    shutil.copy(onwards / "report.json", mod / "report.json")
    stages = [json.loads((folder / "report.json").read_text())["tokens"] for folder in (converted, onwards)]
    dense_tokens = tokens_seen(work, "short", "long", SECOND)
    seen = {"parent_tokens": tokens_seen(work), "stages": stages, "mod_tokens": dense_tokens + sum(stages)}
    (mod / "facts.json").write_text(json.dumps({"name": name, **seen}), encoding="utf-8")
    _example(mod)


def _convert(text: Path, parent: Path, tokenizer: Any, out: Path, tokens: int, facts: dict[str, Any]) -> None:
    """The first stage: the parent of two readings becomes a MoD model."""
    recipe = Recipe(tokens=tokens, block=1024, batch=3, lr=1e-3, bf16=_bf16())
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    read = _text(text, tokenizer, recipe, 2, SECOND_READING, fill=False)
    train(model, tokenizer, MoDConfig(layers="inner"), recipe, read, out, Options(resume=True, facts=facts))


def _go_on(text: Path, converted: Path, parent: Path, tokenizer: Any, out: Path, facts: dict[str, Any]) -> None:
    """The second: it goes on beside the parent of three readings."""
    recipe = Recipe(
        tokens=ONWARDS_TOKENS, block=1280, batch=4, p_range=(0.05, 0.8), optimizer="muon", lr=1e-3, bf16=_bf16()
    )
    model = load(converted, dtype=torch.float32)[0]
    teacher = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    read = _text(text, tokenizer, recipe, 6, THIRD_READING)
    options = Options(resume=True, compile=True, facts=facts, save_steps=40)
    train(model, tokenizer, MoDConfig(), recipe, read, out, options, teacher)


def _text(text: Path, tokenizer: Any, recipe: Recipe, seed: int, kinds: dict[Kind, float], fill: bool = True) -> Text:
    documents = list(read_documents(text, tokenizer, "train"))
    blocks = mixed_blocks(random.Random(seed), documents, tokenizer, recipe.tokens, recipe.block, kinds, fill)
    return Text(blocks, pack(read_documents(text, tokenizer, "val"), 512, HELD_OUT_BLOCKS * 512))


def _bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _ship(model: Any, tokenizer: Any, folder: Path) -> None:
    """bf16 safetensors, routers in full precision, with the tokenizer."""
    for weight_name, weight in model.named_parameters():
        if not is_router(weight_name):
            weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype, model.config.use_cache = torch.bfloat16, True  # training turned the cache off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _example(folder: Path) -> None:
    """A recorded run in which p is moved twice, shown before any generation."""
    name = folder.name
    model, tokenizer = load(folder)
    loaded = Loaded(name, model, tokenizer, ModelShape.of(model))
    steps = iter(range(10_000))

    def moving() -> float:
        at = next(steps)
        return 0.2 if at < 60 else 0.5 if at < 130 else 0.8

    title = f"Example, {name}: p = 0.2, then 0.5, then 0.8"
    trace = record(loaded, Request(EXAMPLE, name, 200, temperature=0.7, seed=1), moving, title)
    (ASSETS / "traces").mkdir(exist_ok=True)
    (ASSETS / "traces" / "bedtime.json").write_text(trace.to_json(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", default="Llama-Storyteller-10M")
    parser.add_argument("--work", type=Path, default=Path("runs/storyteller"))
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--mod-tokens", type=int, default=4_000_000)
    arguments = parser.parse_args()
    make_pair(arguments.text, arguments.name, arguments.work, arguments.parent_tokens, arguments.mod_tokens)


if __name__ == "__main__":
    main()
