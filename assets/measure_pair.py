"""Measure every figure of the shipped pair's cards, and check that the shipped ones still hold.

    PYTHONPATH=. python assets/measure_pair.py TEXT.jsonl[.xz] [--rival FOLDER] [--check]

Without --check, figures go to ``facts.json`` in the MoD model's folder, from which the cards are written. With it, all
is measured anew and held against that file: losses within 0.01 nats, loads within 0.01, shares of answers within two
standard errors; the command fails and says which figure does not hold. TEXT is what the pair was made from; the rows
whose split is "val" were never trained on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards import dense_card, mod_card
from routers_figure import routers_figure

from modification import generate, load
from modification.conversion.data import pack, read_documents
from modification.loading import encode_prompt
from modification.measure.quality import evaluate, reference_of
from modification.measure.report import record, rows_of
from modification.measure.retrieval import accuracy

ASSETS = Path(__file__).resolve().parent
NAME = "Llama-Storyteller-22M"
HELD_OUT_BLOCKS, BLOCK = 48, 512
DISTANCES, TRIALS, RETRIEVED_P = (64, 256, 512, 1024, 1800), 40, (0.0, 0.3, 0.5, 0.7)
SAMPLES, SAMPLE_TOKENS = 10, 220
KINDS = ("punctuation", "sentence start", "capitalised within", "seen before in the block", "other")


def measure(text: Path, name: str, rival: Path | None) -> dict[str, Any]:
    """All figures of both cards."""
    dense, tokenizer = load(ASSETS / name, dtype=torch.float32)
    mod, _ = load(ASSETS / f"{name}-MoD", dtype=torch.float32)
    documents = list(read_documents(text, tokenizer, "val"))
    blocks = pack(documents, BLOCK, HELD_OUT_BLOCKS * BLOCK)
    reference, _ = reference_of(dense, blocks, p=0.0)
    parent = evaluate(dense, blocks, 0.0)
    plain = "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in documents).encode()
    per_token = len(plain) / sum(map(len, documents))
    return {
        "name": name, "parameters": sum(p.numel() for n, p in dense.named_parameters() if ".router." not in n),
        "held_out_tokens": int(blocks.size), "val_documents": len(documents), "bytes_per_token": per_token,
        "dense_loss": parent.loss, "dense_error": parent.error,
        "bits_per_byte": parent.loss / math.log(2) / per_token,
        "xz_bits_per_byte": 8 * len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)) / len(plain),
        "rival_bits_per_byte": _bits(rival, plain) if rival else None,
        "sweep": record(rows_of(mod, blocks, reference=reference)),
        "retrieval": _retrieval(dense, mod, tokenizer, documents),
        "kinds": _kinds(mod, tokenizer, blocks),
    }


def _bits(folder: Path, plain: bytes) -> float:
    """Bits per byte that another model gives the same text, in blocks as long as its context allows."""
    model, tokenizer = load(folder)
    ids = tokenizer(plain.decode()[:120_000])["input_ids"]
    length = min(BLOCK, model.config.max_position_embeddings)
    blocks = pack([ids], length, HELD_OUT_BLOCKS * BLOCK)
    size = len(tokenizer.decode(blocks.flatten().tolist(), skip_special_tokens=True).encode())
    return evaluate(model, blocks, 0.0).loss / math.log(2) * blocks.size / size


def _retrieval(dense: Any, mod: Any, tokenizer: Any, documents: list[list[int]]) -> list[dict[str, Any]]:
    """Share of planted facts that come back, by distance: the dense parent, and the MoD model at some p's."""
    text = tokenizer.decode([token for ids in documents for token in ids], skip_special_tokens=True)

    def story(trial: int) -> str:
        return text[random.Random(trial).randrange(len(text) // 2) :][:12_000]

    found = []
    for distance in DISTANCES:
        row = {"distance": distance, "dense": accuracy(dense, tokenizer, story, distance, 0.0, TRIALS)}
        row |= {f"{p:g}": accuracy(mod, tokenizer, story, distance, p, TRIALS) for p in RETRIEVED_P}
        found.append(row)
        print(row, flush=True)
    return found


@torch.no_grad()
def _kinds(mod: Any, tokenizer: Any, blocks: Any) -> dict[str, Any]:
    """Share of tokens of each kind that run in each MoD layer at p = 0.5, and how many there are."""
    ran = np.zeros((len(mod.mod_layers), len(KINDS)))
    seen = np.zeros(len(KINDS))
    for row in blocks:
        out = mod(input_ids=torch.from_numpy(row.astype(np.int64))[None], p=0.5, use_cache=False,
                  output_router_scores=True)
        routed = torch.cat(out.routed).numpy()
        kinds = np.array(list(_kinds_of(row.tolist(), tokenizer)))
        for at in range(len(KINDS)):
            ran[:, at] += routed[:, kinds == at].sum(1)
            seen[at] += (kinds == at).sum()
    return {"kinds": KINDS, "tokens": seen.astype(int).tolist(), "loads": (ran / seen).round(4).tolist(),
            "layers": list(mod.mod_layers)}


def _kinds_of(ids: list[int], tokenizer: Any) -> Iterator[int]:
    before, started = set[int](), True
    for token in ids:
        text = tokenizer.decode([token])
        word = text.strip()
        if word and all(letter in string.punctuation + "“”’‘—…" for letter in word):
            yield 0
        elif started and word:
            yield 1
        elif word[:1].isupper():
            yield 2
        else:
            yield 3 if token in before else 4
        if word:
            started = word[-1] in ".!?" or token in tokenizer.all_special_ids
        before.add(token)


def samples(text: Path, name: str) -> list[dict[str, Any]]:
    """Ten prompts of the val split, answered by the parent greedily and sampled, and by the MoD model at p = 0.5."""
    opener = lzma.open if text.suffix == ".xz" else open
    with opener(text, "rt", encoding="utf-8") as file:
        prompts = [row["prompt"] for row in map(json.loads, file) if row.get("split") == "val"]
    chosen = random.Random(7).sample(prompts, SAMPLES)
    (dense, tokenizer), (mod, _) = (load(ASSETS / one, dtype=torch.float32) for one in (name, f"{name}-MoD"))
    made = []
    for at, prompt in enumerate(chosen):
        ids = encode_prompt(tokenizer, prompt)
        one = {"prompt": prompt}
        for label, model, p, temperature in (
            ("dense, greedy", dense, 0.0, 0.0), ("dense, sampled", dense, 0.0, 0.7),
            ("p = 0.5, sampled", mod, 0.5, 0.7), ("p = 0.8, sampled", mod, 0.8, 0.7),
        ):
            steps = generate(
                model, ids, p=p, max_new_tokens=SAMPLE_TOKENS, temperature=temperature, top_p=0.95, seed=at
            )
            tokens = [step.token for step in steps if not step.prefill]
            one[label] = tokenizer.decode(tokens, skip_special_tokens=True)
        made.append(one)
    return made


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Figures of ``old`` that don't hold."""
    for name, within in (("dense_loss", 0.01), ("bits_per_byte", 0.005), ("xz_bits_per_byte", 0.005)):
        if abs(old[name] - new[name]) > within:
            yield f"{name}: {old[name]:.4f} shipped, {new[name]:.4f} measured"
    for one, other in zip(old["sweep"], new["sweep"], strict=True):
        for name in ("loss", "load", "kv"):
            if abs(one[name] - other[name]) > 0.01:
                yield f"{name} at p = {one['p']:g}: {one[name]:.4f} shipped, {other[name]:.4f} measured"
    for one, other in zip(old["retrieval"], new["retrieval"], strict=True):
        for name in one:
            error = math.sqrt(max(one[name] * (1 - one[name]), 0.01) / TRIALS) if name != "distance" else 0
            if abs(one[name] - other[name]) > 2 * error:
                yield f"retrieval {name} over {one['distance']}: {one[name]:.2f} shipped, {other[name]:.2f} measured"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--rival", type=Path, help="another model's folder, measured on the same text")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    place = ASSETS / f"{arguments.name}-MoD" / "facts.json"
    facts = measure(arguments.text, arguments.name, arguments.rival)
    if arguments.check:
        wrong = list(differences(json.loads(place.read_text(encoding="utf-8")), facts))
        print(*(wrong or ["every figure holds"]), sep="\n")
        return bool(wrong)
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    facts = {**known, **{name: value for name, value in facts.items() if value is not None}}
    place.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    _correct_report(place.with_name("report.json"), facts)
    made = samples(arguments.text, arguments.name)
    (place.parent / "samples.json").write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
    write_cards(facts)
    return 0


def _correct_report(path: Path, facts: dict[str, Any]) -> None:
    """The conversion's report, with the sweep of the shipped dial; what else it measured before that goes."""
    report = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in report.items() if name not in ("retrieval", "samples")}
    kept |= {"sweep": facts["sweep"], "parent_loss": facts["dense_loss"]}  # its last teacher was not the parent
    path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def write_cards(facts: dict[str, Any]) -> None:
    """Both folders' README.md, and the figure in one of them."""
    (ASSETS / f"{facts['name']}-MoD" / "routers.svg").write_text(routers_figure(facts), encoding="utf-8")
    for card, suffix in ((dense_card, ""), (mod_card, "-MoD")):
        (ASSETS / f"{facts['name']}{suffix}" / "README.md").write_text(card(facts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
