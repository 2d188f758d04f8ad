"""The Hub away, slow, or answering nonsense: cached models still load, downloads go on, and no token leaks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from builders import REPO, mod_model, tiny_tokenizer
from hub_stand_in import StandIn

TOKEN = "hf_" + "s3cret" * 6
OPENING = """
import sys, logging, urllib.request, os
logging.basicConfig(level=logging.DEBUG)
sys.path.insert(0, sys.argv[1])
from modification import load
from modification.errors import LoadError
import modification.hub as hub
def mode(name):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/_mode/{name}").read()
import huggingface_hub.constants as constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
def refused():
    try:
        load("who/model")
    except LoadError as error:
        print("REFUSED", error)
    else:
        print("LOADED")
"""


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "served"
    mod_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (folder / "evil.py").write_text("raise SystemExit")
    stand_in = StandIn(folder)
    yield stand_in
    stand_in.close()


@pytest.fixture
def child(hub, tmp_path):
    """Run code in a process that takes the stand-in for the Hub; what it printed, and all that it wrote."""
    def go(code):
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", OPENING + textwrap.dedent(code), str(REPO)], env=environment, capture_output=True,
            text=True, timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout.splitlines()

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
        for how in ("error", "nonsense", "gone", "hang"):
            mode(how)
            refused()
        os.environ["HF_ENDPOINT"]
    """)
    assert len(said) == 4
    assert all(line.startswith("REFUSED") for line in said)
    assert all(line.endswith("not among the models kept on this machine") for line in said)


def test_a_download_that_breaks_off_goes_on(child, hub):
    """The rest is asked for, and not the whole again."""
    assert child('mode("cut")\nrefused()') == ["LOADED"]
    ranges = [asked for method, path, asked in hub.seen if path.endswith(".safetensors") and method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] in ("", "bytes=0-")
    assert ranges[1].startswith("bytes=")


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
            if far.here > 20_000:
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
