"""About: what the pictures mean, for someone who has never heard of adaptive depth."""

from __future__ import annotations

import gradio as gr

TEXT = r"""
## What you are looking at

A language model reads and writes **tokens**, pieces of words. Every token usually passes through every **layer** of the
model, easy or hard: the full stop at the end of a sentence costs as much as the name it is about.

Here it does not. In each **MoD layer** (Mixture of Depths) a small **router** looks at every token that arrives and
gives it a **score** between 0 and 1. Only if the score reaches the **threshold p** does the token go through the layer;
otherwise it steps over it, unchanged:

$$ g = \sigma(W x + b) \qquad\qquad y = \begin{cases} \mathrm{layer}(x) & g \ge p \\ x & g < p \end{cases} $$

A conversion ends by bending the scores once, the same way in every layer, so that the dial reads true: load is about
1 - p on text of the training kind.

A skipped token costs no compute in that layer, and leaves no **keys and values** there. Those are what a model keeps
of every earlier token to look back at (the **KV cache**); in long texts they fill the memory and slow every new token
down.

The rule is from *MoDification* ([arXiv 2410.14268](https://arxiv.org/abs/2410.14268)), which turns existing models into
such ones. What this project adds is one set of weights for **every** p: about 1 - p of the work is done, so p is a
dial that can be turned while text streams.

## Reading the heatmap

One column a token, one row a layer. **Blue**: the token ran through the layer, stronger with the score. **Amber dash**:
it was skipped. **Grey**: a dense layer, which always runs. The text above is tinted by how many MoD layers each token
ran through. A dashed line marks where p was moved.

Click a token, or walk with the arrow keys, to see its scores against p, how likely the token was, and what else the
model might have said. *Preview p* recolours the picture at once for another p. That is a preview: it keeps the scores
of this run, while a real run at that p would change them, and the text with them.

## Measured, estimated, counted

| figure | how it is known |
|---|---|
| load, tokens per second, seconds, KV stored and allocated, loss | **measured** on this machine, in this run |
| KV of the dense parent | **estimated**: one entry a token and layer, by the model's shape |
| compute saved, ideal speed-up | **counted** from the decisions: FLOPs, or bytes read |
| *On paper* in Benchmark, memory before loading, time of a conversion | **estimated** |

## What it is not

Load and speed are not quality: look at Sweep for what a p costs on your own text. The shipped storyteller has some
twenty million weights and has read little; it is here because it starts at once on any machine.

## For programs

`generate`, `chat`, `sweep` and `estimate` are endpoints with names: see *Use via API* at the foot of the page. Started
with `--mcp`, the app offers the same four as tools to assistants that speak MCP.
"""


def build() -> None:
    """Lay the tab out."""
    gr.Markdown(TEXT, elem_id="about", latex_delimiters=[{"left": "$$", "right": "$$", "display": True}])
