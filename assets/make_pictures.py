"""Take the README's pictures of the app in headless Chromium.

    python assets/make_pictures.py [--out assets/pictures]

Starts `app.py` on a free port, generates, moves p twice, and takes the Explore tab on a desktop (light and
dark) and on a phone. Needs Playwright and Debian's chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SHOTS = (
    ("explore", "light", {"width": 1280, "height": 860}),
    ("explore-dark", "dark", {"width": 1280, "height": 860}),
    ("explore-phone", "light", {"width": 390, "height": 844}),
)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The running app's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    server = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=2).close()
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def take(browser: Any, address: str, path: Path, theme: str, size: dict[str, int]) -> None:
    """One picture, in the middle of a run in which p was moved twice."""
    context = browser.new_context(viewport=size, device_scale_factor=1.5)
    page = context.new_page()
    page.goto(f"{address}/?__theme={theme}")
    page.wait_for_selector("#generate")
    box = page.locator("#p input[type=number]")
    for value, columns in ((0.2, 75), (0.5, 110), (0.8, 150)):
        box.fill(str(value))
        box.press("Enter")
        if columns == 75:
            run = page.locator(".mod-canvas").get_attribute("data-run")
            page.click("#generate")
            page.wait_for_function("t => document.querySelector('.mod-canvas').dataset.run !== t", arg=run)
        page.wait_for_function("n => +document.querySelector('.mod-canvas').dataset.columns > n", arg=columns)
    page.screenshot(path=path, full_page=size["width"] < 500)
    page.click("#stop")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with serving() as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, theme, size in SHOTS:
            take(browser, address, out / f"{name}.png", theme, size)
        browser.close()


if __name__ == "__main__":
    main()
