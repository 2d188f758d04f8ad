"""Take the README's pictures of every tab in headless Chromium.

    PYTHONPATH=. python assets/make_pictures.py [--out assets/pictures]

Starts `app.py` on a free port and uses it as a visitor would. Explore is taken in the middle of a run in which p was
moved twice, on a desktop (light and dark) and on a phone. Needs Playwright and Debian's chromium.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from app.headless import ROOT, launch, served

DESKTOP, PHONE = {"width": 1280, "height": 1240}, {"width": 390, "height": 844}
PROMPT = "Write a bedtime story called `The Lantern in the Snow`."


def explore(page: Any) -> None:
    """A run in which p is moved twice, and a token looked at closely."""
    box = page.locator("#p input[type=number]")
    for value, columns in ((0.2, 60), (0.5, 90), (0.8, 150)):
        box.fill(str(value))
        box.press("Enter")
        if columns == 60:
            run = page.locator(".mod-canvas").get_attribute("data-run")
            page.click("#generate")
            page.wait_for_function("t => document.querySelector('.mod-canvas').dataset.run !== t", arg=run)
        page.wait_for_function("n => +document.querySelector('.mod-canvas').dataset.columns > n", arg=columns)
    page.click("#stop")
    page.locator(".mod-story [data-column='120']").click()


def chat(page: Any) -> None:
    """Two turns."""
    for message in (PROMPT, "Tell me another one."):
        page.locator("#chat-message textarea").fill(message)
        page.click("#chat-send")
        page.wait_for_timeout(500)
        _until(page, "chat-status", "Done")


def sweep(page: Any) -> None:
    """The sample over eleven thresholds."""
    page.click("#sweep-go")
    _until(page, "sweep-status", "Done")


def convert(page: Any) -> None:
    """An estimate before anything is started."""
    page.locator("#convert-data input, #convert-data textarea").fill("assets/sample.txt")
    page.click("#convert-ask")
    _until(page, "convert-status", "Estimated")


def benchmark(page: Any) -> None:
    """The pair on the clock, and a larger shape on paper."""
    page.click("#bench-go")
    _until(page, "bench-status", "Done")


def model(page: Any) -> None:
    """The shipped model, loaded and described."""
    page.click("#model-load")
    _until(page, "model-status", "MoD layers")


def about(page: Any) -> None:
    """As it is."""


TABS: dict[str, Callable[[Any], None]] = {
    "Explore": explore, "Chat": chat, "Sweep": sweep, "Convert": convert, "Benchmark": benchmark, "Model": model,
    "About": about,
}


def _until(page: Any, element: str, word: str) -> None:
    page.wait_for_function(
        "([id, word]) => document.getElementById(id).innerText.includes(word)", arg=[element, word], timeout=300_000
    )


def take(browser: Any, address: str, tab: str, path: Path, theme: str = "light", size: Any = None) -> None:
    """One picture of one tab."""
    size = size or DESKTOP
    context = browser.new_context(viewport=size, device_scale_factor=1.5)
    page = context.new_page()
    page.goto(f"{address}/?__theme={theme}&new_tokens=600")
    page.wait_for_selector("#generate")
    page.wait_for_timeout(2500)
    if tab != "Explore":
        page.get_by_role("tab", name=tab, exact=True).click()
    TABS[tab](page)
    page.wait_for_timeout(1200)
    page.screenshot(path=path, full_page=tab != "Explore" or size is PHONE)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as spare, served("--converted", spare) as address, sync_playwright() as driver
    ):
        browser = launch(driver)
        take(browser, address, "Explore", out / "explore-dark.png", "dark")
        take(browser, address, "Explore", out / "explore-phone.png", size=PHONE)
        for tab in TABS:
            take(browser, address, tab, out / f"{tab.lower()}.png")
        browser.close()


if __name__ == "__main__":
    main()
