"""The app in a process of its own, and headless Chromium to look at it: for tests, pictures and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")


def free_port() -> int:
    """A port on loopback that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(*flags: str, log: IO[str] | None = None, seconds: float = 120) -> Iterator[str]:
    """The address of the app as ``python app.py`` starts it with these flags, until the context ends.

    Raises:
        RuntimeError: it ended, or did not answer within ``seconds``.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    command = [sys.executable, "app.py", "--port", str(port), *flags]
    output = subprocess.DEVNULL if log is None else log
    app = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        await_answer(address, lambda: app.poll() is None, seconds)
        yield address
    finally:
        app.terminate()
        app.wait(60)


def await_answer(address: str, alive: Callable[[], bool], seconds: float = 120) -> None:
    """Return when the app answers at its address.

    Raises:
        RuntimeError: its process ended, or it did not answer within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not _answers(address):
        if not alive() or time.monotonic() > end:
            raise RuntimeError(f"the app did not start at {address}")
        time.sleep(0.2)


def chromium() -> str | None:
    """Where Chromium is installed, if it is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def launch(driver: Any) -> Any:
    """Headless Chromium through a Playwright driver."""
    return driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as answer:
        return bool(answer.status == 200)
    return False
