"""Start the app: ``python app.py``. On a Hugging Face Space this file is what runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import gradio as gr

from app import ui
from app.heatmap import css
from app.service import Limits, Service

ASSETS = Path(__file__).resolve().parent / "assets"


def shipped_models() -> dict[str, Path]:
    """MoD model folders under ``assets/``, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*-MoD/config.json"))}


def _theme() -> gr.themes.Base:
    """System fonts: nothing is fetched from elsewhere."""
    return gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def main() -> None:
    """Read the flags, open the first model, serve."""
    parser = argparse.ArgumentParser(description="MoDification Studio: watch adaptive depth at work.")
    parser.add_argument(
        "--model", action="append", default=[], metavar="FOLDER", help="another model to offer, first in the list"
    )
    parser.add_argument("--host", default=None, help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, default=None, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--running", type=int, default=Limits().running, help="generations at once (default: %(default)s)"
    )
    arguments = parser.parse_args()
    models = {Path(folder).name: Path(folder) for folder in arguments.model} | shipped_models()
    service = Service(models, ASSETS / "traces", Limits(running=arguments.running))
    if service.names():
        print(service.open(service.names()[0]).describe(), flush=True)
    ui.build(service).launch(
        server_name=arguments.host, server_port=arguments.port, css=css(), theme=_theme(),
        footer_links=["api"], max_file_size="5mb",
    )


if __name__ == "__main__":
    main()
