"""What a MoD model costs in quality and saves, as a table over p, a JSON-ready record and a model card."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modification.generate import generate
from modification.measure.quality import GRID, Quality, reference_of, sweep
from modification.measure.retrieval import accuracy
from modification.measure.tradeoff import shares

SAMPLE_P = (0.0, 0.5, 0.8)
_SAMPLE = 60  # new tokens
_PROMPT = 16  # tokens of held-out text before them
_DISTANCES = (128, 512, 2048, 8192)
_TRIALS = 20
_CAN = 0.3  # a model that finds fewer facts at p = 0, nearby, can't retrieve


@dataclass(frozen=True, slots=True)
class Row:
    """One threshold: quality measured, savings counted as shares of the dense parent's."""

    quality: Quality
    kv: float
    compute: float


def rows_of(
    model: Any, blocks: npt.NDArray[np.int32], grid: Iterable[float] = GRID,
    reference: npt.NDArray[np.int32] | None = None,
) -> list[Row]:
    """A row for each p of a grid over blocks [N, T].

    Args:
        reference: the parent's likeliest next tokens, [N, T]; the model's own at p = 0 by default.
    """
    model.eval()
    if reference is None:
        reference, _ = reference_of(model, blocks, p=0.0)
    found = sweep(model, blocks, grid, reference)
    return [Row(quality, *shares(model, quality, blocks.shape[1])) for quality in found]


def table(rows: Sequence[Row], parent: str = "p = 0") -> str:
    """A Markdown table; ± is a 95% confidence interval over blocks."""
    lines = [
        f"| p | load (measured) | loss, nats/token (measured) | top token as {parent} (measured) | KV stored (counted) "
        "| compute (counted) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        one = row.quality
        same = "" if one.agreement is None else f"{one.agreement:.1%}"
        lines.append(
            f"| {one.p:g} | {one.load:.3f} | {one.loss:.3f} ± {1.96 * one.error:.3f} | {same} | {row.kv:.0%} "
            f"| {row.compute:.0%} |"
        )
    return "\n".join(lines)


def record(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table, JSON-ready; ``error`` is one standard error over blocks."""
    return [{**dataclasses.asdict(row.quality), "kv": row.kv, "compute": row.compute} for row in rows]


def samples(model: Any, tokenizer: Any, blocks: npt.NDArray[np.int32]) -> list[dict[str, Any]]:
    """What the model makes of the start of a held-out text at three p's, greedily."""
    ids = blocks[0, :_PROMPT].tolist()
    made = []
    for p in SAMPLE_P:
        steps = generate(model, ids, p=p, max_new_tokens=_SAMPLE)
        tokens = [step.token for step in steps if not step.prefill]
        made.append({"p": p, "prompt": tokenizer.decode(ids), "text": tokenizer.decode(tokens)})
    return made


def retrieval(model: Any, tokenizer: Any, blocks: npt.NDArray[np.int32]) -> list[dict[str, Any]]:
    """Share of planted facts found again, by distance and p; empty for a model that doesn't chat or can't do it."""
    if not tokenizer.chat_template:
        return []
    text = tokenizer.decode(blocks.flatten()[: 4 * _DISTANCES[-1]].tolist(), skip_special_tokens=True)
    longest = min(getattr(model.config, "max_position_embeddings", None) or _DISTANCES[-1], blocks.size) - 64

    def story(trial: int) -> str:
        start = random.Random(trial).randrange(max(1, len(text) // 3))
        return str(text[start:])

    found: list[dict[str, Any]] = []
    for distance in (distance for distance in _DISTANCES if distance <= longest):
        for p in (0.0, 0.5):
            share = accuracy(model, tokenizer, story, distance, p, _TRIALS)
            if not found and share < _CAN:
                return []
            found.append({"distance": distance, "p": p, "accuracy": share, "trials": _TRIALS})
    return found


def card(report: dict[str, Any], rows: Sequence[Row], name: str, parent: str) -> str:
    """The README.md of a converted model, with the Hub's front matter."""
    mod = report["mod"]
    layers = mod["layers"] if isinstance(mod["layers"], str) else ", ".join(map(str, mod["layers"]))
    learnt = "Routers were fitted in closed form; no weight was trained." if report["fit"] else (
        f"{report['tokens']:,} tokens, {_TUNED[report['tune']]}."
    )
    base = f"base_model: {parent}\n" if "/" in parent else ""  # the Hub wants owner/name
    own = f" The parent's own loss there is {report['parent_loss']:.3f}." if report.get("parent_loss") else ""
    parts = [
        f"---\nlibrary_name: transformers\ntags: [mixture-of-depths, modification, {report['recipe']}]\n{base}---",
        f"# {name}",
        f"{parent[:1].upper()}{parent[1:]} as a Mixture-of-Depths model: each MoD layer ({layers}) has a router, and a "
        "token goes through it only when its score reaches the threshold p, 0 to 1. Skipped tokens cost no compute "
        "there and leave no keys and values in the cache.",
        f"{'Trained on' if report.get('onwards') else 'Converted'} with the `{report['recipe']}` recipe in "
        f"{report['seconds_this_run']:,.0f} s. {learnt} Text: {', '.join(report.get('sources') or ['?'])}.",
        table(rows, "the parent's"),
        f"Over {report['held_out_tokens']:,} held-out tokens; ± is a 95% confidence interval over blocks; KV and "
        f"compute are shares of the dense parent's.{own}",
    ]
    if report.get("retrieval"):
        asked = f"Facts planted in a text and asked for at its end (measured, {_TRIALS} questions each):"
        parts += [asked, _retrieval_table(report["retrieval"])]
    parts.append("## Samples")
    for one in report["samples"]:
        parts.append(f"p = {one['p']:g}:\n\n```text\n{_fenced(one['prompt'])}|{_fenced(one['text'])}\n```")
    parts.append(f'```python\nimport modification\nmodel, tokenizer = modification.load("{name}")\n```')
    return "\n\n".join(parts) + "\n"


_TUNED = {
    "full": "all weights trained", "lora": "a low-rank change of the weights trained",
    "router": "routers trained and the parent's weights untouched",
}


def _retrieval_table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| distance, tokens | p | found |", "|---|---|---|"]
    return "\n".join(lines + [f"| {one['distance']} | {one['p']:g} | {one['accuracy']:.0%} |" for one in found])


def _fenced(text: str) -> str:
    return text.replace("`" * 3, "'" * 3)
