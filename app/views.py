"""Components of our own: a folder of HTML, CSS and JavaScript becomes a Gradio component whose value is a tape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

_HERE = Path(__file__).parent
FOLDERS = ("heatmap", "chat")


def view(folder: str, tape: Any, elem_id: str, **options: Any) -> gr.HTML:
    """A component that shows a tape and whatever is appended to it.

    The scripts of the folder are joined, in the order of their names after the prelude that all views share, and run
    once per component, as one function body.
    """
    here = _HERE / folder
    scripts = [_HERE / "prelude.js", *sorted(here.glob("*.js"))]
    return gr.HTML(
        value=tape,
        html_template=(here / f"{folder}.html").read_text(encoding="utf-8"),
        js_on_load="\n".join(path.read_text(encoding="utf-8") for path in scripts),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def css() -> str:
    """Style sheets of the page and its views, for ``launch(css=...)``."""
    sheets = [_HERE / "page.css", *(_HERE / folder / f"{folder}.css" for folder in FOLDERS)]
    return "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
