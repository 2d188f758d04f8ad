"""Make the shipped pair from text: dense parent, any-p conversion, example trace. Resumable.

    PYTHONPATH=. python assets/make_pair.py TEXT.jsonl[.xz] [--name Llama-Storyteller-22M] [--work runs/NAME]

TEXT holds one JSON object a line with `prompt` and `response`, and `split` "train" or "val". Any text of
that form makes another pair: give it another --name (a model trained on text that Llama wrote must start
its name with "Llama"). Interrupted, the same command goes on from the last checkpoint. What is done
already is not done again: remove a folder under --work to redo it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from make_parent import LONG_READINGS, TOKENS, make_parent, masks_by_cudnn, tokens_seen
from mixture import CONTEXT, readings
from reach import BATCH, reach
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.service import Request
from app.service.loaded import Loaded
from app.service.runs import record
from modification import MoDConfig, load
from modification.conversion.calibrate import bend_dial
from modification.conversion.checks import Options, written_whole
from modification.conversion.data import Text, pack, read_documents
from modification.conversion.recipes import Recipe
from modification.conversion.train import train
from modification.measure.bench import dense_twin
from modification.measure.cost import ModelShape
from modification.routing import is_router

ASSETS = Path(__file__).resolve().parent
MOD_TOKENS, ONWARDS_TOKENS, FAR_STEPS = 28_508_160, 1_024_000, 72  # of the conversion's stages
LATER = 0.25  # share of the second stage in the shipped weights: it costs at high loads what it gains at low ones
DIAL_TOKENS = 32_768
HELD_OUT_BLOCKS = 48
EXAMPLE = "Write a bedtime story called `The Lantern in the Snow`."


def make_pair(
    text: Path, name: str, work: Path, parent_tokens: int = TOKENS, mod_tokens: int = MOD_TOKENS
) -> None:
    """Run every stage that is not done yet and write the two folders under ``assets/``, if they aren't there."""
    parent = make_parent(text, work, parent_tokens)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    converted, onwards, far = work / "mod", work / "mod-onwards", work / "mod-far"
    if not (converted / "report.json").is_file():
        convert(work, text, parent, tokenizer, mod_tokens, {"parent": name})
    if not (onwards / "report.json").is_file():
        go_on(work, text, tokenizer, ONWARDS_TOKENS, {"parent": name})
    if not (far / "tokenizer.json").is_file():  # the last of its files
        look_far(work, parent, text, tokenizer, far)
    dense, mod = ASSETS / name, ASSETS / f"{name}-MoD"
    if (mod / "facts.json").is_file():
        return
    _ship(AutoModelForCausalLM.from_pretrained(parent), tokenizer, dense)
    model = load(far, dtype=torch.float32)[0]
    bend_dial(model, _stories(list(read_documents(text, tokenizer, "train")), DIAL_TOKENS))
    _ship(model, tokenizer, mod)
    shutil.copy(onwards / "report.json", mod / "report.json")
    stages = [json.loads((folder / "report.json").read_text())["tokens"] for folder in (converted, onwards)]
    seen = {
        "parent_tokens": tokens_seen(work), "stages": stages, "far_rows": FAR_STEPS * BATCH,
        "mod_tokens": tokens_seen(work) + sum(stages),
    }
    (mod / "facts.json").write_text(json.dumps({"name": name, **seen}), encoding="utf-8")
    _example(mod)


def convert(work: Path, text: Path, parent: Path, tokenizer: Any, tokens: int, facts: dict[str, Any]) -> None:
    """The parent becomes a MoD model, beside itself as a teacher."""
    recipe = Recipe(
        tokens=tokens, block=CONTEXT, batch=24, p_range=(0.05, 0.85), ce=0.2, kl=0.8, optimizer="muon", lr=1.5e-3
    )
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    read = _text(readings(work, text, tokenizer, CONTEXT, LONG_READINGS), text, tokenizer)
    options = Options(resume=True, compile=True, facts=facts, save_steps=max(1, recipe.steps // 4))
    train(model, tokenizer, MoDConfig(layers="inner"), recipe, read, work / "mod", options)


def go_on(work: Path, text: Path, tokenizer: Any, tokens: int, facts: dict[str, Any]) -> None:
    """Its load is held more tightly, and at high p, beside itself at p = 0; on the stories' first 512 tokens."""
    recipe = Recipe(
        tokens=tokens, block=512, batch=8, p_range=(0.3, 0.85), dense_share=0.125, penalty=4.0, ce=0.2, kl=0.8,
        lr=4e-4, router_lr=3e-3,
    )
    model = load(work / "mod", dtype=torch.float32)[0]
    read = _text(readings(work, text, tokenizer, 512, 1), text, tokenizer)
    options = Options(resume=True, facts=facts, save_steps=50)
    train(model, tokenizer, MoDConfig(), recipe, read, work / "mod-onwards", options, dense_twin(model))


def look_far(work: Path, parent: Path, text: Path, tokenizer: Any, out: Path) -> None:
    """Both stages' model learns to look far back where tokens are skipped."""
    model = blend(work / "mod", work / "mod-onwards")
    documents = list(read_documents(text, tokenizer, "train"))
    bend_dial(model, _stories(documents, DIAL_TOKENS))
    teacher = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    out.mkdir(exist_ok=True)
    reach(model, teacher, documents, tokenizer, out / "checkpoints", FAR_STEPS)
    with written_whole(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


@torch.no_grad()
def blend(first: Path, second: Path) -> Any:
    """The first stage's model with weights moved a part of the way to the second's."""
    model, further = (load(folder, dtype=torch.float32)[0] for folder in (first, second))
    later = dict(further.named_parameters())
    for weight_name, weight in model.named_parameters():
        weight.lerp_(later[weight_name], LATER)
    return model


def _text(blocks: npt.NDArray[np.int32], text: Path, tokenizer: Any) -> Text:
    return Text(blocks, _held_out(text, tokenizer))


def _held_out(text: Path, tokenizer: Any) -> npt.NDArray[np.int32]:
    return pack(read_documents(text, tokenizer, "val"), 512, HELD_OUT_BLOCKS * 512)


def _stories(documents: list[list[int]], tokens: int) -> npt.NDArray[np.int32]:
    """The text as it comes, in some order, without the facts mixed in."""
    order = np.random.default_rng(3).permutation(len(documents))
    return pack((documents[at] for at in order), 512, tokens)


def _ship(model: Any, tokenizer: Any, folder: Path) -> None:
    """bf16 safetensors, routers in full precision, with the tokenizer."""
    for weight_name, weight in model.named_parameters():
        if not is_router(weight_name):
            weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype, model.config.use_cache = torch.bfloat16, True  # training turned the cache off
    model.generation_config.use_cache = True
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
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
    parser.add_argument("--name", default="Llama-Storyteller-22M")
    parser.add_argument("--work", type=Path, help="where stages and checkpoints lie (default: runs/NAME)")
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--mod-tokens", type=int, default=MOD_TOKENS)
    given = parser.parse_args()
    masks_by_cudnn()
    make_pair(given.text, given.name, given.work or Path("runs") / given.name, given.parent_tokens, given.mod_tokens)


if __name__ == "__main__":
    main()
