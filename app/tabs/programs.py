"""For programs: the same four things as endpoints with names, and as MCP tools."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

import gradio as gr

from app.errors import UserError
from app.service import Request, Service
from app.service.requests import number, whole
from app.tabs.chat import dense_side
from app.tabs.shared import sentences


def build(service: Service) -> None:
    """Add ``generate``, ``chat``, ``sweep`` and ``estimate`` to the current Blocks."""
    for endpoint in (_generate(service), _chat(service), _sweep(service), _estimate(service)):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)


def _default(service: Service, model: str) -> str:
    if not isinstance(model, str):
        raise UserError("model has to be text: a listed name, a folder or owner/name.")
    return model or next(iter(service.names()), "")


def _many(values: Any, what: str) -> list[Any]:
    if not isinstance(values, list):
        raise UserError(f"{what} has to be a list.")
    return values


def _user(request: gr.Request | None) -> str:
    """Whose request it is: the address that it comes from. A program's session is a new one with every call."""
    host = getattr(getattr(request, "client", None), "host", None)
    return f"api-{host or secrets.token_hex(8)}"


def _generate(service: Service) -> Any:
    def generate(
        prompt: str, p: float = 0.5, model: str = "", max_new_tokens: int = 200, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, chat: bool = True, request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:  # type: ignore[type-arg]
        """Continue a prompt with a Mixture-of-Depths model.

        Args:
            prompt: the text to answer.
            p: threshold from 0 (every layer runs) to 1; about 1 - p of the work is done.
            model: a listed model, a folder or owner/name on the Hub; empty takes the first listed.
            max_new_tokens: tokens to add at most.
            temperature: 0 takes the likeliest token.
            top_p: keep the likeliest tokens of this mass.
            top_k: keep so many of the likeliest tokens; 0 keeps all.
            seed: makes sampling repeatable; -1 draws a new one.
            chat: put the prompt into the model's chat template.

        Returns:
            text, new_tokens, load (measured), kv_stored, kv_allocated and kv_dense in bytes, compute_saved (counted).
        """
        with sentences("an endpoint"):
            wanted = Request(prompt, _default(service, model), max_new_tokens, temperature, top_p, top_k, seed, chat)
            return service.generate(p, wanted, _user(request))

    return generate


def _chat(service: Service) -> Any:
    def chat(
        messages: list[str], p: float = 0.5, model: str = "", max_new_tokens: int = 200, temperature: float = 0.0,
        seed: int = 0, request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:  # type: ignore[type-arg]
        """Ask the dense parent and the MoD model the same messages, side by side.

        Args:
            messages: what the user says, turn by turn; each is answered before the next.
            p: threshold of the MoD model, from 0 to 1.
            model: a listed MoD model, a folder or owner/name on the Hub; empty takes the first listed.
            max_new_tokens: tokens of an answer at most.
            temperature: 0 takes the likeliest token.
            seed: makes sampling repeatable, the same for both; -1 draws a new one.

        Returns:
            sides (dense, mod), and per turn the message, both answers and their figures: tokens, speed and first
            (tokens per second, seconds), prefilled, load, and kv as bytes stored, allocated, and of the dense parent.
        """
        session = f"run-{secrets.token_hex(16)}"
        try:
            with sentences("an endpoint"):
                name = _default(service, model)
                if not _many(messages, "messages"):
                    raise UserError("messages is empty: give at least one.")
                pair = (dense_side(service, name, None), name)
                for message in messages:
                    wanted = Request(message, name, max_new_tokens, temperature, seed=seed)
                    for _ in service.talks.chat(session, pair, p, wanted, user=_user(request)):
                        pass
                return {"sides": ["dense", "mod"], "turns": service.talks.record(session)}
        finally:
            service.close(session)

    return chat


def _sweep(service: Service) -> Any:
    def sweep(
        text: str, thresholds: list[float] | None = None, model: str = "", within: float = 0.02,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:  # type: ignore[type-arg]
        """Measure a text over thresholds: what skipping costs in loss, and what it saves.

        Args:
            text: at least 32 tokens.
            thresholds: values of p from 0 to 1; by default 0, 0.1 and so on to 1.
            model: a listed MoD model, a folder or owner/name on the Hub; empty takes the first listed.
            within: share by which the loss may exceed the dense parent's.

        Returns:
            dense_loss (nats per token, measured), best_p (or null), and per p: loss, load, speed (measured), kv and
            compute as shares of dense (counted).
        """
        found = None
        with sentences("an endpoint"):
            name, asked = _default(service, model), thresholds or [round(0.1 * at, 1) for at in range(11)]
            grid = [number(p, "A threshold", 0.0, 1.0) for p in _many(asked, "thresholds")]
            share = number(within, "within", -1.0, 1000.0)
            for update in service.lab.sweep(name, service.parent_of(name), text, grid, share, _user(request)):
                found = update.result if update.result is not None else found
        return {} if found is None else {
            "dense_loss": found.dense, "dense": found.parent, "tokens": found.tokens,
            "best_p": None if found.best is None else found.best.quality.p,
            "points": [
                {
                    **dataclasses.asdict(one.quality), "kv": one.kv, "compute": one.compute,
                    "tokens_per_second": one.speed,
                }
                for one in found.points
            ],
        }

    return sweep


def _estimate(service: Service) -> Any:
    def estimate(
        config: str, context: int = 4096, batch: int = 1, load: float = 0.5, dtype: str = "bf16", layers: str = "own",
        device: str = "h200",
    ) -> dict:  # type: ignore[type-arg]
        """Memory, work and time of any model on paper, dense against MoD. Every figure is estimated.

        Args:
            config: a preset such as llama-2-7b, a model folder, or owner/name on the Hub.
            context: tokens per row.
            batch: rows.
            load: share of tokens that run in each MoD layer, 0 to 1.
            dtype: bf16, fp16 or fp32.
            layers: own, inner or interleaved.
            device: h200, h100, a100, l4, rtx4090 or cpu-2-cores.

        Returns:
            dense and mod, each with weights, kv and activations in bytes, FLOPs, bytes read and seconds.
        """
        with sentences("an endpoint"):
            found = service.lab.estimate(
                str(config)[:4096], whole(context, "context", 1), whole(batch, "batch", 1),
                number(load, "load", 0.0, 1.0), *(str(word)[:80] for word in (dtype, layers, device)),
            )
        return dataclasses.asdict(found)

    return estimate
