"""The app as a process: out of memory, told to end, behind a proxy with a replica beside it, on several devices."""

from __future__ import annotations

import contextvars
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import gradio as gr
import httpx
import pytest
from talkers import columns, talker
from warm import Forked, python

from app.errors import UserError
from app.headless import served
from app.service import Limits, Request, Service, Zero
from app.service.choice import Options
from app.tape import records
from app.web import Traffic


def child(code: str, *arguments: str) -> str:
    """What a process of its own prints."""
    return Forked(python, textwrap.dedent(code), *arguments).end()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_out_of_memory_is_a_sentence_and_the_app_goes_on(tmp_path):
    """Memory is bounded: too long a prompt fails alone, beside a run that goes on; what it held is free again."""
    talker(tmp_path / "model", context=1 << 17)
    said = child("""
        import resource, sys, threading
        from app.errors import UserError
        from app.service import Limits, Request, Service, sentence_of
        service = Service({"tiny": sys.argv[1]}, limits=Limits(
            frame=0.0, prompt_tokens=1 << 17, cache_bytes=1 << 40, prompt_characters=1 << 20))
        def run(prompt, budget=8):
            tape = ""
            try:
                for update in service.run("one", 0.0, Request(prompt, "tiny", budget, 0.0, chat=False)):
                    tape = update.tape or tape
            except Exception as error:
                return sentence_of(error) or repr(error)
            return sum(line.startswith('["c"') for line in tape.splitlines())
        print(run("warm"), flush=True)
        beside = []
        thread = threading.Thread(target=lambda: beside.append(run("beside " * 20, 1500)))
        thread.start()
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (24 << 20),) * 2)
        print(run("long " * 16_000), flush=True)
        thread.join()
        print(beside, run("short"), service.desk.turnstile.count())
    """, str(tmp_path / "model"))
    lines = said.splitlines()
    assert lines[0] == "12"
    assert lines[1].startswith("The machine ran out of memory and this request was given up"), said
    assert lines[2] == f"[{139 + 1500}] 13 (0, 0)"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_over_devices_says_the_same(tmp_path, place):
    """accelerate's device_map, some layers kept in memory and some on the disk: the same tokens, p a dial still."""
    talker(tmp_path / "model", context=256)
    said = child("""
        import sys, torch
        from modification import generate, load
        folder, place, offload = sys.argv[1:]
        whole, _ = load(folder)
        spread = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
        spread |= {f"model.layers.{at}": place if at in (1, 2) else "cpu" for at in range(4)}
        from transformers import AutoModelForCausalLM
        parts = AutoModelForCausalLM.from_pretrained(folder, device_map=spread, offload_folder=offload).eval()
        ids = list(range(2, 40))
        for p in (0.0, 0.5, 1.0):
            one, other = ([step.token for step in generate(model, ids, p=p, max_new_tokens=12) if not step.prefill]
                          for model in (whole, parts))
            print(one == other)
        from modification.executor import executor_of
        print(executor_of(parts).name)
    """, str(tmp_path / "model"), place, str(tmp_path / "offload"))
    lines = said.splitlines()
    assert lines[:3] == ["True"] * 3
    assert lines[3] in ("stock", "fast")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_app_serves_a_model_spread_over_devices(tmp_path, place, monkeypatch):
    """Loaded with some layers elsewhere, it streams the tokens of the same model in one piece; a chat's too."""
    talker(tmp_path / "model", context=256)
    spread = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread |= {f"model.layers.{at}": place if at in (1, 2) else "cpu" for at in range(4)}
    found = {}
    for given in ({"": "cpu"}, spread):
        monkeypatch.setattr(Options, "spread", property(lambda self, given=given: given))
        service = Service({"tiny": tmp_path / "model"}, limits=Limits(frame=0.0))
        *_, run = service.run("one", 0.5, Request("Hello there", "tiny", 12, 0.8, seed=3))
        *_, talk = service.talks.chat("two", ("tiny", "tiny"), 0.5, Request("Hello", "tiny", 8, 0.0))
        texts = [record[1:3] for record in records(talk.tape) if record[0] == "c"]
        found[len(given)] = columns(run.tape), texts
        assert getattr(service.open("tiny").model, "hf_device_map", given) == given
    one, other = found.values()
    assert len(one[0]) > 12
    assert other == one


FORKING = textwrap.dedent("""
    import multiprocessing, pickle, sys, threading
    def forked(work):
        # As on ZeroGPU: a process forked for the call, arguments and results pickled on their way.
        def call(*arguments):
            fork = multiprocessing.get_context("fork")
            here, there = fork.Pipe()
            given = pickle.dumps(arguments)
            def go():
                for found in work(*pickle.loads(given)):
                    there.send(pickle.dumps(found))
                there.send(None)
            process = fork.Process(target=go)
            process.start()
            while (sent := here.recv()) is not None:
                yield pickle.loads(sent)
            process.join()
        return call
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX")
def test_p_moves_in_a_fork_as_on_zerogpu(tmp_path):
    """A run in a forked worker: the same tokens as here; p moved in mid-run reaches it; who leaves ends it."""
    talker(tmp_path / "model", context=4096)
    said = child(FORKING + textwrap.dedent("""
        from app.service import Limits, Request, Service, Zero
        here = Service({"tiny": sys.argv[1]}, limits=Limits(frame=0.0))
        there = Service({"tiny": sys.argv[1]}, limits=Limits(frame=0.0), zero=Zero(forked))
        wanted = Request("Hello", "tiny", 20, 0.8, seed=3)
        columns = lambda tape: [line for line in tape.splitlines() if line.startswith('["c"')]
        last = lambda service: columns([one.tape for one in service.run("a", 0.5, wanted) if one.tape][-1])
        print(last(here) == last(there))
        tape = ""
        for update in there.run("b", 0.0, Request("Hello", "tiny", 2000, 0.0)):
            tape = update.tape or tape
            if len(columns(tape)) > 40:
                there.set_p("b", 1.0)
        import json
        seen = [json.loads(line)[2] for line in columns(tape)]
        print(seen[0], seen[-1], len(seen))
        run = there.run("c", 0.0, Request("Hello", "tiny", 4000, 0.0))
        next(run); next(run); run.close()
        import time
        for _ in range(100):
            if not multiprocessing.active_children() and len(there.library.zero._free) == 64:
                break
            time.sleep(0.1)
        print(multiprocessing.active_children(), there.desk.turnstile.count())
    """), str(tmp_path / "model"))
    assert said.splitlines() == ["True", "0.0 1.0 2005", "[] (0, 0)"]


def test_what_zerogpu_refuses_is_a_sentence(tmp_path):
    """`spaces` raises Gradio's error; and it looks for the visitor in the thread that asks."""
    visitor, asked = contextvars.ContextVar("visitor", default="nobody"), []

    def decorate(work):
        def call(*arguments):
            asked.append(visitor.get())
            raise gr.Error("You have exceeded your GPU quota.")
            yield from work(*arguments)
        return call

    service = Service({"tiny": talker(tmp_path / "model")}, limits=Limits(frame=0.0), zero=Zero(decorate))
    visitor.set("somebody")
    with pytest.raises(UserError, match="exceeded your GPU quota"):
        list(service.run("a", 0.5, Request("Hello", "tiny", 5, 0.0)))
    assert asked == ["somebody"]


def test_a_model_loaded_on_auto_runs_in_the_app(tmp_path):
    """The option of the Model tab."""
    service = Service({"tiny": talker(tmp_path / "model")}, limits=Limits(frame=0.0))
    wanted = Request("Hello", "tiny [auto]", 5, 0.0)
    *_, last = service.run("a", 0.5, wanted)
    assert last.tape.count('"n"') == 5


def test_told_to_end_it_finishes_what_is_under_way_and_begins_nothing(tmp_path):
    """SIGTERM: the answer under way comes whole; a new one is refused with a sentence; then the process ends well."""
    folder, log = talker(tmp_path / "model", context=4096), (tmp_path / "log").open("w")
    flags = "--model", str(folder), "--converted", str(tmp_path / "c"), "--patience", "300"  # the machine may be busy
    with served(*flags, log=log) as url:
        client = httpx.Client(base_url=url.rstrip("/"), timeout=300)

        def ask(tokens):
            data = ["Hello", 0.0, "model", tokens, 0.0, 1.0, 0, 0, True]
            made = client.post("/gradio_api/call/generate", json={"data": data}).json()
            return lambda: client.get(f"/gradio_api/call/generate/{made['event_id']}").text

        ask(2)()
        answer, told = ask(2000), []  # seconds, however fast the machine
        reader = threading.Thread(target=lambda: told.append(answer()))
        reader.start()
        while "mod_running 1.0" not in client.get("/metrics").text:
            time.sleep(0.02)
        process = int(_listening(url))
        os.kill(process, signal.SIGTERM)
        time.sleep(0.2)
        late, health = ask(2)(), client.get("/health")
        reader.join(300)
        assert '"new_tokens": 2000' in told[0]
        assert "event: error" in late
        assert "shutting down" in late or "connection" in late.lower(), late
        assert (health.status_code, health.text) == (503, "shutting down\n")
    log.close()
    assert "Ended." in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_answer_that_is_asked_for_a_moment_later_is_waited_for():
    """A program's call is two requests: between them no stream is open."""
    traffic, began = Traffic(), time.monotonic()

    def later():
        time.sleep(0.3)
        traffic.open = 1
        time.sleep(0.7)
        traffic.open = 0

    threading.Thread(target=later).start()
    traffic.drain(30, quiet=0.6)
    assert 1.5 <= time.monotonic() - began < 20


def _listening(url: str) -> str:
    """The process that serves a port of this machine."""
    port = url.rstrip("/").rpartition(":")[2]
    found = subprocess.run(["pgrep", "-f", f"app.py.*{port}"], capture_output=True, text=True, check=True)
    return found.stdout.split()[0]
