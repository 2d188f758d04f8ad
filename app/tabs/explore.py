"""Explore: a prompt, a dial, and the live view."""

from __future__ import annotations

import contextlib
import html
import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.errors import UserError
from app.figures import load_per_layer
from app.heatmap import live_view
from app.present import ending, waiting_sentence
from app.service import Request, Service

EXAMPLES = [
    "Write a bedtime story called `The Lantern in the Snow`.",
    "Write a bedtime story called `The Whale Who Forgot to Sing`.",
    "Tell the child-appropriate tale called `Pip and the Runaway Kite`.",
    "Write a campfire story called `The Light on Miller's Pond`.",
]
P_INFO = "Move it while text streams. 0: every token runs through every layer. Higher: more tokens skip layers."
# On a phone the view lies below the controls: bring it up when it is about to fill.
SHOW_VIEW = "() => { if (innerWidth < 700) document.querySelector('#status').scrollIntoView({behavior: 'smooth'}); }"
OPENING = "A recorded example run. Press Generate for your own."


def build(service: Service) -> None:
    """Lay the tab out inside the current Blocks and wire it."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", value=EXAMPLES[0], lines=3, max_lines=8, elem_id="prompt", autofocus=True,
                placeholder="Write a bedtime story called …",
            )
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            p = gr.Slider(0, 1, value=0.5, step=0.01, label="Threshold p", info=P_INFO, elem_id="p")
            gr.Examples(EXAMPLES, inputs=prompt, label="Examples", elem_id="examples")
            settings = _settings(service)
        with gr.Column(scale=7, min_width=360):
            status = gr.HTML(_status(OPENING), elem_id="status", apply_default_css=False)
            view = live_view(service.example(), elem_id="view")
            with gr.Accordion("Load per layer of the finished run", open=False):
                plot = gr.Plot(show_label=False, elem_id="per-layer")

    run = gr.on(
        [generate.click, prompt.submit], _handlers(service), [prompt, p, *settings], [view, status, plot],
        show_progress="hidden", concurrency_limit=None, trigger_mode="once", api_name="generate",
    )
    generate.click(None, js=SHOW_VIEW, show_progress="hidden", api_visibility="private")
    stop.click(
        lambda: _status("Stopped."), None, status, cancels=[run], queue=False, show_progress="hidden",
        api_visibility="private",
    )
    _wire_dial(service, p)


def _wire_dial(service: Service, p: gr.Slider) -> None:
    def move(value: float, request: gr.Request) -> None:
        service.set_p(str(request.session_hash), value)

    # change, not input: the slider's reset button and its clamping send no input.
    p.change(move, p, None, queue=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private")


def _settings(service: Service) -> list[Any]:
    """Folded controls, in the order of the generate handler's arguments."""
    with gr.Accordion("Sampling", open=False):
        new_tokens = gr.Slider(1, service.limits.new_tokens, value=400, step=1, label="New tokens, at most")
        temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", info="0 takes the likeliest token")
        top_p = gr.Slider(0.05, 1, value=0.95, step=0.01, label="Top-p")
        top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0 keeps all tokens")
        seed = gr.Number(value=0, precision=0, label="Seed", info="-1 draws a new one each time")
        chat = gr.Checkbox(value=True, label="Chat message", info="Off: the model goes on from your text as it is")
    with gr.Accordion("Model", open=False):
        model = gr.Dropdown(
            service.names(), value=next(iter(service.names()), None), allow_custom_value=True, label="Model",
            info="Shipped, or the path of a model folder, or owner/name on the Hub", elem_id="model",
        )
    return [new_tokens, temperature, top_p, top_k, seed, chat, model]


def _handlers(service: Service) -> Any:
    """The generate handler: a tape, a status line and, at the end, a chart."""

    def generate(
        prompt: str, p: float, new_tokens: float, temperature: float, top_p: float, top_k: float, seed: float | None,
        chat: bool, model: str | None, request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        tape = ""
        try:
            wanted = Request(
                prompt, model or "", int(new_tokens), float(temperature), float(top_p), int(top_k),
                None if seed is None or seed < 0 else int(seed), bool(chat),
            )
            yield gr.skip(), _status("Starting …"), None
            with contextlib.closing(service.run(str(request.session_hash), p, wanted)) as updates:
                for update in updates:
                    if update.waiting is not None:
                        yield gr.skip(), _status(waiting_sentence(update.waiting)), gr.skip()
                    elif update.loading:
                        yield gr.skip(), _status(f"Loading {wanted.model} …"), gr.skip()
                    elif update.tape is not None:
                        first, tape = not tape, update.tape
                        yield tape, _status("Streaming. Move p and watch.") if first else gr.skip(), gr.skip()
            yield gr.skip(), _status(ending(tape)), load_per_layer(tape)
        except UserError as error:
            yield gr.skip(), _status(str(error), error=True), gr.skip()
        except Exception:
            # The log has the cause; the page gets a sentence, whatever happened.
            logging.getLogger(__name__).exception("generation failed")
            sentence = "Something went wrong here; the model is free again. Check the settings and try once more."
            yield gr.skip(), _status(sentence, error=True), gr.skip()

    return generate


def _status(text: str, error: bool = False) -> str:
    kind = " error" if error else ""
    return f'<p class="mod-status{kind}" role="{"alert" if error else "status"}">{html.escape(text)}</p>'
