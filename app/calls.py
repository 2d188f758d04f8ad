"""Calls of the page's and the programs' endpoints, held against what these take before Gradio sees them.

Gradio answers a call with too few or too many values by a traceback in the log, values and all.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gradio as gr

_PATH = re.compile(r"/gradio_api/(?:queue/(?P<join>join)|(?:call|run|api)/(?P<name>[^/]+))/?")


class Calls:
    """What the endpoints of an app take.

    Args:
        demo: the app, whole.
    """

    def __init__(self, demo: gr.Blocks) -> None:
        self._by_number = {number: _counts(fn) for number, fn in demo.fns.items()}
        self._by_name = {str(fn.api_name): _counts(fn) for fn in demo.fns.values() if fn.api_name}

    def concern(self, path: str) -> bool:
        """Whether a request to that path is a call."""
        return _PATH.fullmatch(path) is not None

    def complaint(self, path: str, body: bytes) -> str | None:
        """What is wrong with a call, if it names an endpoint and has values at all; the rest is Gradio's to refuse."""
        found = _PATH.fullmatch(path)
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if found is None or not isinstance(call, dict) or not isinstance(call.get("data"), list):
            return None
        number, name = call.get("fn_index"), str(found["name"])[:80]
        if found["join"] or name == "predict":
            # Numbers beyond these may be a session's own: controls that are made as it goes.
            takes, name = self._by_number.get(number) if isinstance(number, int) else None, f"number {str(number)[:20]}"
        elif (takes := self._by_name.get(name)) is None:
            return f"There is no endpoint {name}."
        if takes is not None and len(call["data"]) not in takes:
            return f"Endpoint {name} takes {min(takes)} values, and {len(call['data'])} came."
        return None


def _counts(fn: Any) -> set[int]:
    """How many values an endpoint takes: all, or all but those that the server keeps."""
    return {len(fn.inputs), sum(not block.skip_api for block in fn.inputs)}
