"""Convert: a dense model and a text in, a MoD model out, watched while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.figures import training_figure
from app.present import conversion_estimate, conversion_sentence
from app.service import Service
from app.service.conversions import Plan
from app.service.requests import whole
from app.tabs.shared import guarded, shown, status

OFF = (
    "Models are not converted on a shared app. At home:\n\n"
    "```\npython -m modification convert PARENT OUT --data TEXT\n```"
)
OPENING = (
    "Choose a dense model and a text, and estimate first. Keep the page open: leaving it cancels, and the last "
    "checkpoint stays."
)
# How each recipe and way of tuning reads in the lists.
RECIPES = [
    ("any-p: one model for every p", "any-p"),
    ("fixed-p: for p = 0.5 alone", "fixed-p"),
    ("calibrate: no training, routers fitted in a minute", "calibrate"),
    ("paper: MoDification as published", "paper"),
    ("paper-controlled: its load steered to 1 - p", "paper-controlled"),
    ("top-k: the rule of Mixture-of-Depths", "top-k"),
]
TUNES = [("All weights", "full"), ("A low-rank change (LoRA)", "lora"), ("Routers alone", "router")]


class Convert:
    """The tab's components and handlers; ``done`` holds the finished model's name, ``open`` is the button that
    opens it in Explore."""

    def __init__(self, service: Service) -> None:
        self.done = gr.State(None)
        self.settings: dict[str, Any] = {}
        if not service.limits.convert:
            gr.Markdown(OFF)
            self.open = gr.Button("Open in Explore", visible=False)
            return
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._controls(service)
            with gr.Column(scale=7, min_width=360):
                self.status = gr.HTML(status(opening(service)), elem_id="convert-status", apply_default_css=False)
                self.estimate = gr.Markdown("", elem_id="convert-estimate")
                self.plot = gr.Plot(show_label=False, elem_id="convert-plot", visible=False)
                self.open = gr.Button("Open in Explore", visible=False, elem_id="convert-open")
        self.settings = {
            "parent": self.parent, "name": self.name, "data": self.data, "recipe": self.recipe, "tune": self.tune,
            "layers": self.layers, "tokens": self.tokens, "block": self.block, "batch": self.batch,
        }
        self._wire(service)

    def _controls(self, service: Service) -> None:
        self.parent = gr.Dropdown(
            service.names(), value=next((n for n in service.names() if not n.endswith("-MoD")), None),
            allow_custom_value=True, label="Dense model", info="Listed, a folder, or owner/name on the Hub",
            elem_id="convert-parent",
        )
        self.name = gr.Textbox(label="Name of the MoD model", value="my-model-MoD", elem_id="convert-name")
        self.data = gr.Textbox(
            label="Text", placeholder="/path/to/text.jsonl", elem_id="convert-data",
            info="A path: .txt or .jsonl (.gz and .xz too) or .parquet, with text, prompt and response, or messages",
        )
        self.file = gr.UploadButton("Upload a text", file_types=[".txt", ".jsonl", ".gz", ".xz", ".parquet"], size="sm")
        self.recipe = gr.Dropdown(RECIPES, value="any-p", label="Recipe", elem_id="convert-recipe")
        self.tune = gr.Dropdown(TUNES, value="full", label="What is trained", elem_id="convert-tune")
        self.layers = gr.Textbox(
            label="MoD layers", value="inner", elem_id="convert-layers",
            info="inner, interleaved, indices like 1,3, or auto:K: the K least needed",
        )
        self.tokens = gr.Number(
            label="Training tokens", value=300_000, precision=0, minimum=1, elem_id="convert-tokens"
        )
        with gr.Row():
            self.block = gr.Number(label="Tokens per row", value=256, precision=0, minimum=8)
            self.batch = gr.Number(label="Rows per step", value=8, precision=0, minimum=1)
        self.resume = gr.Checkbox(value=False, label="Go on from the last checkpoint of that name")
        with gr.Row():
            self.ask = gr.Button("Estimate", elem_id="convert-ask")
            self.go = gr.Button("Convert", variant="primary", elem_id="convert-go")
            self.stop = gr.Button("Cancel", variant="stop", elem_id="convert-stop")

    def _wire(self, service: Service) -> None:
        inputs = [
            self.parent, self.name, self.data, self.recipe, self.tune, self.layers, self.tokens, self.block,
            self.batch, self.resume,
        ]
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run = self.go.click(
            _convert(service), inputs, [self.status, self.plot, self.open, self.done], concurrency_limit=None,
            trigger_mode="once", **private,
        )
        self.ask.click(_estimate(service), inputs, [self.status, self.estimate], trigger_mode="once", **private)
        self.stop.click(
            lambda: status("Cancelled. A checkpoint that was written stays: tick the box to go on from it."), None,
            self.status, cancels=[run], queue=False, **private,
        )
        self.file.upload(lambda path: path, self.file, self.data, **private)


def opening(service: Service) -> str:
    """What to do here; and what an app that ended in mid-conversion has left."""
    left = service.conversions.unfinished()
    kept = [f"{name} ({step:,} steps)" for name, step in left.items() if step]
    lost = [name for name, step in left.items() if not step]
    more = f" Broken off, and kept: {', '.join(kept)}. Give the name again and tick the box to go on." if kept else ""
    return OPENING + more + (f" Broken off before anything was kept: {', '.join(lost)}." if lost else "")


def _plan(
    parent: str | None, name: str, data: str, recipe: str, tune: str, layers: str, tokens: float, block: float,
    batch: float, resume: bool,
) -> Plan:
    return Plan(
        (parent or "").strip(), name.strip(), data.strip(), layers.strip() or "inner", recipe, tune,
        whole(tokens or 0, "Training tokens"), whole(block or 1, "Block", 1), whole(batch or 1, "Batch", 1), resume,
    )


def _estimate(service: Service) -> Any:
    @guarded(lambda line: (line, gr.skip()))
    def ask(*values: Any) -> Iterator[tuple[Any, Any]]:
        yield status("Timing a forward pass …", busy=True), ""
        plan = _plan(*values)
        yield status("Estimated. Convert when it suits you."), conversion_estimate(*service.estimate_conversion(plan))

    return ask


def _convert(service: Service) -> Any:
    @guarded(lambda line: (line, gr.skip(), gr.skip(), gr.skip()))
    def convert(*values: Any) -> Iterator[tuple[Any, ...]]:
        plan, drawn = _plan(*values), -1
        yield status("Starting …", busy=True), gr.skip(), gr.update(visible=False), None
        with contextlib.closing(service.convert(plan)) as updates:
            for progress in updates:
                fresh, drawn = len(progress.log) > drawn, len(progress.log)
                line = status(conversion_sentence(progress), progress.failed, busy=not progress.ended)
                figure = shown(training_figure(progress.log)) if fresh and progress.log else gr.skip()
                ready = bool(progress.ended) and not progress.failed
                yield line, figure, gr.update(visible=ready), plan.name if ready else None

    return convert
