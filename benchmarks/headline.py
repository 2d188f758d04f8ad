"""Writes docs/estimates.md: the paper's 1.8x memory and 1.2x speed, worked out on paper for Llama-2 7B and 70B.

    python -m benchmarks.headline

Every figure on that page is an estimate by ``modification/measure/estimate.py``; nothing is measured or loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modification.config import LayerRule
from modification.measure.estimate import Estimate, devices, estimate
from modification.measure.presets import preset

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimates.md"
MODELS = {"llama-2-7b": 1, "llama-2-70b": 2}  # and how many devices' peaks stand behind it
CONTEXTS, LOADS, RULES = (4096, 16384, 32768), (0.5, 0.25, 0.11), ("interleaved", "inner")
BATCH, NEW_TOKENS, DEVICE = 8, 512, "h200"
WANTED = 1.8

INTRODUCTION = """# The paper's headline, worked out

MoDification ([arXiv 2410.14268](https://arxiv.org/abs/2410.14268)) reports up to 1.2x speed and 1.8x less memory. This
page works out what its idea could give at best, by counting FLOPs and bytes. **Every figure here is estimated**, none
is measured; `python -m benchmarks.headline` writes the page, and `python -m modification estimate` answers for any
other shape. Prompts are counted as the fast executor runs them, dense or routed: their last layer makes keys, values
and the last token's result alone.
"""

READING = """
## What follows

- In interleaved layers what is stored of keys and values shrinks to 1.8x less only at a load of about 0.11 (the table
  counts the buffers' spare room too, a sixteenth), and memory in all only where they outweigh the weights: long
  contexts or many rows. With all inner layers routed, half the load is enough for about 1.8x less stored.
- Skipping pays twice in decoding over long contexts: a skipped token asks nothing, and leaves nothing to be asked. Load
  x of a layer costs about x of its weights' traffic (for one row) and x squared of its keys' and values'.
- In a batch a layer's weights are read as soon as one row runs it, so that rows share what is left of the saving:
  eight rows at half load save almost no weight traffic, and the gain is in keys and values.
- Where memory shrinks 1.8x, the ideal speed-up of the same setting is well above 1.2x: the rest is lost between the
  count and the clock. What this project loses of it is measured by `modification bench` (README).
"""


def settings(name: str) -> Iterator[tuple[str, int, float, Estimate]]:
    """Every combination for one model, on peaks of as many devices as it needs."""
    one, count = devices()[DEVICE], MODELS[name]
    device = type(one)(one.flops * count, one.flops32 * count, one.bandwidth * count, one.memory * count)
    for rule in RULES:
        for context in CONTEXTS:
            for load in LOADS:
                yield rule, context, load, _estimate(name, rule, context, load, device)


def _estimate(name: str, rule: LayerRule | Any, context: int, load: float, device: Any) -> Estimate:
    return estimate(preset(name), context=context, batch=BATCH, load=load, layers=rule, device=device)


def table(name: str) -> str:
    """One model's table."""
    lines = [
        f"## {name}, bf16, batch {BATCH}, {MODELS[name]} x {DEVICE.upper()} (estimated)\n",
        "Each ratio is dense / MoD.\n",
        "| MoD layers | context | load | keys and values | memory in all | prefill seconds "
        f"| decode step seconds | prompt and {NEW_TOKENS} new tokens |",
        "|" + "---|" * 8,
    ]
    for rule, context, load, found in settings(name):
        dense, mod = found.dense, found.mod
        mark = "**" if dense.memory / mod.memory >= WANTED else ""
        lines.append(
            f"| {rule} | {context:,} | {load:g} "
            f"| {dense.kv / mod.kv:.2f} ({dense.kv / 1e9:.1f} / {mod.kv / 1e9:.1f} GB) "
            f"| {mark}{dense.memory / mod.memory:.2f}{mark} | {dense.prefill_seconds / mod.prefill_seconds:.2f} "
            f"| {dense.decode_seconds / mod.decode_seconds:.2f} | {found.speed_up(NEW_TOKENS):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    note = f"Bold: memory in all at least {WANTED}x less. Beyond 4,096 tokens Llama-2 needs a longer position range.\n"
    PAGE.write_text("\n".join([INTRODUCTION, *(table(name) for name in MODELS), note, READING]), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
