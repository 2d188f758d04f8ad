"""Settings for the whole suite: one thread, no network, and the fixtures that several files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("modification", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("modification")


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
