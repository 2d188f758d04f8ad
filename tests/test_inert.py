"""HTML from strangers stays text: prompts, tokens, traces, titles, cards and model names, tried in the browser."""

from __future__ import annotations

import json
from urllib.parse import urlencode

import pytest
from browsing import IN_A_BROWSER, columns, visiting, wait_until
from talkers import talker

from app.headless import served
from modification.trace import MOST_TEXT

pytestmark = IN_A_BROWSER
PAYLOADS = [
    "<script>window.__hit=1</script>", "<img src=x onerror=window.__hit=1>", "<svg onload=window.__hit=1>",
    "<svg><script>window.__hit=1</script></svg>", "<iframe srcdoc='<script>parent.__hit=1</script>'></iframe>",
    "<a href=javascript:window.__hit=1>x</a>", "[x](javascript:window.__hit=1)",
    "\"><img src=x onerror=window.__hit=1>",
    "'-window.__hit=1-'", "</textarea><img src=x onerror=window.__hit=1>", "<details open ontoggle=window.__hit=1>",
    "<math><mtext><script>window.__hit=1</script></mtext></math>", "<style>@import 'javascript:window.__hit=1'</style>",
    "<body onload=window.__hit=1>", "<input autofocus onfocus=window.__hit=1>",
    "{{constructor.constructor('__hit=1')()}}",
    "${window.__hit=1}", "<!--><img src=x onerror=window.__hit=1>-->", "]]><img src=x onerror=window.__hit=1>",
    "<object data=javascript:window.__hit=1>", "<form><button formaction=javascript:window.__hit=1 autofocus>",
    "\u202e<img src=x onerror=window.__hit=1>", "&lt;img src=x onerror=window.__hit=1&gt;",
    "$$\\href{javascript:window.__hit=1}{x}$$", "<link rel=stylesheet href=javascript:window.__hit=1>",
]
ALL = "\n\n".join(PAYLOADS)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """An app that offers a model with a hostile card and folder name."""
    root = tmp_path_factory.mktemp("hostile")
    log = (root / "log").open("w")
    folder = talker(root / "m <img src=x onerror=window.__hit=1>", chat=True, context=4096)
    (folder / "README.md").write_text(f"---\ntitle: x\n---\n# Card\n\n{ALL}\n")
    with log, served("--model", str(folder), "--converted", str(root / "c"), log=log) as address:
        yield address


def inert(page) -> None:
    """Nothing ran, and nothing of a payload became an element."""
    page.wait_for_timeout(300)
    assert page.evaluate("window.__hit") is None
    for selector in ("img[src=x]", "svg[onload]", "[onerror]", "iframe[srcdoc]", "[ontoggle]", "a[href^=javascript]"):
        assert page.locator(selector).count() == 0, selector


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_what_strangers_write_stays_text(window, hostile, tmp_path):
    """On one page, so that one app will do; then what a link carries, and what lies in the browser's memory."""
    with visiting(window, hostile) as page:
        traces_are_text(page, tmp_path)
        prompts_and_tokens_are_text(page)
        cards_and_names_are_inert(page)
        chats_are_inert(page)
    link = urlencode({"prompt": PAYLOADS[1], "model": PAYLOADS[2], "p": PAYLOADS[0]})
    with visiting(window, f"{hostile}/?{link}") as page:
        assert page.locator("#prompt textarea").input_value() == PAYLOADS[1]
        inert(page)


def prompts_and_tokens_are_text(page):
    """The story, the heatmap's labels and the inspector show what was typed, as it was typed."""
    page.locator("#prompt textarea").fill(ALL[:1500])
    page.click("#generate")
    wait_until(lambda: columns(page) > 900)
    wait_until(lambda: "<img src=x onerror" in page.locator(".mod-story").inner_text())
    page.locator(".mod-story span").nth(20).click()
    inert(page)


def traces_are_text(page, tmp_path):
    """Titles, token texts and likely tokens of a file that somebody sends."""
    step = {"tokens": [1], "logprobs": [-0.1], "scores": [[0.5], [0.5]], "routed": [[1], [0]], "p": 0.5,
            "kv": [1, 1, 2], "seconds": 0.1, "prefill": False, "likely": [[1, -0.1], [2, -0.2]]}
    trace = {
        "format": 1, "depth": 4, "mod_layers": [1, 2], "texts": PAYLOADS, "steps": [step] * len(PAYLOADS),
        "info": {"title": ALL[:MOST_TEXT], "prompt": ALL, "likely": [[PAYLOADS[0], PAYLOADS[1]]] * len(PAYLOADS)},
    }
    (tmp_path / "t.json").write_text(json.dumps(trace))
    with page.expect_file_chooser() as chooser:
        page.click("#load-trace")
    chooser.value.set_files(tmp_path / "t.json")
    wait_until(lambda: columns(page) == len(PAYLOADS) or "can't be shown" in page.locator("#status").inner_text())
    assert columns(page) == len(PAYLOADS), page.locator("#status").inner_text()
    for at in range(0, len(PAYLOADS), 5):
        page.locator(".mod-story span").nth(at).click()
    inert(page)


def cards_and_names_are_inert(page):
    """A model's card, its folder's name, and what the page says of both."""
    open_tab(page, "Model")
    page.click("#model-load")
    wait_until(lambda: "parameters" in page.locator("#model-status").inner_text())
    page.get_by_role("button", name="Model card").click()
    wait_until(lambda: "Card" in page.locator("#model-card").inner_text())
    inert(page)


def chats_are_inert(page):
    """Messages and answers on both sides."""
    open_tab(page, "Chat")
    page.locator("#chat-message textarea").fill(ALL[:600])
    page.click("#chat-send")
    wait_until(lambda: "Done" in page.locator("#chat-status").inner_text())
    inert(page)
