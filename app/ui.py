"""Puts the tabs together; keeps settings in the browser and in links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from app.service import Service
from app.tabs import about, programs
from app.tabs.benchmark import Benchmark
from app.tabs.chat import Chat
from app.tabs.convert import Convert
from app.tabs.explore import Explore
from app.tabs.model import Model
from app.tabs.sweep import SweepTab, sample_text

INTRO = (
    "# MoDification Studio\n"
    "A small router in each MoD layer scores every token, and a token goes through the layer only when its score "
    "reaches **p**. A skipped token costs no compute there and leaves no keys and values in the cache."
)
_UPLOADS = (600, 3600)  # seconds between looks at uploaded files, and after which they go
_HERE = Path(__file__).parent


def build(service: Service, sample: Path | None = None) -> gr.Blocks:
    """The whole page, not yet launched; ``sample``: the folder with the shipped text."""
    with gr.Blocks(title="MoDification Studio", analytics_enabled=False, delete_cache=_UPLOADS) as demo:
        programs.build(service)  # first: the names are theirs
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                gr.Markdown(INTRO, elem_id="intro")
            with gr.Column(scale=3, min_width=300):
                model = gr.Dropdown(
                    service.names(), value=next(iter(service.names()), None), label="Model, for all tabs",
                    allow_custom_value=True, elem_id="model",
                )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Explore", id="explore"):
                explore = Explore(service, model)
                link = _link()
            with gr.Tab("Chat", id="chat"):
                chat = Chat(service, model)
            with gr.Tab("Sweep", id="sweep"):
                sweep = SweepTab(service, model, sample_text(sample) if sample else "")
            with gr.Tab("Convert", id="convert"):
                convert = Convert(service)
            with gr.Tab("Benchmark", id="benchmark"):
                benchmark = Benchmark(service, model)
            with gr.Tab("Model", id="model-tab"):
                Model(service, model)
            with gr.Tab("About", id="about-tab"):
                about.build()
        _connect(service, tabs, explore, sweep, convert, model)
        others = {"chat": chat.settings, "sweep": sweep.settings, "convert": convert.settings,
                  "benchmark": benchmark.settings}
        kept = {f"{tab}_{name}": one for tab, settings in others.items() for name, one in settings.items()}
        restored = _remember(demo, {**explore.settings, "model": model}, kept, link)
        restored.then(benchmark.on_paper, benchmark.paper_inputs, benchmark.paper_outputs, api_visibility="private",
                      show_progress="hidden")
        demo.load(lambda: gr.update(choices=service.names()), None, model, api_visibility="private",
                  show_progress="hidden")  # models may have been converted since
        demo.unload(_leave(service, demo))
    _queue(demo, service)
    return demo


def _queue(demo: gr.Blocks, service: Service) -> None:
    """Gradio's queue lets all in: places are the service's affair.

    It must not tell places whenever one moves up, either: its loop does that, and ends for good, for all users, when
    somebody who waits there leaves at that moment. At an interval a task of its own does it.
    """
    most = 4 * (service.limits.running + service.limits.waiting)
    demo.queue(max_size=most, default_concurrency_limit=None, status_update_rate=10.0)


def _connect(
    service: Service, tabs: gr.Tabs, explore: Explore, sweep: SweepTab, convert: Convert, model: gr.Dropdown
) -> None:
    """What one tab hands to another."""
    private: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def use(p: float | None) -> tuple[Any, Any]:
        return gr.skip() if p is None else p, gr.Tabs(selected="explore")

    def show(name: str | None) -> tuple[Any, Any]:
        choices = gr.update(choices=service.names(), value=name) if name else gr.skip()
        return choices, gr.Tabs(selected="explore")

    sweep.use.click(use, sweep.found, [explore.p, tabs], **private)
    convert.open.click(show, convert.done, [model, tabs], **private)


def _leave(service: Service, demo: gr.Blocks) -> Any:
    """What is done once a page is closed: its runs end, and Gradio's copy of its components (0.4 MB) is let go."""

    def leave(request: gr.Request) -> None:
        session = str(request.session_hash)
        service.close(session)
        demo.state_holder.session_data.pop(session, None)
        demo.state_holder.time_last_used.pop(session, None)

    return leave


def _link() -> dict[str, Any]:
    with gr.Accordion("Share these settings", open=False):
        with gr.Row():
            button = gr.Button("Make a link", size="sm", elem_id="link")
            reset = gr.Button("Reset all settings", size="sm", elem_id="reset-settings")
        shown = gr.Textbox(
            label="Link to model, p, prompt, seed and sampling", interactive=False, elem_id="link-text",
            buttons=["copy"],
        )
    return {"button": button, "reset": reset, "shown": shown}


def _remember(demo: gr.Blocks, linked: dict[str, Any], kept: dict[str, Any], link: dict[str, Any]) -> Any:
    """Settings come from the link, else from this browser; every change is kept in this browser.

    ``linked`` are those that a link carries; the others are kept alone. Returns the event after which all are in place.
    """
    settings = {**linked, **kept}
    names = list(settings)
    script = (_HERE / "settings.js").read_text(encoding="utf-8")
    kinds = {
        name: {
            "kind": type(one).__name__, "least": getattr(one, "minimum", None), "most": getattr(one, "maximum", None),
        }
        for name, one in settings.items()
    }
    call = f"({script.strip()})({json.dumps(names)}, {json.dumps(kinds)})"
    values = list(settings.values())
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    restored = demo.load(None, values, values, js=f"(...values) => {call}.restore(values)", **private)
    gr.on(
        [component.change for component in values], None, values, None, js=f"(...values) => {call}.keep(values)",
        **private,
    )
    link["button"].click(
        None, list(linked.values()), link["shown"], js=f"(...values) => {call}.link(values)", **private
    )
    link["reset"].click(None, None, None, js=f"() => {call}.forget()", **private)
    return restored
