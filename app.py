"""Start the app: ``python app.py``. On a Hugging Face Space this file is what runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import gradio as gr

from app import ui
from app.errors import UserError
from app.heatmap import css
from app.service import Limits, Service

ASSETS = Path(__file__).resolve().parent / "assets"


def shipped_models() -> dict[str, Path]:
    """MoD model folders under ``assets/``, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*-MoD/config.json"))}


def _name(model: str) -> str:
    """How a model given by flag is listed: a folder by its last part, a Hub id as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _theme() -> gr.themes.Base:
    """System fonts: nothing is fetched from elsewhere."""
    return gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def main() -> None:
    """Read the flags, open the first model, serve."""
    parser = argparse.ArgumentParser(description="MoDification Studio: watch adaptive depth at work.")
    parser.add_argument(
        "--model", action="append", default=[], metavar="MODEL",
        help="another model to offer, first in the list: a folder, or owner/name on the Hub",
    )
    parser.add_argument("--host", default=None, help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, default=None, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--running", type=int, default=Limits().running, help="generations at once (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.running < 1:
        parser.error(f"--running {arguments.running}: must be 1 or more")
    chosen: dict[str, Path | str] = {_name(given): given for given in arguments.model}
    service = Service({**chosen, **{k: v for k, v in shipped_models().items() if k not in chosen}}, ASSETS / "traces",
                      Limits(running=arguments.running))
    try:
        if service.names():
            print(service.open(service.names()[0]).describe(), flush=True)
    except UserError as error:
        parser.error(str(error))
    ui.build(service).launch(
        server_name=arguments.host, server_port=arguments.port, css=css(), theme=_theme(),
        footer_links=["api"], max_file_size="5mb",
    )


if __name__ == "__main__":
    main()
