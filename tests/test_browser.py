"""Explore in headless Chromium: what a newcomer does, seen from the page."""

import json
import re
import time

import pytest
from browsing import (
    IN_A_BROWSER,
    MODELS,
    PHONE,
    STORY,
    answer,
    columns,
    few_tokens,
    figure,
    finished,
    pixels,
    run_id,
    set_p,
    start,
    status,
    visiting,
    visitor,
    wait_until,
)

pytestmark = IN_A_BROWSER


def long_runs(url):
    return f"{url}/?new_tokens=1500"


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
    assert re.match("Streaming|Finished|Reached", status(page)), "a short text may be through already"
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


def test_a_second_visitor_waits_is_told_so_and_gets_a_text_of_their_own(page, browser, url):
    first = page
    with visitor(browser, long_runs(url)) as second:
        start(first, p=0)
        second.locator("#prompt textarea").fill("Write a bedtime story called `The Quiet Harbour`.")
        set_p(second, 0.8)
        before = run_id(second)
        second.click("#generate")
        wait_until(lambda: "in line" in status(second) or "Waiting" in status(second))
        first.click("#stop")
        wait_until(lambda: run_id(second) != before and columns(second) > 30)
        assert float(figure(second, "load")[:-1]) < 60
        assert figure(first, "load") == "100%"


def test_closing_the_page_frees_the_model(page, browser, url):
    with visitor(browser, long_runs(url)) as first:
        start(first)
    page.click("#generate")
    wait_until(lambda: "Streaming" in status(page))
    page.click("#stop")


def test_a_bad_prompt_or_model_is_a_sentence_on_the_page(page, tmp_path):
    for prompt, sentence in (("  ", "prompt is empty"), ("long " * 4000, "context of 2,048")):
        page.locator("#prompt textarea").fill(prompt)
        page.click("#generate")
        wait_until(lambda sentence=sentence: sentence in status(page))
    page.locator("#prompt textarea").fill(STORY)
    page.locator("#model input").fill(str(tmp_path))
    page.locator("#model input").press("Enter")
    page.click("#generate")
    wait_until(lambda: "not a model folder" in status(page))


def test_hover_names_token_layer_score_and_decision(page):
    page.locator(".mod-canvas").hover(position={"x": 60, "y": 60})
    tip = page.locator(".mod-tip").inner_text()
    assert re.search(r"token \d+: .*\nlayer \d+: score 0?\.?\d+.* p [\d.]+ → (processed|skipped)", tip), tip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll(window, url, theme):
    with visiting(window, f"{url}/?__theme={theme}", PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def drawing(page):
    return page.evaluate("document.querySelector('.mod-canvas').toDataURL()")


def click_token(page, column):
    page.locator(f".mod-story [data-column='{column}']").click()


def test_a_clicked_token_shows_scores_probability_and_alternatives(page):
    """The inspector: a chart over the layers, the decision, the likeliest five, the chosen one among them."""
    click_token(page, columns(page) - 5)
    inspector = page.locator(".mod-inspector")
    text = inspector.inner_text()
    assert re.search(r"Ran through \d+ of \d+ layers at p = [\d.]+ \(measured\)", text)
    assert re.search(r"Probability [\d.<% ]+\(measured\)", text)
    assert inspector.locator(".mod-likely li").count() == 5
    assert inspector.locator("circle").count() == json.loads(MODELS[0].read_text())["num_hidden_layers"] - 2  # inner
    assert "ran" in inspector.locator("svg title").text_content()


def test_arrow_keys_walk_through_text_and_heatmap(page):
    """Right goes on, up and down change the layer, Home and End jump, Escape lets go."""
    heading = page.locator(".mod-inspector h3")
    page.locator(".mod-canvas").focus()
    page.keyboard.press("Home")
    assert heading.inner_text().startswith("Token 0:")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert heading.inner_text().startswith("Token 2:")
    page.keyboard.press("ArrowDown")
    assert "Layer 2:" in page.locator(".mod-inspector").inner_text()
    page.locator(".mod-story").focus()
    page.keyboard.press("End")
    assert heading.inner_text().startswith(f"Token {columns(page) - 1}:")
    page.keyboard.press("Escape")
    assert heading.count() == 0


def test_a_preview_recolours_at_once_and_says_that_it_is_one(page):
    """Nothing is asked of the server; Actual takes it back."""
    before = drawing(page)
    asked = ["the page's own first calls"]
    page.on("request", lambda request: asked.append(request.url))
    while asked:  # their streams may open late
        asked.clear()
        page.wait_for_timeout(1000)
    page.locator("[data-tool=preview]").fill("0.95")
    wait_until(lambda: "Preview at p = 0.95" in page.locator(".mod-banner").inner_text())
    wait_until(lambda: drawing(page) != before)
    page.click("[data-tool=actual]")
    wait_until(lambda: not page.locator(".mod-banner").is_visible())
    wait_until(lambda: drawing(page) == before)
    assert not [url for url in asked if "queue" in url]


def test_every_mode_is_another_picture(page):
    """Scores, decisions, depth."""
    seen = [drawing(page)]
    for mode in ("decision", "depth"):
        page.locator("[data-tool=mode]").select_option(mode)
        wait_until(lambda: drawing(page) not in seen)
        assert pixels(page) > 1
        seen.append(drawing(page))


def test_zoom_and_fit_change_how_much_is_seen(page):
    """Fit shows the whole run without scrolling; zooming in takes more room."""
    width = "document.querySelector('.mod-scroll').scrollWidth"
    whole = page.evaluate(width)
    page.click("[data-tool=fit]")
    wait_until(lambda: page.evaluate("(() => { const s = document.querySelector('.mod-scroll');"
                                     "return s.scrollWidth <= s.clientWidth + 30; })()"))
    for _ in range(4):
        page.click("[data-tool=in]")
    wait_until(lambda: page.evaluate(width) > whole)


def test_layers_that_never_ran_are_pointed_out(page):
    """In words, below the map."""
    set_p(page, 1)
    few_tokens(page, 40)
    page.click("#generate")
    finished(page)
    wait_until(lambda: "never ran in this run" in page.locator(".mod-layers").inner_text())


def test_two_runs_are_compared_at_their_first_difference(page):
    """Pin one, make another at another p: the page says where their texts part."""
    few_tokens(page, 60)
    set_p(page, 0)
    page.click("#generate")
    wait_until(lambda: "Starting" in status(page) or "Streaming" in status(page) or "Reached" in status(page))
    finished(page)
    page.click("[data-tool=pin]")
    assert "pinned" in page.locator(".mod-banner").inner_text()
    set_p(page, 0.8)
    before = run_id(page)
    page.click("#generate")
    wait_until(lambda: run_id(page) != before)
    finished(page)
    page.locator("[data-tool=mode]").select_option("difference")
    wait_until(lambda: re.search(r"first difference at token \d+", page.locator(".mod-banner").inner_text()))
    assert "ran in the pinned run alone" in page.locator(".mod-legend").inner_text()
    wait_until(lambda: pixels(page) > 2)


def load_trace(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#load-trace")
    chooser.value.set_files(path)


def test_a_run_is_exported_and_its_trace_loads_back(page, tmp_path):
    """PNG, CSV, JSON; the JSON is the engine's trace, and the page shows it again."""
    from modification import RoutingTrace

    shown = columns(page)
    saved = {}
    for kind in ("png", "csv", "json"):
        with page.expect_download() as download:
            page.click(f"[data-tool={kind}]")
        saved[kind] = tmp_path / f"run.{kind}"
        download.value.save_as(saved[kind])
    assert saved["png"].read_bytes().startswith(b"\x89PNG")
    rows = saved["csv"].read_text().count("\n")
    assert rows >= shown + 1
    trace = RoutingTrace.from_json(saved["json"].read_text())
    assert len(trace.tokens) == shown
    assert trace.steps[-1].likely
    load_trace(page, saved["json"])
    wait_until(lambda: "loaded from a file" in status(page))
    assert columns(page) == shown


def test_a_broken_trace_is_a_sentence_and_the_run_stays(page, tmp_path):
    """What was shown before is still there."""
    shown = columns(page)
    layers = {"format": 1, "depth": 2, "mod_layers": [9], "texts": [], "info": {}, "steps": []}
    for content, sentence in (
        ("not json", "not a routing trace"), (json.dumps(layers), "MoD layers"), ("{}", "not a routing trace"),
    ):
        broken = tmp_path / "broken.json"
        broken.write_text(content)
        load_trace(page, broken)
        wait_until(lambda sentence=sentence: sentence in status(page))
        assert columns(page) == shown


def test_a_snippet_reproduces_the_run(page):
    """The Python that the page offers gives the text that the page shows."""
    few_tokens(page, 30)
    page.locator("#prompt textarea").fill(STORY)
    before = run_id(page)
    page.click("#generate")
    wait_until(lambda: run_id(page) != before)
    finished(page)
    text = answer(page)
    page.get_by_role("button", name="Python that reproduces the run").click()
    wait_until(lambda: "modification.generate" in page.locator("#snippet .cm-content").inner_text())
    code = page.locator("#snippet .cm-content").inner_text()
    assert run_snippet(code).strip() == text.strip()


def run_snippet(code):
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "snippet", "exec"), {})
    return out.getvalue()


def test_settings_survive_a_reload_and_travel_in_a_link(window, url):
    """p and seed come back after a reload; a stranger with the link gets them too."""
    with visiting(window, url) as page:
        set_p(page, 0.73)
        page.get_by_role("button", name="Share these settings").click()
        page.wait_for_timeout(300)
        page.click("#link")
        wait_until(lambda: "p=0.73" in page.locator("#link-text textarea, #link-text input").first.input_value())
        link = page.locator("#link-text textarea, #link-text input").first.input_value()
        page.reload()
        wait_until(lambda: page.locator("#p input[type=number]").input_value() == "0.73")
    with visiting(window, link) as stranger:
        wait_until(lambda: stranger.locator("#p input[type=number]").input_value() == "0.73")


def test_a_shift_of_one_layer_closes_it(page):
    """p per layer: a shift of +1 makes that layer skip everything, and the others go on."""
    page.get_by_role("button", name="p per layer").click()
    box = page.get_by_label("number input for Layer 2", exact=True)
    box.fill("1")
    box.press("Enter")
    page.wait_for_timeout(400)
    few_tokens(page, 40)
    set_p(page, 0.3)
    before = run_id(page)
    page.click("#generate")
    wait_until(lambda: run_id(page) != before)
    finished(page)
    wait_until(lambda: re.search(r"\b2\b.*never ran", page.locator(".mod-layers").inner_text()))
    assert float(figure(page, "load")[:-1]) > 20


def test_keyboard_alone_generates_and_stops(page):
    """Tab from the prompt to the button, Enter starts, Tab and Enter stop."""
    page.locator("#prompt textarea").focus()
    before = run_id(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: run_id(page) != before and columns(page) > 30)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: "Stopped" in status(page))
    time.sleep(0.5)
