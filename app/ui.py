"""Puts the tabs together."""

from __future__ import annotations

import gradio as gr

from app.service import Service
from app.tabs import explore

INTRO = (
    "# MoDification Studio\n"
    "A small router in each MoD layer scores every token, and a token goes through the layer only when its score "
    "reaches **p**. A skipped token costs no compute there and leaves no keys and values in the cache."
)


def build(service: Service) -> gr.Blocks:
    """The whole page, not yet launched."""
    with gr.Blocks(title="MoDification Studio", analytics_enabled=False) as demo:
        gr.Markdown(INTRO, elem_id="intro")
        explore.build(service)
    demo.queue(max_size=service.limits.running + service.limits.waiting, default_concurrency_limit=None)
    return demo
