"""Sweep: one text over a grid of p: what skipping costs and what it saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app.errors import UserError
from app.figures import sweep_figure
from app.present import best_sentence, sweep_rows
from app.service import Service, number
from app.tabs.shared import csv_script, guarded, numbers, shown, status, table, waiting

GRID = "0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1"
OPENING = "Paste a text, or take the sample. Loss, load and speed are measured; KV and compute are counted."
HEADERS = [
    "p", "load (measured)", "loss, nats/token (measured)", "± standard error", "KV of dense (counted)",
    "compute of dense (counted)", "prefill, tokens/s (measured)",
]


class SweepTab:
    """The tab's components and handlers; ``use`` is the button that hands the best p over."""

    def __init__(self, service: Service, model: gr.Dropdown, sample: str) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.text = gr.Textbox(label="Text", value=sample, lines=8, max_lines=14, elem_id="sweep-text")
                with gr.Row():
                    self.file = gr.UploadButton(
                        "From a file", file_types=[".txt", ".md"], type="binary", size="sm", elem_id="sweep-file"
                    )
                    self.sample = gr.Button("Sample", size="sm", elem_id="sweep-sample")
                self.grid = gr.Textbox(label="Thresholds p", value=GRID, elem_id="sweep-grid")
                self.within = gr.Number(
                    label="Loss at most this much above dense, %", value=2, minimum=0, maximum=100, elem_id="within"
                )
                with gr.Row():
                    self.go = gr.Button("Sweep", variant="primary", elem_id="sweep-go")
                    self.stop = gr.Button("Stop", variant="stop", elem_id="sweep-stop")
            with gr.Column(scale=7, min_width=360):
                self.status = gr.HTML(status(OPENING), elem_id="sweep-status", apply_default_css=False)
                self.best = gr.Markdown("", elem_id="sweep-best")
                self.use = gr.Button("Use this p in Explore", visible=False, elem_id="sweep-use")
                self.plot = gr.Plot(show_label=False, elem_id="sweep-plot", visible=False)
                self.table = gr.HTML("", elem_id="sweep-table", apply_default_css=False)
                self.csv = gr.Button("CSV", size="sm", elem_id="sweep-csv", visible=False)
        self.found = gr.State(None)
        self.settings = {"text": self.text, "grid": self.grid, "within": self.within}
        self._wire(service, model, sample)

    def _wire(self, service: Service, model: gr.Dropdown, sample: str) -> None:
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        run = self.go.click(
            _sweep(service), [self.text, self.grid, self.within, model],
            [self.status, self.plot, self.table, self.best, self.found, self.use, self.csv], concurrency_limit=None,
            trigger_mode="once", **private,
        )
        self.stop.click(lambda: status("Stopped. What was measured stays."), None, self.status, cancels=[run],
                        queue=False, **private)
        self.sample.click(lambda: sample, None, self.text, queue=False, **private)
        self.file.upload(_read(service), self.file, [self.text, self.status], **private)
        self.csv.click(None, None, None, js=csv_script("sweep-table"), **private)


def _read(service: Service) -> Any:
    @guarded(lambda line: (gr.skip(), line))
    def read(data: bytes) -> Iterator[tuple[Any, Any]]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError("The file is not UTF-8 text. Save it as UTF-8, or paste the text.") from None
        kept = text[: service.limits.prompt_characters]
        cut = f" The first {len(kept):,} characters of it." if len(kept) < len(text) else ""
        yield kept, status(f"Text from a file.{cut}")

    return read


def _sweep(service: Service) -> Any:
    def failed(line: str) -> tuple[Any, ...]:
        return line, *(gr.skip(),) * 6

    @guarded(failed)
    def sweep(
        text: str, grid: str, within: float | None, model: str | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        text, name = service.limits.check_prompt(text), model or ""
        points = sorted(set(numbers(grid, float, "Thresholds p")))
        yield status("Starting …", busy=True), gr.skip(), gr.skip(), "", None, gr.update(visible=False), gr.skip()
        found = None
        share = number(within or 0.0, "Within", 0, 1000) / 100
        updates = service.lab.sweep(name, service.parent_of(name), text, points, share, str(request.session_hash))
        with contextlib.closing(updates):
            for update in updates:
                if (line := waiting(update, name)) is not None:
                    yield failed(line)
                elif update.result is not None:
                    found = update.result
                    line = status(f"{len(found.points)} of {len(points)} thresholds measured …", busy=True)
                    figures = table(f"{name} on {found.tokens:,} tokens", HEADERS, sweep_rows(found))
                    plot, offer = shown(sweep_figure(found)), gr.update(visible=True)
                    yield line, plot, figures, gr.skip(), gr.skip(), gr.skip(), offer
        if found is not None:
            best = None if found.best is None else found.best.quality.p
            cut = f" (the first of {found.given:,})" if found.given > service.limits.text_tokens else ""
            done = status(f"Done: {found.tokens:,} tokens{cut}, {len(found.points)} thresholds.")
            yield done, gr.skip(), gr.skip(), best_sentence(found), best, gr.update(visible=best is not None), gr.skip()

    return sweep


def sample_text(folder: Path) -> str:
    """The shipped sample, or nothing."""
    path = folder / "sample.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
