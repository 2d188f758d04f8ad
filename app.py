"""Start the app: ``python app.py``. On a Hugging Face Space this file is what runs."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import logging
import os
import signal
import threading
import time
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from app import ui
from app.calls import Calls
from app.errors import UserError
from app.service import Limits, Service, Zero, gpu_decorator
from app.views import css
from app.web import Guard, Quiet, Traffic

ASSETS = Path(__file__).resolve().parent / "assets"
DRAIN = 3.0  # seconds at least in which the last of an answer is sent
_M_ARENA_MAX = -8  # of mallopt(3)
PAGES = 500  # open ones, and programs' calls, whose settings Gradio keeps (0.4 MB each); then the oldest go
PATIENCE = 30  # seconds that answers under way may take once the app is told to end


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
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME"),
        help="address to serve on (default: GRADIO_SERVER_NAME, or this machine only)",
    )
    parser.add_argument("--port", type=int, default=None, help="port (default: the first free one from 7860)")
    _limit_flags(parser)
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
    if arguments.mcp and importlib.util.find_spec("mcp") is None:
        parser.error('--mcp needs another package: pip install "gradio[mcp]"')
    public = arguments.public or (not arguments.trusted and not _at_home(arguments.host))
    _share_arenas()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("modification").setLevel(logging.INFO)
    service = Service(
        listed_models(arguments.model), ASSETS / "traces", _limits(arguments, parser, public), arguments.converted,
        Zero(decorate) if (decorate := gpu_decorator()) else None,
    )
    try:
        if service.names():
            print(service.open(service.names()[0]).describe(), flush=True)
    except UserError as error:
        parser.error(str(error))
    service.keep_tidy()
    _serve(service, arguments)


def _share_arenas(most: int = 2) -> None:
    """Let glibc's malloc keep so many arenas: with one a thread, what many users' threads freed piles up in them."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's malloc
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, most)


def _limit_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a limit, named and explained as users meet it."""
    usual = Limits()
    for flag, value, says in (
        ("--running", usual.running, "requests at work at once; generations of one model are decoded together"),
        ("--waiting", usual.waiting, "requests that may wait for a place"),
        ("--per-user", usual.each, "requests of one user, at work or waiting"),
        ("--new-tokens", usual.new_tokens, "longest answer, in tokens"),
        ("--prompt-tokens", usual.prompt_tokens, "longest prompt, in tokens"),
        ("--file-mb", usual.file_bytes // 10**6, "largest file that can be uploaded, in MB"),
        ("--trace-mb", usual.trace_bytes // 10**6, "largest trace that is read, in MB"),
        ("--minutes", int(usual.measuring // 60), "that a sweep or a benchmark may take"),
        ("--patience", PATIENCE, "seconds that answers under way may take once the app is told to end"),
        ("--cache-mb", 0, "keys and values of all sessions together, in MB; 0: a quarter of the free memory"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{says} (default: %(default)s)")
    parser.add_argument(
        "--folder", action="append", default=[], type=Path, metavar="FOLDER",
        help="model folders are opened only from here, links followed; may be repeated (default: from anywhere)",
    )


def _limits(arguments: argparse.Namespace, parser: argparse.ArgumentParser, public: bool) -> Limits:
    for name, least in (
        ("running", 1), ("waiting", 0), ("per_user", 1), ("new_tokens", 1), ("prompt_tokens", 1), ("file_mb", 1),
        ("trace_mb", 1), ("minutes", 1), ("patience", 0), ("cache_mb", 0),
    ):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be {least} or more")
    for folder in arguments.folder:
        if not folder.is_dir():
            parser.error(f"--folder {folder}: there is no such folder")
    return Limits(
        running=arguments.running, waiting=arguments.waiting, each=arguments.per_user, new_tokens=arguments.new_tokens,
        prompt_tokens=arguments.prompt_tokens, file_bytes=arguments.file_mb * 10**6,
        trace_bytes=arguments.trace_mb * 10**6, measuring=60.0 * arguments.minutes,
        cache_bytes=arguments.cache_mb * 10**6, folders=tuple(folder.resolve() for folder in arguments.folder),
        free_models=not public, convert=not public,
    )


def _serve(service: Service, arguments: argparse.Namespace) -> None:
    """Serve until told to end; then finish the answers under way."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    logging.getLogger("uvicorn.access").addFilter(Quiet())
    demo, traffic = ui.build(service, ASSETS), Traffic()
    calls = Calls(demo, service.limits.longest_text)
    demo.launch(
        server_name=arguments.host, server_port=arguments.port, css=css(), theme=_theme(), footer_links=["api"],
        share=False, ssr_mode=False,  # whatever the environment says: nothing goes round the guard
        max_file_size=service.limits.file_bytes, state_session_capacity=PAGES, mcp_server=arguments.mcp,
        prevent_thread_lock=True,
        max_threads=2 * (service.limits.running + service.limits.waiting) + 40,  # a program's call holds one all along
        app_kwargs={"middleware": [Middleware(Guard, service=service, traffic=traffic, calls=calls)]},
    )
    asked.wait()
    print(f"Ending: answers under way are finished, {arguments.patience} seconds at most.", flush=True)
    until = time.monotonic() + arguments.patience
    whole = service.shut_down(arguments.patience)
    traffic.drain(max(DRAIN, until - time.monotonic()))
    demo.close(verbose=False)
    print("Ended." if whole else "Ended; some answers were cut short.", flush=True)
    if not whole:
        os._exit(0)  # the interpreter's own end kills threads amid C++ code, and the process with them


if __name__ == "__main__":
    main()
