"""Settings for the whole suite: one thread, no network, and the fixtures that several files share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in what tests start too: threads that share a busy core wait in vain
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("modification", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("modification")


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What is there already, the packages above all, is not gone through each time that garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_gradients(request):
    """Most laws are about inference; a test that trains asks for the ``gradients`` fixture."""
    with torch.set_grad_enabled("gradients" in request.fixturenames):
        yield


@pytest.fixture
def gradients():
    """Leaves gradients on."""


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """The shared stories260K, a real pretrained Llama."""
    from builders import shared

    return shared("models", "stories260K")


@pytest.fixture(scope="session")
def url(tmp_path_factory) -> Iterator[str]:
    """The app as `python app.py` starts it, one run at a time so that a queue can be seen."""
    from app.headless import served

    folder = tmp_path_factory.mktemp("app")
    os.environ.setdefault("GRADIO_IS_E2E_TEST", "1")  # sessions are forgotten as soon as their page is left
    converted = str(folder / "converted")
    with (folder / "log").open("w") as log, served("--running", "1", "--converted", converted, log=log) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from app.headless import launch

    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = launch(driver)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def window(browser) -> Iterator[Any]:
    """A window for one visitor after another."""
    with browser.new_context() as context:
        yield context.new_page()


@pytest.fixture
def page(window, url) -> Iterator[Any]:
    """A fresh visitor on the page; the test fails if the page logs an error."""
    from browsing import visiting

    with visiting(window, f"{url}/?new_tokens=1500") as seen:  # long enough to be met under way
        yield seen
