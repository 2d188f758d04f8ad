"""Explore: a prompt, a dial, and the live view."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.figures import load_per_layer
from app.present import snippet
from app.service import Request, Service, number
from app.tabs.shared import guarded, sentences, shown, status, waiting
from app.tape import Window, ending
from app.views import view

EXAMPLES = [
    "Write a bedtime story called `The Lantern in the Snow`.",
    "Write a bedtime story called `The Whale Who Forgot to Sing`.",
    "Tell the child-appropriate tale called `Pip and the Runaway Kite`.",
    "Write a campfire story called `The Light on Miller's Pond`.",
]
P_INFO = "Move it while text streams. 0: every token runs through every layer. Higher: more tokens skip layers."
# On a phone the view lies below the controls: bring it up when it is about to fill.
SHOW_VIEW = "() => { if (innerWidth < 700) document.querySelector('#status').scrollIntoView({behavior: 'smooth'}); }"
NO_CODE = "# Let a run come to its end: the Python for it appears here."
OPENING = "A recorded example run. Press Generate for your own."


class Explore:
    """The tab's components and handlers.

    Attributes:
        settings: what a link and the browser's memory keep, by name.
    """

    def __init__(self, service: Service, model: gr.Dropdown) -> None:
        self.service, self.model = service, model
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._controls()
            with gr.Column(scale=7, min_width=360):
                self.status = gr.HTML(status(OPENING), elem_id="status", apply_default_css=False)
                self.view = view("heatmap", Window.whole(service.example()), elem_id="view")
                self._after()
        self.settings = {
            "prompt": self.prompt, "p": self.p, "new_tokens": self.new_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed, "chat": self.chat,
        }
        self._wire()

    def _controls(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", value=EXAMPLES[0], lines=3, max_lines=8, elem_id="prompt", autofocus=True,
            placeholder="Write a bedtime story called …",
        )
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop")
        self.p = gr.Slider(0, 1, value=0.5, step=0.01, label="Threshold p", info=P_INFO, elem_id="p")
        self.shifts = gr.State({})
        with gr.Accordion("p per layer", open=False):
            gr.Markdown("Added to p in one MoD layer alone. Positive: more tokens skip it.")
            self._layer_sliders()
        gr.Examples(EXAMPLES, inputs=self.prompt, label="Examples", elem_id="examples")
        with gr.Accordion("Sampling", open=False):
            self.new_tokens = gr.Slider(
                1, self.service.limits.new_tokens, value=400, step=1, label="New tokens, at most"
            )
            self.temperature = gr.Slider(
                0, 2, value=0.7, step=0.05, label="Temperature", info="0 takes the likeliest token"
            )
            self.top_p = gr.Slider(0.05, 1, value=0.95, step=0.01, label="Top-p")
            self.top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0 keeps all tokens")
            self.seed = gr.Number(value=0, precision=0, label="Seed", info="-1 draws a new one each time")
            self.chat = gr.Checkbox(
                value=True, label="Chat message", info="Off: the model goes on from your text as it is"
            )

    def _layer_sliders(self) -> None:
        """One slider a MoD layer of the chosen model, made when the model changes."""

        @gr.render(inputs=self.model)
        def sliders(name: str | None) -> None:
            layers = self.service.mod_layers(name or "")
            if not layers:
                gr.Markdown("Load the model first: its MoD layers are not known yet.")
            for at, layer in enumerate(layers):
                slider = gr.Slider(-1, 1, value=0, step=0.05, label=f"Layer {layer}")
                slider.change(
                    self._shift(at, len(layers)), [slider, self.shifts, self.p], self.shifts, queue=False,
                    show_progress="hidden", trigger_mode="always_last", api_visibility="private",
                )

    def _shift(self, at: int, count: int) -> Any:
        def move(value: float, shifts: dict[str, float], p: float, request: gr.Request) -> dict[str, float]:
            with sentences("moving p"):
                moved = {**shifts, str(at): number(value, "Shift of p", -1, 1)}
                self.service.set_p(str(request.session_hash), p, _listed(moved, count))
                return moved

        return move

    def _after(self) -> None:
        """What is at hand once a run is over."""
        with gr.Row():
            self.load = gr.UploadButton(
                "Load a trace", file_types=[".json"], type="binary", size="sm", elem_id="load-trace"
            )
        with gr.Accordion("Load per layer of the finished run", open=False):
            self.plot = gr.Plot(show_label=False, elem_id="per-layer", visible=False)
        with gr.Accordion("Python that reproduces the run", open=False):
            self.code = gr.Code(
                value=NO_CODE, language="python", show_label=False, elem_id="snippet",
                interactive=False,
            )

    def _wire(self) -> None:
        inputs = [
            self.prompt, self.p, self.new_tokens, self.temperature, self.top_p, self.top_k, self.seed, self.chat,
            self.model, self.shifts,
        ]
        run = gr.on(
            [self.generate.click, self.prompt.submit], _generate(self.service), inputs,
            [self.view, self.status, self.plot, self.code], show_progress="hidden", concurrency_limit=None,
            trigger_mode="once", api_visibility="private",
        )
        self.generate.click(None, js=SHOW_VIEW, show_progress="hidden", api_visibility="private")
        self.model.change(lambda: {}, None, self.shifts, queue=False, api_visibility="private")  # sliders are new too
        self.stop.click(
            lambda: (status("Stopped."), gr.update(visible=False), NO_CODE), None, [self.status, self.plot, self.code],
            cancels=[run], queue=False, show_progress="hidden", api_visibility="private",
        )
        self.load.upload(
            _read_trace(self.service), self.load, [self.view, self.status, self.plot, self.code],
            show_progress="hidden", api_visibility="private",
        )
        # change, not input: the slider's reset button and its clamping send no input.
        self.p.change(
            _move(self.service), self.p, None, queue=False, show_progress="hidden", trigger_mode="always_last",
            api_visibility="private",
        )


def _move(service: Service) -> Any:
    def move(value: float, request: gr.Request) -> None:
        with sentences("moving p"):
            service.set_p(str(request.session_hash), value)

    return move


def _generate(service: Service) -> Any:
    """The generate handler: a tape, a status line and, at the end, a chart and a snippet."""

    @guarded(lambda line: (gr.skip(), line, gr.skip(), gr.skip()))
    def generate(
        prompt: str, p: float, new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None,
        chat: bool, model: str | None, shifts: dict[str, float], request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        name, tape, window = model or "", "", Window()
        count = len(service.mod_layers(name))
        wanted = Request(
            prompt, name, new_tokens, temperature, top_p, top_k, seed, chat, _listed(shifts, count),
        )
        yield gr.skip(), status("Starting …"), gr.skip(), gr.skip()
        with contextlib.closing(service.run(str(request.session_hash), p, wanted)) as updates:
            for update in updates:
                if (line := waiting(update, name)) is not None:
                    yield gr.skip(), line, gr.skip(), gr.skip()
                elif update.tape is not None:
                    first, tape = not tape, update.tape
                    line = status("Streaming. Move p and watch.") if first else gr.skip()
                    yield window.of(tape), line, gr.skip(), gr.skip()
        code = snippet(wanted, tape, service.source_of(name))
        yield Window.whole(tape), status(ending(tape)), shown(load_per_layer(tape)), code
        yield (gr.skip(),) * 4  # Gradio sends the last answer twice

    return generate


def _read_trace(service: Service) -> Any:
    @guarded(lambda line: (gr.skip(), line, gr.skip(), gr.skip()))
    def read(data: bytes, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        with contextlib.closing(service.trace(str(request.session_hash), data)) as updates:
            for update in updates:
                if update.tape is None:
                    yield gr.skip(), waiting(update, ""), gr.skip(), gr.skip()
                    continue
                line = status("A trace that was loaded from a file.")
                yield Window.whole(update.tape), line, shown(load_per_layer(update.tape)), NO_CODE

    return read


def _listed(shifts: dict[str, float], count: int) -> tuple[float, ...]:
    """Shifts by MoD layer as the service takes them, [M]."""
    return tuple(number(shifts.get(str(at), 0.0), "Shift of p", -1, 1) for at in range(count))
