"""The app in headless Chromium: what a newcomer does, seen from the page."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MODELS = sorted((ROOT / "assets").glob("*-MoD/config.json"))
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not MODELS, reason="no MoD model is shipped in assets/"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The app as `python app.py` starts it, one generation at a time so that a queue can be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("app") / "log").open("w")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "0", "GRADIO_IS_E2E_TEST": "1"}
    command = [sys.executable, "app.py", "--port", str(port), "--running", "1"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(address) or server.poll() is not None, 120)
        assert server.poll() is None, Path(log.name).read_text()
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, url):
    """A fresh visitor on the page; the test fails if the page logs an error."""
    with visitor(browser, url) as seen:
        yield seen


class visitor:
    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page, self.errors = self.context.new_page(), []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(url)
        self.page.wait_for_selector("#generate")

    def __enter__(self):
        return self.page

    def __exit__(self, *failure):
        self.context.close()
        assert failure[0] or not self.errors, self.errors


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


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


def test_the_page_opens_on_a_recorded_run(page):
    """Something to see before any generation: text, painted canvas, figures."""
    wait_until(lambda: columns(page) > 50)
    assert pixels(page) > 5
    assert figure(page, "load").endswith("%")
    assert "recorded" in status(page)
    assert len(answer(page)) > 100


def test_a_prompt_streams_and_the_figures_follow(page):
    start(page)
    seen = columns(page)
    wait_until(lambda: columns(page) > seen + 10)
    assert re.fullmatch(r"\d+\.\d tok/s", figure(page, "speed"))
    assert re.fullmatch(r"[\d.]+ [KM]?B", figure(page, "kv"))
    assert re.fullmatch(r"\d+%", figure(page, "saved"))
    assert "Streaming" in status(page)
    page.click("#stop")


def test_p_moved_in_mid_generation_changes_the_load(page):
    start(page, p=0)
    assert figure(page, "load") == "100%"
    set_p(page, 0.9)
    wait_until(lambda: float(figure(page, "load")[:-1]) < 90)
    assert "tok/s" in figure(page, "speed")
    page.click("#stop")


def test_stop_stops_and_frees_the_model(page):
    start(page)
    page.click("#stop")
    wait_until(lambda: "Stopped" in status(page))
    time.sleep(0.5)
    seen = columns(page)
    time.sleep(1.0)
    assert columns(page) == seen
    start(page)
    page.click("#stop")


def test_a_second_visitor_waits_is_told_so_and_gets_a_text_of_their_own(browser, url):
    with visitor(browser, url) as first, visitor(browser, url) as second:
        start(first, p=0)
        second.locator("#prompt textarea").fill("Write a campfire story called `The Light on the Pond`.")
        set_p(second, 0.8)
        second.click("#generate")
        wait_until(lambda: "in line" in status(second) or "Waiting" in status(second))
        first.click("#stop")
        wait_until(lambda: "Streaming" in status(second) and columns(second) > 30)
        assert float(figure(second, "load")[:-1]) < 60
        assert figure(first, "load") == "100%"
        second.click("#stop")


def test_closing_the_page_frees_the_model(browser, url):
    with visitor(browser, url) as first:
        start(first)
    with visitor(browser, url) as second:
        second.click("#generate")
        wait_until(lambda: "Streaming" in status(second))
        second.click("#stop")


@pytest.mark.parametrize(("prompt", "sentence"), [("  ", "prompt is empty"), ("long " * 4000, "context of 2,048")])
def test_a_bad_prompt_is_a_sentence_on_the_page(page, prompt, sentence):
    page.locator("#prompt textarea").fill(prompt)
    page.click("#generate")
    wait_until(lambda: sentence in status(page))


def test_a_folder_that_is_no_model_is_a_sentence_on_the_page(page, tmp_path):
    page.get_by_role("button", name="Model").click()
    page.locator("#model input").fill(str(tmp_path))
    page.locator("#model input").press("Enter")
    page.click("#generate")
    wait_until(lambda: "not a model folder" in status(page))


def test_hover_names_token_layer_score_and_decision(page):
    wait_until(lambda: columns(page) > 50)
    page.locator(".mod-canvas").hover(position={"x": 60, "y": 60})
    tip = page.locator(".mod-tip").inner_text()
    assert re.search(r"token \d+: .*\nlayer \d+: score 0?\.?\d+.* p [\d.]+ → (processed|skipped)", tip), tip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll(browser, url, theme):
    size = {"width": 390, "height": 844}
    with visitor(browser, f"{url}/?__theme={theme}", viewport=size) as page:
        wait_until(lambda: columns(page) > 50)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
