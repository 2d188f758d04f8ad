"""Make the shipped pair from text: dense parent, any-p conversion, cards, example traces. Resumable.

    PYTHONPATH=. python assets/make_pair.py TEXT.jsonl[.xz] [--name Llama-Storyteller-10M] [--work runs/storyteller]

TEXT holds one JSON object a line with `prompt` and `response`, and `split` "train" or "val". Any text of
that form makes another pair: give it another --name (a model trained on text that Llama wrote must start
its name with "Llama"). Interrupted, the same command goes on from the last checkpoint. What is done
already is not done again: remove a folder under --work to redo it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards import dense_card, mod_card
from make_parent import TOKENS, make_parent, tokens_seen
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.service import Loaded, Request, record
from modification import MoDConfig, convert, load
from modification.conversion.data import pack, read_documents
from modification.conversion.recipes import AnyP
from modification.conversion.train import train
from modification.measure.cost import ModelShape
from modification.measure.quality import Quality, evaluate

ASSETS = Path(__file__).resolve().parent
HELD_OUT_BLOCKS = 64
EXAMPLE = "Write a bedtime story called `The Lantern in the Snow`."


def make_pair(text: Path, name: str, work: Path, parent_tokens: int, mod_tokens: int) -> None:
    """Run every stage that is not done yet and write the two folders under ``assets/``."""
    parent = make_parent(text, work, parent_tokens)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    held_out = pack(read_documents(text, tokenizer, "val"), 512, HELD_OUT_BLOCKS * 512)
    converted = work / "mod"
    if not (converted / "report.json").is_file():
        _convert(text, parent, tokenizer, held_out, converted, mod_tokens)
    facts = _measure(text, parent, tokenizer, held_out, converted, work, name)
    _ship(AutoModelForCausalLM.from_pretrained(parent), tokenizer, ASSETS / name, dense_card(facts))
    _ship(load(converted)[0], tokenizer, ASSETS / f"{name}-MoD", mod_card(facts))
    shutil.copy(converted / "report.json", ASSETS / f"{name}-MoD" / "report.json")
    _example(f"{name}-MoD")


def _convert(text: Path, parent: Path, tokenizer: Any, held_out: np.ndarray, out: Path, tokens: int) -> None:
    recipe = AnyP(tokens=tokens, block=512, batch=4, lr=1e-3, bf16=torch.cpu._is_avx512_bf16_supported())
    documents = list(read_documents(text, tokenizer, "train"))
    np.random.default_rng(1).shuffle(documents)
    blocks = pack(documents, recipe.block, tokens)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    train(model, tokenizer, MoDConfig(layers="inner"), recipe, blocks, held_out, out, resume=True)


def _measure(
    text: Path, parent: Path, tokenizer: Any, held_out: np.ndarray, converted: Path, work: Path, name: str
) -> dict[str, Any]:
    """The figures that the cards quote, all measured here on the val split."""
    report = json.loads((converted / "report.json").read_text())
    dense: Any = convert(AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval())
    loss: Quality = evaluate(dense, held_out, 0.0)
    lines = [len(ids) for ids in read_documents(text, tokenizer, "val")]
    ids = np.concatenate([np.asarray(d) for d in read_documents(text, tokenizer, "val")])
    per_byte = len(tokenizer.decode(ids, skip_special_tokens=True).encode()) / len(ids)
    return {
        "name": name, "parent_tokens": tokens_seen(work), "mod_tokens": report["tokens"],
        "parameters": sum(p.numel() for n, p in dense.named_parameters() if ".router." not in n),
        "dense_loss": loss.loss, "dense_error": loss.error, "bits_per_byte": loss.loss / math.log(2) / per_byte,
        "bytes_per_token": per_byte, "held_out_tokens": int(held_out.size), "val_documents": len(lines),
        "sweep": report["sweep"],
    }


def _ship(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """bf16 safetensors, routers in full precision, with tokenizer and card."""
    for weight_name, weight in model.named_parameters():
        if ".router." not in weight_name:
            weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _example(name: str) -> None:
    """A recorded run in which p is moved twice, shown before any generation."""
    model, tokenizer = load(ASSETS / name, dtype=torch.float32)
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
    parser.add_argument("--mod-tokens", type=int, default=1_000_000)
    arguments = parser.parse_args()
    make_pair(arguments.text, arguments.name, arguments.work, arguments.parent_tokens, arguments.mod_tokens)


if __name__ == "__main__":
    main()
