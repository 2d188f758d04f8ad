"""Benchmark: the loaded pair on the clock, and any other shape on paper."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.figures import bench_figure, estimate_figure
from app.present import bench_rows, estimate_rows
from app.service import Service
from app.service.requests import number, whole
from app.tabs.shared import csv_script, guarded, numbers, shown, status, table, waiting

OPENING = "Dense and routed alternate; p is set so that each load is hit. Nothing else should run meanwhile."
HEADERS = [
    "context", "side", "p", "load, prompt", "prefill, s", "decode, tokens/s", "±", "peak, MB", "KV stored, MB",
    "speed-up, prefill", "speed-up, decode", "ideal, prefill (counted)", "ideal, decode (counted)",
    "efficiency, prefill", "efficiency, decode",
]
PAPER_HEADERS = ["estimated", "dense", "MoD", "dense / MoD"]
PAPER = "## On paper\nAny shape, without loading it. **Every figure is estimated**: a roofline at the device's peak."


class Benchmark:
    """The tab's components and handlers."""

    def __init__(self, service: Service, model: gr.Dropdown) -> None:
        gr.Markdown("## On this machine\nEvery figure is measured, but the ideal, which is counted.")
        with gr.Row():
            self.contexts = gr.Textbox(label="Contexts, tokens", value="128, 512", elem_id="bench-contexts")
            self.loads = gr.Textbox(label="Loads of the MoD layers", value="0.5, 0.25", elem_id="bench-loads")
            self.new_tokens = gr.Number(label="Decode steps a round", value=32, precision=0, minimum=1)
            self.rounds = gr.Number(label="Rounds", value=5, precision=0, minimum=1)
            self.stock = gr.Checkbox(value=True, label="transformers' generate too")
        with gr.Row():
            self.go = gr.Button("Benchmark", variant="primary", elem_id="bench-go")
            self.stop = gr.Button("Stop", variant="stop", elem_id="bench-stop")
        self.status = gr.HTML(status(OPENING), elem_id="bench-status", apply_default_css=False)
        self.plot = gr.Plot(show_label=False, elem_id="bench-plot", visible=False)
        self.table = gr.HTML("", elem_id="bench-table", apply_default_css=False)
        self.csv = gr.Button("CSV", size="sm", elem_id="bench-csv", visible=False)
        self._paper(service)
        self.settings = {
            "contexts": self.contexts, "loads": self.loads, "new_tokens": self.new_tokens, "rounds": self.rounds,
            "stock": self.stock, "shape": self.shape, "context": self.context, "batch": self.batch, "load": self.load,
            "layers": self.layers, "dtype": self.dtype, "device": self.device,
        }
        self._wire(service, model)

    def _paper(self, service: Service) -> None:
        gr.Markdown(PAPER)
        with gr.Row():
            self.shape = gr.Dropdown(
                service.lab.presets(), value="llama-2-7b", allow_custom_value=True, label="Shape",
                info="A preset, a model folder, or owner/name on the Hub", elem_id="paper-shape", scale=2,
            )
            self.context = gr.Number(label="Context, tokens", value=4096, precision=0, minimum=1)
            self.batch = gr.Number(label="Rows", value=1, precision=0, minimum=1)
            self.load = gr.Slider(0, 1, value=0.5, step=0.01, label="Load of the MoD layers", elem_id="paper-load")
        with gr.Row():
            self.layers = gr.Radio(["own", "inner", "interleaved"], value="own", label="MoD layers",
                                   info="own: the model's, or inner")
            self.dtype = gr.Radio(["bf16", "fp16", "fp32"], value="bf16", label="Data type")
            self.device = gr.Dropdown(service.lab.devices(), value="h200", label="Device", elem_id="paper-device")
        self.paper_status = gr.HTML(status("Change anything: the figures follow."), elem_id="paper-status",
                                    apply_default_css=False)
        self.paper_plot = gr.Plot(show_label=False, elem_id="paper-plot", visible=False)
        self.paper_table = gr.HTML("", elem_id="paper-table", apply_default_css=False)

    def _wire(self, service: Service, model: gr.Dropdown) -> None:
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run = self.go.click(
            _bench(service), [model, self.contexts, self.loads, self.new_tokens, self.rounds, self.stock],
            [self.status, self.plot, self.table, self.csv], concurrency_limit=None, trigger_mode="once", **private,
        )
        self.stop.click(lambda: status("Stopped."), None, self.status, cancels=[run], queue=False, **private)
        self.csv.click(None, None, None, js=csv_script("bench-table"), **private)
        controls = [self.shape, self.context, self.batch, self.load, self.layers, self.dtype, self.device]
        self.paper_inputs, self.paper_outputs = controls, [self.paper_status, self.paper_plot, self.paper_table]
        self.on_paper = _estimate(service)
        gr.on(
            [control.change for control in controls], self.on_paper, controls, self.paper_outputs,
            trigger_mode="always_last", **private,
        )


def _bench(service: Service) -> Any:
    @guarded(lambda line: (line, gr.skip(), gr.skip(), gr.skip()))
    def bench(
        model: str | None, contexts: str, loads: str, new_tokens: float, rounds: float, stock: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        name = model or ""
        yield status("Starting …", busy=True), gr.skip(), gr.skip(), gr.skip()
        updates = service.lab.bench(
            name, service.parent_of(name), numbers(contexts, int, "Contexts"),
            numbers(loads, float, "Loads"), whole(new_tokens or 0, "Decode steps"), whole(rounds or 0, "Rounds"), stock,
            str(request.session_hash),
        )
        with contextlib.closing(updates):
            for update in updates:
                if (line := waiting(update, name)) is not None:
                    yield line, gr.skip(), gr.skip(), gr.skip()
                elif isinstance(update.result, str):
                    yield status(f"Measuring: {update.result} …", busy=True), gr.skip(), gr.skip(), gr.skip()
                elif update.result is not None:
                    figures = table(f"{name}, one row at a time", HEADERS, bench_rows(update.result))
                    yield status("Done."), shown(bench_figure(update.result)), figures, gr.update(visible=True)

    return bench


def _estimate(service: Service) -> Any:
    @guarded(lambda line: (line, gr.skip(), gr.skip()))
    def estimate(
        shape: str | None, context: float | None, batch: float | None, load: float, layers: str, dtype: str, device: str
    ) -> Iterator[tuple[Any, Any, Any]]:
        tokens, rows_at_once = whole(context or 0, "Context"), whole(batch or 0, "Batch")
        share = number(load, "Load", 0.0, 1.0)
        found = service.lab.estimate(shape or "", tokens, rows_at_once, share, dtype, layers, device)
        rows = table(f"{shape}, {tokens:,} tokens, load {share:g}", PAPER_HEADERS, estimate_rows(found))
        yield status(f"{shape}, estimated."), shown(estimate_figure(found)), rows

    return estimate
