"""The app in headless Chromium: a server, visitors, and what they look at."""

import contextlib
import time
from urllib.parse import urljoin

import pytest
from builders import REPO

from app.headless import chromium

MODELS = sorted((REPO / "assets").glob("*-MoD/config.json"))
NEEDS_MODEL = pytest.mark.skipif(not MODELS, reason="no MoD model is shipped in assets/")
IN_A_BROWSER = [
    pytest.mark.browser, NEEDS_MODEL,
    pytest.mark.skipif(not chromium(), reason="Chromium is not installed (Debian: apt-get install chromium)"),
]
STORY = "Write a bedtime story called `The Lantern in the Snow`."
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextlib.contextmanager
def visitor(browser, url):
    """Somebody with a browser of their own."""
    with browser.new_context() as context, visiting(context.new_page(), url) as page:
        yield page
        page.close()  # whatever it is at


@contextlib.contextmanager
def visiting(window, url, size=DESKTOP):
    """Somebody who comes to the page in a window that may have been another's, of whom nothing is left but the scripts
    that were fetched and compiled; an error that the page logs is a failure, and so is a dialog."""
    errors = []

    def note(error):
        # Gradio aborts its own stream when a page is left.
        if "AbortError" not in error and "Connection errored out" not in error:
            errors.append(error)

    listeners = {
        "pageerror": lambda error: note(str(error)),
        "console": lambda message: message.type == "error" and note(message.text),
        "dialog": lambda dialog: (note(f"a dialog: {dialog.message}"), dialog.dismiss()),
    }
    for event, listener in listeners.items():
        window.on(event, listener)
    try:
        window.set_viewport_size(size)
        window.goto(url)
        window.wait_for_selector("#generate")
        wait_until(lambda: columns(window) > 50)  # the recorded example: scripts are at work
        yield window
    finally:
        if not window.is_closed():
            window.goto(urljoin(url, "/health"))
            window.evaluate("localStorage.clear(), sessionStorage.clear()")
        for event, listener in listeners.items():
            window.remove_listener(event, listener)
    assert not errors, errors


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def columns(page):
    return int(page.locator(".mod-canvas").get_attribute("data-columns") or 0)


def run_id(page):
    return page.locator(".mod-canvas").get_attribute("data-run")


def figure(page, name):
    return page.locator(f"[data-figure={name}]").inner_text()


def status(page):
    return page.locator("#status").inner_text()


def set_p(page, value):
    box = page.locator("#p input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def answer(page):
    return "".join(page.locator(".mod-story span:not(.prompt)").all_inner_texts())


def start(page, prompt="Write a bedtime story called `The Lantern in the Snow`.", p=0.5):
    page.locator("#prompt textarea").fill(prompt)
    set_p(page, p)
    before = run_id(page)
    page.click("#generate")
    wait_until(lambda: run_id(page) != before and columns(page) > 30)


def pixels(page):
    """How many different colours the heatmap canvas shows."""
    return page.evaluate("""() => {
        const c = document.querySelector('.mod-canvas');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
        return seen.size; }""")


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def drawn(page):
    """Wait until no figure stands empty: the page fetches its plotting library when the first is shown."""
    wait_until(lambda: page.locator(".empty:visible").count() == 0)


def line(page, element):
    """The status line of a tab."""
    return page.locator(f"#{element}").inner_text()


def finished(page, seconds=90):
    wait_until(lambda: "Reached" in status(page) or "Finished" in status(page), seconds)


def few_tokens(page, count, accordion="Sampling"):
    """Ask for short runs."""
    page.get_by_role("button", name=accordion).first.click()
    box = page.get_by_label("number input for New tokens, at most").first
    box.fill(str(count))
    box.press("Enter")
