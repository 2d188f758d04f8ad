"""Model cards of the shipped pair, written from measured figures (``measure_pair.py``)."""

from __future__ import annotations

from typing import Any

_HEAD = (
    "| p | load of MoD layers (measured) | held-out loss, nats/token (measured) | against the parent "
    "| top token as the parent's (measured) | KV of dense (counted) | compute of dense (counted) |\n"
    "|---|---|---|---|---|---|---|"
)


def dense_card(f: dict[str, Any]) -> str:
    """The dense parent's README.md."""
    rival = f.get("rival_bits_per_byte")
    beside = "" if rival is None else f"\n| the same text, stories260K (llama2.c) | {rival:.3f} bits per byte |"
    return f"""---
license: other
language: en
tags: [text-generation, storytelling]
---
# {f['name']}

A chat-shaped storyteller of {f['parameters'] / 1e6:.1f} M parameters: Llama architecture, 14 layers of width 384,
6 heads over 2 KV heads, context 2,048, byte-level BPE of 4,096. Small enough to ship, large enough to read.

{_data(f)}

| measured | value |
|---|---|
| training tokens seen | {f['parent_tokens']:,} (about six readings of the text, with chats made of it) |
| held-out loss | {f['dense_loss']:.3f} ± {f['dense_error']:.3f} nats per token |
| held-out bits per byte of text | {f['bits_per_byte']:.3f} |{beside}
| the same text, `xz -9e` | {f['xz_bits_per_byte']:.3f} bits per byte |

Held out: the first {f['held_out_tokens']:,} tokens of the {f['val_documents']} val documents, in blocks of 512, so
that every block starts without its past; ± is the standard error over blocks. `xz` packs all val documents together.
On the text that it was trained on its loss was 1.40 in the end: it knows much of it by heart.

**Facts told early and asked for at the end** (greedy, 40 questions a row, standard error up to 0.08):

{_retrieval(f, dense_only=True)}

**Ten prompts of the val split**, answered greedily and sampled, are in `samples.json` beside the MoD model. Read and
judged: sentences end and paragraphs hold together; a hero named in the prompt keeps the name, and bedtime and campfire
tales keep their title's subject for some paragraphs; scenes of an audiobook begin another story than their title asks
for. Openings are stock ("hues of crimson and gold"), and now and then a phrase is said twice.

Made by `assets/make_pair.py`, measured by `assets/measure_pair.py`. It is a demonstration of routing, not an assistant.
"""


def mod_card(f: dict[str, Any]) -> str:
    """The MoD model's README.md."""
    rows = "\n".join(
        f"| {row['p']:g} | {row['load']:.3f} | {row['loss']:.3f} ± {row['error']:.3f} "
        f"| {row['loss'] - f['dense_loss']:+.3f} ({row['loss'] / f['dense_loss'] - 1:+.1%}) | {row['agreement']:.1%} "
        f"| 1/{1 / row['kv']:.2f} | {row['compute']:.0%} |"
        for row in f["sweep"]
    )
    return f"""---
license: other
language: en
tags: [text-generation, storytelling, mixture-of-depths, modification]
---
# {f['name']}-MoD

[{f['name']}](../{f['name']}) as a Mixture-of-Depths model: its 12 inner layers each have a router, and a token goes
through such a layer only when its score reaches the threshold p. One set of weights serves every p; load is about
1 - p. Skipped tokens cost no compute in that layer and leave no keys and values in the cache.

Converted with the any-p recipe in three stages, all weights trained: {f['stages'][0]:,} tokens beside the parent, by
Muon (whole documents in blocks of 2,048, with facts to retrieve and chats of several turns among them); then
{f['stages'][1]:,} on the first 512 tokens of stories, at p from 0.3 on, its load held more tightly, beside itself at
p = 0. That stage gains at loads below 0.4 and costs at those above, so that what went on from it lies a quarter of the
way to where it ended (of 0, 1/4, 1/2 and 1 what did best at half load on the held-out stories). In the third,
{f['far_rows']} rows of up to 704 tokens, two in three of them chats about facts whose places leap ahead, as if up to
2,048 tokens of text lay between; the parent, its teacher, read them without the leap. Then the dial was bent so that
load follows 1 - p.

{_data(f)}

{_HEAD}
{rows}

The parent's own loss is {f['dense_loss']:.3f} on the same {f['held_out_tokens']:,} held-out tokens (± is one standard
error). The parent has seen {f['parent_tokens'] / 1e6:.1f} M tokens of the text in all, this model
{f['mod_tokens'] / 1e6:.1f} M before the third stage, dense and converted. At p = 0 it does better than its parent:
learning from a fixed teacher, it overfits less. Against itself at p = 0, p = 0.5 costs
{_at(f, 0.5) / _at(f, 0.0) - 1:.1%}.

**Facts told early and asked for at the end** (measured; greedy, 40 questions each, standard error up to 0.08):

{_retrieval(f)}

## What the routers learned

![Share of tokens that run in each MoD layer, over p and by kind of token](routers.svg)

Tokens of the held-out text: {_counted(f)}.

{f.get('learned', '')}

`samples.json` holds ten prompts with what the parent, and this model at p = 0.5 and 0.8, make of them.

```python
import modification
model, tokenizer = modification.load("assets/{f['name']}-MoD")
```
"""


def _at(f: dict[str, Any], p: float) -> float:
    """Held-out loss at p."""
    return float(next(row["loss"] for row in f["sweep"] if row["p"] == p))


def _retrieval(f: dict[str, Any], dense_only: bool = False) -> str:
    names = ["dense"] if dense_only else [name for name in f["retrieval"][0] if name != "distance"]
    titles = [name if name == "dense" else f"p = {name}" for name in names]
    lines = [f"| distance, tokens | {' | '.join(titles)} |", "|---" * (len(names) + 1) + "|"]
    for row in f["retrieval"]:
        lines.append(f"| {row['distance']:,} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")
    return "\n".join(lines)


def _counted(f: dict[str, Any]) -> str:
    found = f["kinds"]
    return ", ".join(f"{kind} {count:,}" for kind, count in zip(found["kinds"], found["tokens"], strict=True))


def _data(f: dict[str, Any]) -> str:
    return """Data: 16,449 story prompts and responses (bedtime, campfire and child tales, scenes, short stories) of
`erikhyrkas/snakes`, MIT licence. The text was written by Llama 3.1: a model trained on it and distributed carries
"Llama" at the start of its name and is subject to the Llama 3.1 Community License. Built with Llama."""
