"""Every other tab in headless Chromium, against the shipped pair; and the page as a whole, for eyes and assistants."""

import json
import re
from pathlib import Path

import pytest
from browsing import (
    IN_A_BROWSER,
    MODELS,
    PHONE,
    STORY,
    columns,
    drawn,
    few_tokens,
    figure,
    line,
    run_id,
    set_p,
    start,
    status,
    tab,
    visiting,
    visitor,
    wait_until,
)
from talkers import talker

pytestmark = IN_A_BROWSER

TABS = ("Explore", "Chat", "Sweep", "Convert", "Benchmark", "Model", "About")
TEXT = "Once there was a fox who lived by the river and counted the boats. " * 8


def say(page, message, tokens=24):
    """Send one message in Chat, with a seed, and wait for both answers."""
    tab(page, "Chat")
    if tokens:
        page.get_by_role("button", name="Sampling").last.click()
        page.locator("#chat-seed input").fill("0")
        box = page.get_by_label("number input for New tokens, at most").last
        box.fill(str(tokens))
        box.press("Enter")
    send(page, message)


def send(page, message):
    page.locator("#chat-message textarea").fill(message)
    before = turns(page)
    page.click("#chat-send")
    wait_until(lambda: turns(page) > before)
    settled(page)


def settled(page):
    wait_until(lambda: "Done" in line(page, "chat-status") and len(ended(page)) == 2)


def turns(page):
    return page.locator(".talk-user").count()


def ended(page):
    texts = page.locator(".talk-row").last.locator(".talk-figures").all_text_contents()
    return [text for text in texts if "Reached" in text or "Finished" in text]


def answers(page):
    return page.locator(".talk-row").last.locator(".talk-text").all_text_contents()


def test_two_models_answer_side_by_side_each_with_its_figures(page):
    """Speed, first token, load and cache under each answer; the MoD side did less; the parting is marked; the next turn
    runs its new tokens alone."""
    say(page, STORY)
    left, right = page.locator(".talk-figures").all_inner_texts()
    for text in (left, right):
        assert re.search(r"[\d.]+ tok/s · first token after [\d.]+ s · \d+ prompt tokens run · load \d+%", text)
        assert "KV" in text
    assert "load 100%" in left
    assert "load 100%" not in right
    assert page.locator("[data-name='0']").inner_text().endswith("every layer")
    assert re.search("part after|differ from|same", page.locator(".talk-note").last.inner_text())
    send(page, "And then?")
    figures = page.locator(".talk-figures").all_inner_texts()
    first, second = (int(re.search(r"(\d+) prompt tokens", text)[1]) for text in (figures[0], figures[2]))
    assert second < first


def test_regenerate_edit_undo_and_clear(page):
    """The same seed gives the same answer; edit brings the message back; undo and clear take turns away."""
    say(page, STORY)
    before = answers(page)
    page.click("#chat-again")
    wait_until(lambda: "Done" not in line(page, "chat-status"))
    settled(page)
    assert answers(page) == before
    page.click("#chat-edit")
    wait_until(lambda: turns(page) == 0)
    assert page.locator("#chat-message textarea").input_value() == STORY
    send(page, STORY)
    send(page, "Go on.")
    page.click("#chat-undo")
    wait_until(lambda: turns(page) == 1)
    page.click("#chat-clear")
    wait_until(lambda: turns(page) == 0)


def test_stop_keeps_what_was_said(page):
    """Both answers stay, marked as stopped, and the chat goes on."""
    tab(page, "Chat")
    page.locator("#chat-message textarea").fill(STORY)
    page.click("#chat-send")
    wait_until(lambda: turns(page) and len("".join(answers(page))) > 40)
    page.click("#chat-stop")
    wait_until(lambda: "Stopped" in line(page, "chat-status"))
    wait_until(lambda: page.locator(".talk-figures", has_text="Stopped").count() == 2)
    say(page, "And then?")


def test_a_blind_vote_hides_names_until_it_is_cast_and_is_counted(page):
    """No name and no figure gives a side away; the vote is tallied and can be saved."""
    tab(page, "Chat")
    page.locator("#chat-blind input").check()
    say(page, STORY)
    assert page.locator("[data-name='0']").inner_text() == "Side A"
    assert not page.locator(".talk-figures").first.is_visible()
    page.click("[data-vote='1']")
    assert "Storyteller" in page.locator("[data-name='1']").inner_text()
    assert page.locator(".talk-figures").first.is_visible()
    assert page.locator(".talk-tally").inner_text().startswith("1 blind vote")
    with page.expect_download() as download:
        page.click("[data-export=votes]")
    votes = json.loads(Path(download.value.path()).read_text())
    assert votes[0]["winner"] == votes[0]["right"]
    assert votes[0]["message"] == STORY


def test_a_sweep_draws_its_curves_and_hands_its_p_to_explore(page):
    """Eleven rows, three plots, a sentence with the best p, which one button carries over."""
    tab(page, "Sweep")
    page.locator("#sweep-text textarea").fill(TEXT)
    page.locator("#sweep-grid input, #sweep-grid textarea").fill("0, 0.3, 0.9")
    page.locator("#within input").fill("100")
    page.click("#sweep-go")
    wait_until(lambda: "Done" in line(page, "sweep-status"))
    assert page.locator("#sweep-table tbody tr").count() == 3
    wait_until(lambda: page.locator("#sweep-plot .js-plotly-plot").count() == 1)
    best = re.search(r"p = ([\d.]+) is the largest p within 100%", page.locator("#sweep-best").inner_text())[1]
    with page.expect_download() as download:
        page.click("#sweep-csv")
    assert Path(download.value.path()).read_text().count("\n") == 4
    page.click("#sweep-use")
    wait_until(lambda: page.locator("#generate").is_visible())
    wait_until(lambda: page.locator("#p input[type=number]").input_value() == best)


def test_a_bad_sweep_is_a_sentence(page):
    """Each says what to do."""
    tab(page, "Sweep")
    for text, grid, sentence in (
        ("", "0.5", "prompt is empty"), ("Too short.", "0.5", "at least 32"), (TEXT, "0.5, two", "'0.5, two'"),
        (TEXT, "1.5", "from 0 to 1"),
    ):
        page.locator("#sweep-text textarea").fill(text)
        page.locator("#sweep-grid input, #sweep-grid textarea").fill(grid)
        page.click("#sweep-go")
        wait_until(lambda sentence=sentence: sentence in line(page, "sweep-status"))


def test_a_benchmark_measures_the_pair(page):
    """Sides, speed-ups and ideals in a table and a plot."""
    tab(page, "Benchmark")
    page.locator("#bench-contexts input, #bench-contexts textarea").fill("32")
    page.locator("#bench-loads input, #bench-loads textarea").fill("0.5")
    page.get_by_label("Decode steps a round").fill("4")
    page.get_by_label("Rounds").fill("1")
    page.click("#bench-go")
    wait_until(lambda: "Done" in line(page, "bench-status"))
    rows = page.locator("#bench-table tbody tr").all_inner_texts()
    assert [row.split("\t")[1] for row in rows] == ["stock generate", "engine, p = 0", "load 0.5"]
    wait_until(lambda: page.locator("#bench-plot .js-plotly-plot").count() == 1)


def test_any_shape_is_estimated_as_its_controls_move(page):
    """Figures follow at once and are marked estimated; a shape that is not there is a sentence."""
    tab(page, "Benchmark")
    wait_until(lambda: page.locator("#paper-table tbody tr").count() > 5)
    before = page.locator("#paper-table").inner_text()
    assert "estimated" in before
    box = page.get_by_label("number input for Load of the MoD layers")
    box.fill("0.1")
    box.press("Enter")
    wait_until(lambda: page.locator("#paper-table").inner_text() != before)
    page.locator("#paper-shape input").fill("no-such-model")
    page.locator("#paper-shape input").press("Enter")
    wait_until(lambda: "neither a model folder" in line(page, "paper-status"))


def test_a_model_is_weighed_loaded_and_described(page):
    """Memory before loading; then layers, report and card; the page's model is that one."""
    tab(page, "Model")
    page.click("#model-ask")
    wait_until(lambda: re.search(r"needs about [\d.]+ MB \(estimated\); .* \(measured\). It fits",
                                 line(page, "model-status")))
    page.get_by_label("fp32", exact=True).first.check()
    page.click("#model-load")
    wait_until(lambda: "of them MoD layers" in line(page, "model-status"))
    layers = json.loads(MODELS[0].read_text())["num_hidden_layers"]
    assert page.locator("#model-layers tbody tr").count() == layers
    assert page.locator("#model input").input_value().endswith("[fp32]")
    page.get_by_role("button", name="Model card").click()
    wait_until(lambda: "any-p recipe" in page.locator("#model-card").text_content())


def test_a_model_that_cannot_be_loaded_is_a_sentence(page):
    """In the tab, as text, and the page goes on."""
    tab(page, "Model")
    for source, sentence in (
        ("/no/such/folder", "'/no/such/folder' is neither a folder here nor a Hub id"),
        ("<b>x</b>", "'<b>x</b>' is neither a folder here nor a Hub id"),
        ("nobody/no-such-model", "nobody/no-such-model"),
    ):
        page.locator("#source input").fill(source)
        page.locator("#source input").press("Enter")
        page.click("#model-load")
        wait_until(lambda sentence=sentence: sentence in line(page, "model-status"))
        assert not page.locator("#model-status b").count()


def test_a_conversion_is_estimated_watched_and_opened(page, tmp_path):
    """A small dense model on a little text: progress with loss and load, then the MoD model opens in Explore."""
    parent, text = talker(tmp_path / "small", chat=True, context=512, dense=True), tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{TEXT} {at}" for at in range(60)))
    tab(page, "Convert")
    page.locator("#convert-parent input").fill(str(parent))
    page.locator("#convert-parent input").press("Enter")
    page.locator("#convert-name input, #convert-name textarea").fill("tried-MoD")
    page.locator("#convert-data input, #convert-data textarea").fill(str(text))
    page.locator("#convert-tokens input").fill("2560")
    page.get_by_label("Tokens per row").fill("32")
    page.click("#convert-ask")
    wait_until(lambda: "(estimated" in page.locator("#convert-estimate").inner_text())
    page.click("#convert-go")
    wait_until(lambda: re.search(r"Step \d+ of 10: loss [\d.]+ nats/token, load \d+%", line(page, "convert-status"))
               or "Converted" in line(page, "convert-status"), 300)
    wait_until(lambda: "Converted" in line(page, "convert-status"), 300)
    page.click("#convert-open")
    wait_until(lambda: page.locator("#generate").is_visible())
    wait_until(lambda: page.locator("#model input").input_value() == "tried-MoD")
    few_tokens(page, 10)
    before = run_id(page)
    page.click("#generate")
    wait_until(lambda: run_id(page) != before and "Reached" in status(page))
    assert "tried-MoD" in page.locator(".mod-title").inner_text()


def test_a_conversion_without_a_text_is_a_sentence(page):
    """Nothing is started."""
    tab(page, "Convert")
    page.locator("#convert-data input, #convert-data textarea").fill("/no/such/text.jsonl")
    page.click("#convert-go")
    wait_until(lambda: "no text file at /no/such/text.jsonl" in line(page, "convert-status"))


def test_about_explains_with_the_equation(page):
    """Typeset, not as source."""
    tab(page, "About")
    wait_until(lambda: page.locator("#about .katex").count() > 0)
    assert "threshold p" in page.locator("#about").inner_text()


def test_settings_of_every_tab_survive_a_reload(page):
    """Chat's p and seed, a sweep's grid, the shape on paper."""
    tab(page, "Chat")
    box = page.locator("#chat-p input[type=number]")
    box.fill("0.85")
    box.press("Enter")
    tab(page, "Sweep")
    page.locator("#sweep-grid input, #sweep-grid textarea").fill("0.1, 0.2")
    tab(page, "Benchmark")
    page.locator("#bench-contexts input, #bench-contexts textarea").fill("64")
    page.locator("#bench-contexts input, #bench-contexts textarea").blur()
    page.wait_for_timeout(800)
    page.reload()
    page.wait_for_selector("#generate")
    wait_until(lambda: columns(page) > 50)
    tab(page, "Chat")
    wait_until(lambda: page.locator("#chat-p input[type=number]").input_value() == "0.85")
    tab(page, "Sweep")
    assert page.locator("#sweep-grid input, #sweep-grid textarea").input_value() == "0.1, 0.2"
    tab(page, "Benchmark")
    assert page.locator("#bench-contexts input, #bench-contexts textarea").input_value() == "64"


def test_a_chat_goes_by_keyboard_alone(page):
    """Type, Enter sends; Tab reaches Stop and the rest."""
    tab(page, "Chat")
    page.locator("#chat-message textarea").focus()
    page.keyboard.type("Hello there")
    page.keyboard.press("Enter")
    wait_until(lambda: turns(page) == 1)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: "Stopped" in line(page, "chat-status") or "Done" in line(page, "chat-status"))
    assert page.evaluate("document.activeElement.id") == "chat-stop"


def test_no_tab_scrolls_sideways_on_a_phone_and_axe_finds_nothing_serious(window, url):
    """390 px wide, each tab as it opens; a figure that is wider scrolls in its own box."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with visiting(window, url, PHONE) as page:
        for name in TABS:
            on_a_phone(page, name)
            drawn(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            for plot in page.locator(".js-plotly-plot:visible").all():
                hidden = plot.evaluate("""plot => { const box = plot.parentElement;
                    return box.scrollWidth > box.clientWidth + 1
                        && !['auto', 'scroll'].includes(getComputedStyle(box).overflowX); }""")
                assert not hidden, name
            assert not serious(axe, page), name


def serious(axe, page):
    """What axe finds that is."""
    found = axe.run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


def on_a_phone(page, name):
    """Tabs that have no room are in a menu."""
    if not page.get_by_role("tab", name=name, exact=True).is_visible():
        page.locator("#tabs .overflow-menu button").first.click()
    page.locator("#tabs").get_by_text(name, exact=True).last.click()
    page.wait_for_timeout(500)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(window, url, theme):
    """Names, roles and contrast, with figures on show."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with visiting(window, f"{url}/?__theme={theme}") as page:
        page.locator(".mod-story [data-column='40']").click()
        say(page, "Hello.", tokens=8)
        tab(page, "Sweep")
        page.locator("#sweep-text textarea").fill(TEXT)
        page.locator("#sweep-grid input, #sweep-grid textarea").fill("0, 1")
        page.click("#sweep-go")
        wait_until(lambda: "Done" in line(page, "sweep-status"))
        tab(page, "Model")
        page.click("#model-load")
        wait_until(lambda: "of them MoD layers" in line(page, "model-status"))
        for name in TABS:
            tab(page, name)
            page.wait_for_timeout(700)
            drawn(page)
            assert not serious(axe, page), name


def test_two_visitors_with_two_dials_do_not_meet(window, browser, url):
    """One closes its layers while the other runs them all."""
    with visiting(window, f"{url}/?new_tokens=150") as one, visitor(browser, f"{url}/?new_tokens=150") as other:
        set_p(one, 0)
        set_p(other, 1)
        for page in (one, other):
            page.click("#generate")
        for page in (one, other):
            wait_until(lambda page=page: "Reached" in status(page) or "Finished" in status(page))
        assert figure(one, "load") == "100%"
        assert float(figure(other, "load")[:-1]) < 20
        assert columns(one) > 30


def test_a_reload_in_mid_run_frees_the_model(page):
    """The page comes back with its example, and the next run starts at once."""
    start(page)
    page.reload()
    page.wait_for_selector("#generate")
    wait_until(lambda: columns(page) > 50 and "recorded" in status(page))
    start(page)
    page.click("#stop")
