"""What the app costs on top of the engine: tokens per second bare, through the app's stream, and shown in a browser.

    python -m benchmarks.app_speed [--model FOLDER] [--new-tokens 600] [--rounds 5] [--p 0.5] [--browser]

The app runs in a process of its own, as `python app.py` starts it; the three alternate. Speed is new tokens over the
seconds from the first to the last of them. --browser wants Playwright and Chromium. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.headless import ROOT, launch, served
from modification import generate, load
from modification.loading import encode_prompt
from modification.measure.benchwords import machine

MODEL = ROOT / "assets" / "Llama-Storyteller-22M-MoD"
RECORD = '[\\"f\\",'
TOKENS = re.compile(r'\[\\"f\\",(?:[^,\]]+,){7}(\d+)')  # tokens so far, in a record of the tape
PROMPT = "Write a bedtime story called `The Lantern in the Snow`."
SEED = 1  # of a story that is long enough: the app stops where it ends, the bare engine does not


def bare(model: Any, ids: list[int], p: float, new_tokens: int) -> float:
    """The engine alone."""
    times = [
        time.perf_counter()
        for step in generate(
            model, ids, p=p, max_new_tokens=new_tokens, temperature=0.7, top_p=0.95, seed=SEED, stop=()
        )
        if not step.prefill
    ]
    return (len(times) - 1) / (times[-1] - times[0])


def streamed(address: str, p: float, new_tokens: int) -> float:
    """The app's own stream, read as its page reads it."""
    config = httpx.get(f"{address}/config").json()
    number = next(
        one["id"] for one in config["dependencies"]
        if one["api_visibility"] == "private" and one["api_name"].startswith("generate")
    )
    data = [PROMPT, p, new_tokens, 0.7, 0.95, 0, SEED, True, MODEL.name, None]
    session = f"bench{time.time_ns()}"
    httpx.post(f"{address}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session})
    seen: list[tuple[float, int]] = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}", timeout=300) as lines:
        for line in lines.iter_lines():
            # The last record alone: reading on should cost little, it shares the cores.
            if (at := line.rfind(RECORD)) >= 0 and (found := TOKENS.match(line, at)):
                seen.append((time.perf_counter(), int(found[1])))
            if '"process_completed"' in line:
                break
    last = next(at for at, (_, count) in enumerate(seen) if count == seen[-1][1])
    return (seen[last][1] - seen[0][1]) / (seen[last][0] - seen[0][0])


def shown(page: Any, address: str, p: float, new_tokens: int) -> float:
    """Columns that the browser has drawn, over the time it took."""
    page.goto(f"{address}/?new_tokens={new_tokens}&p={p}&seed={SEED}")
    page.wait_for_selector("#generate")
    page.wait_for_timeout(1500)
    before = page.locator(".mod-canvas").get_attribute("data-run")
    page.click("#generate")
    seen: list[tuple[float, int]] = []
    while not seen or "Reached" not in page.locator("#status").inner_text():
        canvas = page.locator(".mod-canvas")
        if canvas.get_attribute("data-run") != before:
            seen.append((time.perf_counter(), int(canvas.get_attribute("data-columns"))))
        time.sleep(0.1)
    last = next(at for at, (_, count) in enumerate(seen) if count == seen[-1][1])
    return (seen[last][1] - seen[0][1]) / (seen[last][0] - seen[0][0])


@contextmanager
def browser(wanted: bool) -> Iterator[Any]:
    """A page in headless Chromium, or None."""
    if not wanted:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = launch(driver)
        yield chromium.new_page(viewport={"width": 1280, "height": 900})
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--new-tokens", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--browser", action="store_true", help="also as a browser on the same machine shows it")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    ids, p, count = encode_prompt(tokenizer, PROMPT), arguments.p, arguments.new_tokens
    found: dict[str, list[float]] = {}
    with served("--model", str(arguments.model)) as address, browser(arguments.browser) as page:
        sides: dict[str, Callable[[], float]] = {
            "engine": lambda: bare(model, ids, p, count), "app, streamed": lambda: streamed(address, p, count),
        }
        if page is not None:
            sides["app, in a browser"] = lambda: shown(page, address, p, count)
        for at in range(arguments.rounds + 1):
            for name, side in sides.items():
                speed = side()
                if at:  # the first round warms up
                    found.setdefault(name, []).append(speed)
    print("| side | tokens/s (measured) | of the engine's, median of rounds |\n|---|---|---|")
    ratios = {
        name: statistics.median(one / bare for one, bare in zip(speeds, found["engine"], strict=True))
        for name, speeds in found.items()
    }
    for name, speeds in found.items():
        print(f"| {name} | {statistics.median(speeds):.1f} | {ratios[name]:.2f} |")
    print(json.dumps({"command": "app_speed", "machine": machine(model.device), "p": p, "tokens": count,
                      "speeds": found, "ratios": ratios}))


if __name__ == "__main__":
    main()
