"""Model: load one from the list, a folder or the Hub, and read what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.figures import report_figure
from app.present import memory_sentence, size
from app.service import Service
from app.tabs.shared import guarded, shown, status, table, waiting

OPENING = "Weights are read as safetensors; no code from a model folder is ever run."
ANY = "as stored"
HEADERS = ["layer", "kind", "class", "parameters"]


class Model:
    """The tab's components and handlers; a loaded model is put into the page's model list."""

    def __init__(self, service: Service, model: gr.Dropdown) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                info = "Listed, the path of a folder, or owner/name on the Hub" if service.limits.free_models else None
                self.source = gr.Dropdown(
                    service.names(), value=next(iter(service.names()), None),
                    allow_custom_value=service.limits.free_models, label="Model", info=info, elem_id="source",
                )
                self.dtype = gr.Radio([ANY, "fp32", "bf16", "fp16"], value=ANY, label="Data type")
                self.quantization = gr.Radio(
                    ["none", "8bit", "4bit"], value="none", label="Quantization",
                    info="bitsandbytes; routers stay in full precision",
                )
                self.device = gr.Radio(
                    ["best", "cpu", "cuda", "auto"], value="best", label="Device",
                    info="auto: spread over all devices, what is left over on the disk",
                )
                with gr.Row():
                    self.ask = gr.Button("Memory needed", elem_id="model-ask")
                    self.load = gr.Button("Load", variant="primary", elem_id="model-load")
                    self.stop = gr.Button("Stop", variant="stop", elem_id="model-stop")
            with gr.Column(scale=7, min_width=360):
                self.status = gr.HTML(status(opening(service)), elem_id="model-status", apply_default_css=False)
                self.plot = gr.Plot(show_label=False, elem_id="model-report", visible=False)
                self.layers = gr.HTML("", elem_id="model-layers", apply_default_css=False)
                with gr.Accordion("Model card", open=False):
                    self.card = gr.Markdown("No model loaded yet.", elem_id="model-card", sanitize_html=True)
        self._wire(service, model)

    def _wire(self, service: Service, model: gr.Dropdown) -> None:
        inputs = [self.source, self.dtype, self.quantization, self.device]
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run = self.load.click(
            _load(service), inputs, [self.status, self.plot, self.layers, self.card, model], concurrency_limit=None,
            trigger_mode="once", **private,
        )
        self.ask.click(_needs(service), inputs, self.status, **private)
        self.stop.click(
            lambda: status("Stopped waiting; the load goes on in the background and will be there when you ask again."),
            None, self.status, cancels=[run], queue=False, **private,
        )


def opening(service: Service) -> str:
    """What holds here; and the downloads that were broken off, by an app that ended, say."""
    left = [f"{name} ({size(here)} are here)" for name, here in service.library.broken_off().items()]
    more = f" Downloads broken off: {', '.join(left)}. Load the model again, and its download goes on." if left else ""
    return OPENING + more


def _label(service: Service, source: str | None, dtype: str, quantization: str, device: str) -> str:
    return service.label(
        (source or "").strip(), None if dtype == ANY else dtype, None if quantization == "none" else quantization,
        None if device == "best" else device,
    )


def _needs(service: Service) -> Any:
    @guarded(lambda line: line)
    def needs(*values: Any) -> Iterator[str]:
        yield status(memory_sentence(*service.library.needs(_label(service, *values))))

    return needs


def _load(service: Service) -> Any:
    @guarded(lambda line: (line, *(gr.skip(),) * 4))
    def load(*values: Any) -> Iterator[tuple[Any, ...]]:
        label = _label(service, *values)
        yield status("Starting …", busy=True), *(gr.skip(),) * 4
        with contextlib.closing(service.load(label)) as updates:
            for update in updates:
                if (line := waiting(update, label)) is not None:
                    yield line, *(gr.skip(),) * 4
                elif update.result is not None:
                    described, rows, report, card = update.result
                    has = bool(report.get("sweep"))
                    figure = shown(report_figure(report)) if has else gr.update(visible=False)
                    choices = list(dict.fromkeys([label, *service.names()]))
                    layers = table("Layers", HEADERS, rows)
                    yield status(described), figure, layers, card, gr.update(choices=choices, value=label)

    return load
