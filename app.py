"""Start the app: ``python app.py``. On a Hugging Face Space this file is what runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import gradio as gr

from app import ui
from app.errors import UserError
from app.service import Limits, Service
from app.views import css

ASSETS = Path(__file__).resolve().parent / "assets"


def shipped_models() -> dict[str, Path]:
    """Model folders under ``assets/``, by name, MoD models first."""
    found = sorted(ASSETS.glob("*/config.json"), key=lambda path: (not path.parent.name.endswith("-MoD"), path))
    return {path.parent.name: path.parent for path in found}


def listed_models(given: list[str]) -> dict[str, Path | str]:
    """Models given by flag, then those that ship."""
    chosen: dict[str, Path | str] = {_name(model): model for model in given}
    return {**chosen, **{name: path for name, path in shipped_models().items() if name not in chosen}}


def _name(model: str) -> str:
    """How a model given by flag is listed: a folder by its last part, a Hub id as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _at_home(host: str | None) -> bool:
    """Whether only this machine reaches an address."""
    return host in (None, "localhost", "::1") or str(host).startswith("127.")


def _theme() -> gr.themes.Base:
    """System fonts: nothing is fetched from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Soft(primary_hue="blue", **fonts)
    # Darker (in the dark: lighter) than the theme's own, whose small print falls short of a contrast of 4.5.
    return theme.set(
        body_text_color_subdued="#525c69", body_text_color_subdued_dark="#a9b3c0", block_title_text_color="#1d4ed8",
        block_label_text_color="#1d4ed8", block_info_text_color="#525c69", block_info_text_color_dark="#a9b3c0",
        button_primary_background_fill="#1d4ed8", button_primary_background_fill_hover="#1e40af",
        checkbox_label_background_fill_selected="#1d4ed8",
        link_text_color_dark="#93c5fd", link_text_color_hover_dark="#bfdbfe", link_text_color_visited_dark="#c4b5fd",
    )


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
    parser.add_argument(
        "--converted", type=Path, default=Path("converted"),
        help="folder for models that are converted in the app (default: ./%(default)s)",
    )
    parser.add_argument(
        "--public", action="store_true", default=bool(os.environ.get("SPACE_ID")),
        help="only listed models open, and nothing is converted; on by itself on a Space and with --host",
    )
    parser.add_argument(
        "--trusted", action="store_true",
        help="with --host: everybody who reaches this address may open any folder and convert models",
    )
    parser.add_argument("--mcp", action="store_true", help="offer generate, chat, sweep and estimate as MCP tools too")
    arguments = parser.parse_args()
    if arguments.running < 1:
        parser.error(f"--running {arguments.running}: must be 1 or more")
    if arguments.mcp and importlib.util.find_spec("mcp") is None:
        parser.error('--mcp needs another package: pip install "gradio[mcp]"')
    public = arguments.public or (not arguments.trusted and not _at_home(arguments.host))
    limits = Limits(running=arguments.running, free_models=not public, convert=not public)
    service = Service(listed_models(arguments.model), ASSETS / "traces", limits, arguments.converted)
    try:
        if service.names():
            print(service.open(service.names()[0]).describe(), flush=True)
    except UserError as error:
        parser.error(str(error))
    service.keep_tidy()
    ui.build(service, ASSETS).launch(
        server_name=arguments.host, server_port=arguments.port, css=css(), theme=_theme(), footer_links=["api"],
        max_file_size="20mb", mcp_server=arguments.mcp,
    )


if __name__ == "__main__":
    main()
