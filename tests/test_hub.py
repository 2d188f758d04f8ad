"""The Hub away, slow, or answering nonsense: cached models still load, downloads go on, and no token leaks."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from builders import tiny_tokenizer
from hub_stand_in import StandIn
from transformers import LlamaConfig, LlamaForCausalLM
from warm import Forked, python

from modification import MoDConfig, convert

TOKEN = "hf_" + "s3cret" * 6
OPENING = """
import logging, urllib.request, os
logging.basicConfig(level=logging.DEBUG)
from modification import load
from modification.errors import LoadError
import modification.hub as hub
def mode(name):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/_mode/{name}").read()
def refused():
    try:
        load("who/model")
    except LoadError as error:
        print("REFUSED", error)
    else:
        print("LOADED")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of a model, 29 MB, and of what is not to be read."""
    folder = tmp_path_factory.mktemp("hub") / "served"
    large = LlamaConfig(vocab_size=99, hidden_size=256, intermediate_size=6144, num_hidden_layers=3,
                        num_attention_heads=4, tie_word_embeddings=True, dtype="bfloat16")
    convert(LlamaForCausalLM(large).to(torch.bfloat16), MoDConfig()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(served):
    stand_in = StandIn(served)
    yield stand_in
    stand_in.close()


@pytest.fixture
def start(hub, tmp_path):
    """Start code in a process that takes the stand-in for the Hub."""
    def go(code):
        return Forked(
            python, OPENING + textwrap.dedent(code), HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"),
            HF_HUB_OFFLINE="0", HF_HUB_ETAG_TIMEOUT="2", HF_HUB_DOWNLOAD_TIMEOUT="2", HF_TOKEN=TOKEN,
            no_proxy="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1",
        )

    return go


@pytest.fixture
def child(start):
    """Run such code to its end: what it printed."""
    def go(code):
        printed, errors = start(code).end()
        assert TOKEN not in printed + errors
        return printed.splitlines()

    return go


def test_a_model_is_fetched_with_progress_and_only_what_is_read(child, hub, tmp_path):
    """Then it loads without the Hub, however that misbehaves."""
    said = child("""
        seen = []
        hub.fetch("who/model", progress=lambda here, total: seen.append((here, total)))
        print(len(seen) > 3, seen == sorted(seen), seen[-1][0] == seen[-1][1])
        for how in ("well", "error", "nonsense", "gone", "hang"):
            mode(how)
            refused()
    """)
    assert said == ["True True True", *["LOADED"] * 5]
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.seen if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "evil.py"}


def test_a_hub_that_is_away_is_a_sentence(child):
    said = child("""
        for how in ("error", "nonsense", "gone", "hang", "trickle"):
            mode(how)
            refused()
        os.environ["HF_ENDPOINT"]
    """)
    assert len(said) == 5
    assert all(line.startswith("REFUSED") for line in said)
    assert all(line.endswith("not among the models kept on this machine") for line in said)


def test_a_model_that_the_disk_can_not_hold_is_refused_before_it_is_fetched(child, hub):
    """But for what is here already: then nothing more is needed."""
    said = child("""
        import shutil
        from types import SimpleNamespace
        real = shutil.disk_usage
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
        refused()
        shutil.disk_usage = real
        refused()
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
        refused()
    """)
    assert "on the disk, and 0.0 MB are free for the Hub" in said[0]
    assert said[1:] == ["LOADED", "LOADED"]
    assert sum("safetensors" in path and method == "GET" for method, path, _ in hub.seen) == 1


def test_a_download_that_breaks_off_goes_on(child, hub):
    """The rest is asked for, and not the whole again."""
    assert child('mode("cut")\nrefused()') == ["LOADED"]
    ranges = [asked for method, path, asked in hub.seen if path.endswith(".safetensors") and method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] == "bytes=0-"
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 5_000_000


def test_what_is_not_the_file_spoils_nothing(child, hub):
    """A page of some network's in its place is told; damage on the way is fetched anew, by its hash."""
    away, here = child('''
        mode("portal")
        refused()
        mode("wrong")
        refused()
    ''')
    assert away.startswith("REFUSED")
    assert "try again" in away
    assert here == "LOADED"


def test_a_process_killed_in_mid_download_leaves_what_the_next_goes_on_from(start, child, hub):
    """Nothing half fetched is taken for a model meanwhile."""
    killed = start('''
        mode("slow")
        hub.fetch("who/model", progress=lambda here, total: print(here, flush=True))
    ''')
    while int(killed.line()) < 5_000_000:
        pass
    killed.process.kill()
    killed.process.join()
    said, away, here, over = child('''
        from app.service import Limits, Service
        from app.tabs.model import opening
        print(opening(Service({}, limits=Limits())))
        mode("error")
        refused()
        mode("well")
        refused()
        print(hub.broken_off())
    ''')
    assert re.search(r"Downloads broken off: who/model \([\d.]+ MB are here\)", said)
    assert away.startswith("REFUSED")
    assert (here, over) == ("LOADED", "{}")
    ranges = [asked for method, path, asked in hub.seen if method == "GET"]
    starts = [int(asked[6:].partition("-")[0]) for asked in ranges if asked.startswith("bytes=")]
    assert max(starts) >= 5_000_000, "the rest was asked for, and not the whole again"


def test_a_download_keeps_no_other_model_waiting(child, hub):
    """A folder opens while somebody's model is still on its way."""
    said = child(f"""
        import pathlib, shutil, time
        from app.service import Limits, Service
        mode("slow")
        service = Service({{}}, limits=Limits())
        load = service.library.loading("who/model")
        next(load)
        service.open({str(hub.folder)!r})
        print("who/model" not in service.library.held())
        load.close()
    """)
    assert said == ["True"]


def test_who_leaves_ends_a_download_and_the_next_goes_on(child):
    """In the app: progress in bytes, an end within moments once nobody reads, and a model at the second try."""
    said = child("""
        import time
        from app.errors import UserError
        from app.service import Limits, Service
        service = Service({}, limits=Limits())
        mode("slow")
        load = service.library.loading("who/model")
        for far in load:
            if far.here > 5_000_000:
                break
        print(far.total > far.here)
        load.close()
        until = time.monotonic() + 10
        while service.library._loading and time.monotonic() < until:
            time.sleep(0.1)
        print(not service.library._loading)
        mode("well")
        print(service.open("who/model").describe()[:9])
    """)
    assert said == ["True", "True", "who/model"]
