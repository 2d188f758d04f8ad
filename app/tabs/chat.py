"""Chat: the dense parent and the MoD model answer the same messages side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.errors import UserError
from app.service import Request, Service
from app.tabs.shared import answered, guarded, sentences, status, waiting
from app.views import view

OPENING = "Both get the same messages and the same seed. The left model runs every layer, the right one routes at p."
BLIND = "Starts a new conversation; sides are dealt by lot and named after your vote"


class Chat:
    """The tab's components and handlers.

    Attributes:
        settings: what the browser's memory keeps, by name; so in the other tabs.
    """

    def __init__(self, service: Service, model: gr.Dropdown) -> None:
        self.service, self.model = service, model
        self.status = gr.HTML(status(OPENING), elem_id="chat-status", apply_default_css=False)
        self.view = view("chat", "", elem_id="chat-view")
        with gr.Row():
            self.message = gr.Textbox(
                label="Message", lines=1, max_lines=6, placeholder="Tell the child-appropriate tale called …",
                elem_id="chat-message", scale=6,
            )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", elem_id="chat-send", min_width=90)
            self.stop = gr.Button("Stop", variant="stop", elem_id="chat-stop", min_width=90)
            self.again = gr.Button("Regenerate", elem_id="chat-again", min_width=90)
            self.edit = gr.Button("Edit last", elem_id="chat-edit", min_width=90)
            self.undo = gr.Button("Undo", elem_id="chat-undo", min_width=90)
            self.clear = gr.Button("Clear", elem_id="chat-clear", min_width=90)
        with gr.Row():
            self.p = gr.Slider(
                0, 1, value=0.5, step=0.01, label="Threshold p of the MoD model", elem_id="chat-p", scale=2
            )
            self.parent = gr.Dropdown(
                ["the dense parent, or this model at p = 0", *service.names()],
                value="the dense parent, or this model at p = 0", allow_custom_value=True, label="Dense side",
                elem_id="chat-parent", scale=2,
            )
            self.blind = gr.Checkbox(value=False, label="Blind", info=BLIND, elem_id="chat-blind", scale=1)
        with gr.Accordion("Sampling", open=False), gr.Row():
            self.new_tokens = gr.Slider(1, service.limits.new_tokens, value=300, step=1, label="New tokens, at most")
            self.temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature")
            self.seed = gr.Number(
                value=-1, precision=0, label="Seed", info="The same for both; -1 draws a new one each time",
                elem_id="chat-seed",
            )
        self.settings = {
            "p": self.p, "parent": self.parent, "blind": self.blind, "new_tokens": self.new_tokens,
            "temperature": self.temperature, "seed": self.seed,
        }
        self._wire()

    def _wire(self) -> None:
        inputs = [
            self.message, self.p, self.model, self.parent, self.blind, self.new_tokens, self.temperature, self.seed
        ]
        outputs = [self.view, self.status, self.message]
        options: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "once", "api_visibility": "private",
        }
        runs = [
            gr.on(
                [self.send.click, self.message.submit], _answer(self.service, again=False), inputs, outputs, **options
            ),
            self.again.click(_answer(self.service, again=True), inputs, outputs, **options),
        ]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        after = (
            (self.stop, _stopped(self.service)), (self.edit, _take_back(self.service, keep=True)),
            (self.undo, _take_back(self.service, keep=False)), (self.clear, _clear(self.service)),
        )
        for button, handler in after:  # a run is cancelled first: what follows waits for its end
            button.click(None, None, None, cancels=runs, **quick).then(handler, None, outputs, **quick)
        self.p.change(_move(self.service), self.p, None, trigger_mode="always_last", **quick)


def dense_side(service: Service, model: str, chosen: str | None) -> str:
    """The model of the left side: the one chosen, the MoD model's listed parent, or the model itself."""
    if chosen and not chosen.startswith("the dense parent"):
        return chosen
    return service.parent_of(model) or model


def _answer(service: Service, again: bool) -> Any:
    @guarded(_failed)
    def answer(
        message: str, p: float, model: str | None, parent: str | None, blind: bool, new_tokens: int,
        temperature: float, seed: int | None, request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        session, name = str(request.session_hash), model or ""
        turns = None
        if again:
            before = service.talks.turns(session)
            if not before:
                raise UserError("There is no answer to regenerate yet. Send a message first.")
            message, turns = before[-1], len(before) - 1
        wanted = Request(message, name, new_tokens, temperature, seed=seed)
        pair = (dense_side(service, name, parent), name)
        yield gr.skip(), status("Starting …"), gr.skip()
        cleared = again  # the box keeps the message until it has arrived
        with contextlib.closing(service.talks.chat(session, pair, p, wanted, blind, turns)) as updates:
            for update in updates:
                if (line := waiting(update, name)) is not None:
                    yield gr.skip(), line, gr.skip()
                elif update.tape is not None:
                    yield update.tape, status("Both are answering. Move p and watch."), gr.skip() if cleared else ""
                    cleared = True
        yield gr.skip(), status("Done. Ask on: what was said stays in both caches."), gr.skip()

    return answer


def _failed(line: str) -> tuple[Any, str, Any]:
    return gr.skip(), line, gr.skip()


def _stopped(service: Service) -> Any:
    @answered(_failed)
    def stopped(request: gr.Request) -> tuple[str, str, Any]:
        return service.talks.tape(str(request.session_hash)), status("Stopped."), gr.skip()

    return stopped


def _take_back(service: Service, keep: bool) -> Any:
    """Undo the last turn; ``keep`` puts its message back into the box."""

    @answered(_failed)
    def take_back(request: gr.Request) -> tuple[Any, str, Any]:
        session = str(request.session_hash)
        turns = service.talks.turns(session)
        if not turns:
            return gr.skip(), status("There is nothing to take back yet."), gr.skip()
        tape = service.talks.cut(session, len(turns) - 1)
        return tape, status("Edit the message and send it again." if keep else "Took the last turn back."), (
            turns[-1] if keep else gr.skip()
        )

    return take_back


def _clear(service: Service) -> Any:
    @answered(_failed)
    def clear(request: gr.Request) -> tuple[str, str, str]:
        service.close(str(request.session_hash))
        return "", status("A new conversation."), ""

    return clear


def _move(service: Service) -> Any:
    def move(value: float, request: gr.Request) -> None:
        with sentences("moving p"):
            service.set_p(f"{request.session_hash}/chat", value)

    return move
