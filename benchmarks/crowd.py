"""Many users of one process: what decoding together is worth, and what 50 pages at once get. All figures measured.

    python -m benchmarks.crowd [--model FOLDER] [--users 50] [--requests 500] [--rounds 5]

First the runs of 2, 4 and 8 users are decoded together and one after the other, alternating. Then the app is started as
``python app.py`` does it, and users open the page over HTTP on loopback as a browser would: they generate, some move p,
some stop, some leave; memory is read after the first 50 requests and after the last. What those who stay were sent is
held, token for token, against the same requests alone. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gradio_client.utils import apply_diff

from app.headless import ROOT, served
from app.service import Request, Service
from app.tape import records
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


@dataclass
class Told:
    """What a page has been told of its run: how it ended, seconds to the first token, messages, and the view's tape."""

    outcome: str = "broken off"
    first: float = 0.0
    messages: int = 0
    values: list[Any] = field(default_factory=list)
    tape: str = ""

    def take(self, sent: list[Any]) -> None:
        """One message: all values at first, then what is other than before."""
        changed = self.messages > 0
        self.values = [apply_diff(a, b) for a, b in zip(self.values, sent, strict=True)] if changed else sent
        self.messages += 1
        self.tape = self.values[0].get("d", self.tape)  # an update that skips the view has none; the last one is whole


def columns(tape: str) -> list[Any]:
    """A tape's tokens, with their scores and decisions."""
    return [record for record in records(tape) if record[0] == "c"]


def alone(service: Service, name: str, at: int, tokens: int) -> list[Any]:
    """What request number ``at`` gets by itself, with the page's own settings."""
    wanted = Request(PROMPT.format(at), name, tokens, temperature=0.7, top_p=0.95, seed=0, chat=True)
    *_, last = service.run("alone", 0.5, wanted)
    return columns(last.tape or "")


class Page:
    """One user's page: the app's address and which of its events are which, as the page's config tells."""

    def __init__(self, client: httpx.AsyncClient, config: dict[str, Any]) -> None:
        self.client, self.session = client, secrets.token_hex(6)
        ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        own = [one for one in config["dependencies"] if one["backend_fn"]]  # the others run in the browser alone
        events = {(target[0], target[1]): one for one in own for target in one["targets"]}
        self.go, self.move = events[ids["generate"], "click"], events[ids["p"], "change"]
        self.defaults = {one["id"]: one["props"].get("value") for one in config["components"]}

    async def generate(self, prompt: str, tokens: int, how: str) -> Told:
        """Press Generate, and read what comes until it ends; or move p, stop or leave meanwhile."""
        values = [self.defaults.get(one) for one in self.go["inputs"]]
        values[0], values[2], values[-1] = prompt, tokens, {}
        began, told = time.perf_counter(), Told()
        joined = await self.client.post("/gradio_api/queue/join", json={
            "data": values, "fn_index": self.go["id"], "session_hash": self.session, "trigger_id": None,
        })
        if joined.status_code != 200:
            return Told(f"refused {joined.status_code}")
        event = joined.json()["event_id"]
        async with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as answer:
            async for line in answer.aiter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if message["msg"] == "process_generating":
                    told.take(message["output"]["data"])
                    if "Streaming" in line and not told.first:
                        told.first = time.perf_counter() - began
                    if await self._acts(how, told.messages, event):
                        told.outcome = {"leave": "left", "stop": "stopped"}[how]
                        return told
                elif message["msg"] == "process_completed":
                    failed = "mod-status error" in line or not message["success"]
                    told.outcome = f"failed: {_sentence(line)}" if failed else "done"
                    return told
        return told

    async def _acts(self, how: str, messages: int, event: str) -> bool:
        """What this user does after so many messages; whether that ends the run for them."""
        if how == "move" and messages % 2:
            await self.client.post("/gradio_api/run/predict", json={
                "data": [0.1 * (messages % 10)], "fn_index": self.move["id"], "session_hash": self.session,
            })
        if how == "stop" and messages == 3:
            await self.client.post("/gradio_api/cancel", json={
                "session_hash": self.session, "fn_index": self.go["id"], "event_id": event,
            })
        return how in ("leave", "stop") and messages == 3


def _sentence(line: str) -> str:
    """What the page says of a failure."""
    found = re.search(r'mod-status error[^>]*>(.*?)<', line)
    return found[1] if found else line[:200]


async def crowd(
    url: str, users: int, requests: int, tokens: int, memory: Callable[[], int]
) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """So many users at a time until all requests are done: outcomes, waits and memory; and the tokens that those got
    who stayed, by request."""
    outcomes, waits, sizes = Counter[str](), list[float](), list[int]()
    got: dict[int, list[Any]] = {}
    # A connection for each request: one that idles is closed by the server, perhaps while it is being used again.
    limits = httpx.Limits(max_connections=4 * users, max_keepalive_connections=0)
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
                    told = await page.generate(PROMPT.format(at), tokens, how)
                outcomes[told.outcome] += 1
                waits.extend([told.first] if told.first else [])
                if how == "stay" and told.outcome == "done":
                    got[at] = columns(told.tape)
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
    }, got


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
        found, got = asyncio.run(crowd(
            url.rstrip("/"), arguments.users, arguments.requests, arguments.new_tokens, lambda: resident(port)
        ))
    service = Service({"alone": arguments.model})
    same = [given == alone(service, "alone", at, arguments.new_tokens) for at, given in got.items()]
    found["as_alone"] = f"{sum(same)} of {len(same)}"
    print(json.dumps({"together": shared, "crowd": found}))


if __name__ == "__main__":
    main()
