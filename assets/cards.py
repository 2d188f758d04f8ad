"""Model cards of the shipped pair, written from measured figures."""

from __future__ import annotations

from typing import Any


def dense_card(f: dict[str, Any]) -> str:
    """The dense parent's README.md."""
    return f"""---
license: other
language: en
tags: [text-generation, storytelling]
---
# {f['name']}

A chat-shaped storyteller of {f['parameters'] / 1e6:.1f} M parameters: Llama architecture, 12 layers of width 256,
4 heads over 2 KV heads, context 2,048, byte-level BPE of 4,096. Small enough to ship, large enough to read.

{_data(f)}

| measured | value |
|---|---|
| training tokens seen | {f['parent_tokens']:,} (one pass) |
| held-out loss | {f['dense_loss']:.3f} ± {f['dense_error']:.3f} nats per token |
| held-out bits per byte of text | {f['bits_per_byte']:.3f} |

Held out: the first {f['held_out_tokens']:,} tokens of the {f['val_documents']} val documents, in blocks of 512, so
that every block starts without its past; ± is the standard error over blocks. Made by `assets/make_pair.py`.

It writes English with a story's shape. It has seen little: names drift, plots wander, facts are invented. It is a
demonstration of routing, not an assistant.
"""


def mod_card(f: dict[str, Any]) -> str:
    """The MoD model's README.md."""
    rows = "\n".join(
        f"| {row['p']:g} | {row['load']:.3f} | {row['loss']:.3f} ± {row['error']:.3f} "
        f"| {row['loss'] - f['dense_loss']:+.3f} |"
        for row in f["sweep"]
    )
    return f"""---
license: other
language: en
tags: [text-generation, storytelling, mixture-of-depths, modification]
---
# {f['name']}-MoD

[{f['name']}](../{f['name']}) as a Mixture-of-Depths model: its 10 inner layers each have a router, and a token goes
through such a layer only when its score reaches the threshold p. One set of weights serves every p; load is about
1 - p. Skipped tokens cost no compute in that layer and leave no keys and values in the cache.

Converted with the any-p recipe on {f['mod_tokens']:,} further tokens of the same text, all weights trained, then the
routers' scores stretched once so that load follows 1 - p.

{_data(f)}

| p | load of MoD layers (measured) | held-out loss, nats/token (measured) | against the parent before conversion |
|---|---|---|---|
{rows}

The parent's own loss is {f['dense_loss']:.3f} on the same {f['held_out_tokens']:,} held-out tokens. The conversion
trains on, so at low p it may lie below the parent; a parent tuned on the same further tokens would be the stricter
rival and has not been measured yet.

```python
import modification
model, tokenizer = modification.load("assets/{f['name']}-MoD")
```
"""


def _data(f: dict[str, Any]) -> str:
    return """Data: 16,449 story prompts and responses (bedtime, campfire and child tales, scenes, short stories) of
`erikhyrkas/snakes`, MIT licence. The text was written by Llama 3.1: a model trained on it and distributed carries
"Llama" at the start of its name and is subject to the Llama 3.1 Community License. Built with Llama."""
