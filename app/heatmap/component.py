"""The live view as a Gradio component; its value is a tape (app.present)."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


def live_view(tape: str, elem_id: str) -> gr.HTML:
    """A component that shows a tape and whatever is appended to it."""
    return gr.HTML(
        value=tape,
        html_template=(_HERE / "heatmap.html").read_text(encoding="utf-8"),
        js_on_load=(_HERE / "heatmap.js").read_text(encoding="utf-8"),
        elem_id=elem_id,
        apply_default_css=False,
    )


def css() -> str:
    """Style sheet of the view, for ``launch(css=...)``."""
    return (_HERE / "heatmap.css").read_text(encoding="utf-8")
