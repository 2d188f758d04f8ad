"""Many users of one process: what decoding together is worth, and what 50 pages at once get. All figures measured.

    python -m benchmarks.crowd [--model FOLDER] [--users 50] [--requests 500] [--rounds 5]

First the runs of 2, 4 and 8 users are decoded together and one after the other, alternating. Then the app is started as
``python app.py`` does it, and users open the page over HTTP on loopback as a browser would: they generate, some move p,
some stop, some leave; memory is read after the first 50 requests and after the last. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from app.headless import ROOT, served
from modification import generate, load
from modification.batching import Batch
from modification.executor import executor_of
from modification.generate import prepare
from modification.loading import encode_prompt

PROMPT = "Write a bedtime story called `The Lantern in the Snow`, for user {}."
MODEL = ROOT / "assets" / "Llama-Storyteller-22M-MoD"


def together(folder: Path, users: int, rounds: int, tokens: int = 120) -> dict[str, Any]:
    """Tokens per second of all users' runs, decoded together and one after the other; medians of alternating rounds."""
    model, tokenizer = load(folder)
    prompts = [encode_prompt(tokenizer, PROMPT.format(user)) for user in range(users)]
    asked: dict[str, Any] = {"p": 0.5, "max_new_tokens": tokens, "stop": ()}
    speeds: dict[str, list[float]] = {"together": [], "in turn": []}
    for _ in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        batch = Batch(executor_of(model))
        for prompt in prompts:
            batch.join(prepare(model, prompt, **asked))
        while len(batch):
            batch.step()
        speeds["together"].append(users * tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        for prompt in prompts:
            for _ in generate(model, prompt, **asked):
                pass
        speeds["in turn"].append(users * tokens / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(speeds["together"][1:], speeds["in turn"][1:], strict=True)]
    return {
        "users": users, "together": statistics.median(speeds["together"][1:]),
        "in_turn": statistics.median(speeds["in turn"][1:]), "ratio": statistics.median(ratios),
    }


class Page:
    """One user's page: the app's address and which of its events are which, as the page's config tells."""

    def __init__(self, client: httpx.AsyncClient, config: dict[str, Any]) -> None:
        self.client, self.session = client, secrets.token_hex(6)
        ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        own = [one for one in config["dependencies"] if one["backend_fn"]]  # the others run in the browser alone
        events = {(target[0], target[1]): one for one in own for target in one["targets"]}
        self.go, self.move = events[ids["generate"], "click"], events[ids["p"], "change"]
        self.defaults = {one["id"]: one["props"].get("value") for one in config["components"]}

    async def generate(self, prompt: str, tokens: int, how: str) -> tuple[str, float, int]:
        """Press Generate: how it ended, seconds to the first token, messages that came."""
        values = [self.defaults.get(one) for one in self.go["inputs"]]
        values[0], values[2], values[-1] = prompt, tokens, {}
        began, first, messages = time.perf_counter(), 0.0, 0
        joined = await self.client.post("/gradio_api/queue/join", json={
            "data": values, "fn_index": self.go["id"], "session_hash": self.session, "trigger_id": None,
        })
        if joined.status_code != 200:
            return f"refused {joined.status_code}", 0.0, 0
        event = joined.json()["event_id"]
        async with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                told = json.loads(line[5:])
                if told["msg"] == "process_generating":
                    messages += 1
                    if "Streaming" in line and not first:
                        first = time.perf_counter() - began
                    if how == "move" and messages % 2:
                        await self.client.post("/gradio_api/run/predict", json={
                            "data": [0.1 * (messages % 10)], "fn_index": self.move["id"], "session_hash": self.session,
                        })
                    if how == "leave" and messages == 3:
                        return "left", first, messages
                    if how == "stop" and messages == 3:
                        await self.client.post("/gradio_api/cancel", json={
                            "session_hash": self.session, "fn_index": self.go["id"], "event_id": event,
                        })
                        return "stopped", first, messages
                elif told["msg"] == "process_completed":
                    failed = "mod-status error" in line or not told["success"]
                    return ("failed" if failed else "done"), first, messages
        return "broken off", first, messages


async def crowd(url: str, users: int, requests: int, tokens: int, memory: Any) -> dict[str, Any]:
    """So many users at a time until all requests are done: outcomes, waits and memory."""
    outcomes, waits, sizes = Counter[str](), list[float](), list[int]()
    limits = httpx.Limits(max_connections=4 * users)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        left = iter(range(requests))

        async def user() -> None:
            for at in left:
                await client.get("/")
                config = (await client.get("/config")).json()
                how = {3: "move", 5: "stop", 7: "leave"}.get(at % 10, "stay")
                page = Page(client, config)
                # As long as a page is open it listens here; the app forgets its session when it stops.
                async with client.stream("GET", f"/gradio_api/heartbeat/{page.session}"):
                    outcome, first, _ = await page.generate(PROMPT.format(at), tokens, how)
                outcomes[outcome] += 1
                waits.extend([first] if first else [])
                if sum(outcomes.values()) in (50, requests):
                    await asyncio.sleep(1.0)
                    sizes.append(memory())

        began = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(users)))
        seconds = time.perf_counter() - began
        text = (await client.get("/metrics")).text
    made = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("mod_tokens_total"))
    waits.sort()
    return {
        "users": users, "requests": requests, "outcomes": dict(outcomes), "seconds": round(seconds, 1),
        "requests_per_second": round(requests / seconds, 2), "tokens_per_second": round(made / seconds, 1),
        "first_token_s": {"median": waits[len(waits) // 2], "p95": waits[int(0.95 * len(waits))]},
        "memory_mb_after_50_and_last": [round(size / 1e6, 1) for size in sizes],
    }


def resident(port: str) -> int:
    """Bytes in memory of the process that serves a port."""
    found = subprocess.run(["pgrep", "-f", f"app.py --port {port}"], capture_output=True, text=True, check=True)
    return int(Path(f"/proc/{found.stdout.split()[0]}/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    shared = [together(arguments.model, users, arguments.rounds) for users in (2, 4, 8)]
    for one in shared:
        print(f"{one['users']} users: {one['together']:.0f} tokens/s together, {one['in_turn']:.0f} in turn: "
              f"{one['ratio']:.2f}x")
    with served("--model", str(arguments.model)) as url:
        port = url.rstrip("/").rpartition(":")[2]
        found = asyncio.run(crowd(
            url.rstrip("/"), arguments.users, arguments.requests, arguments.new_tokens, lambda: resident(port)
        ))
    print(json.dumps({"together": shared, "crowd": found}))


if __name__ == "__main__":
    main()
