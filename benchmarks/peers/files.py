"""The folder that weights come from, and the files that other engines read instead."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.engine import Settings
from benchmarks.peers.host import say, versions
from modification import MoDModel, restore

MODEL_TYPES = ("llama", "mod_llama")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def store_of(settings: Settings) -> Path:
    """Where exports of these weights lie: a folder named after the weights' files and the packages' versions."""
    files = sorted(path for path in settings.folder.iterdir() if path.suffix in (".json", ".safetensors"))
    stamp = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    digest = hashlib.sha256((stamp + repr(versions())).encode()).hexdigest()[:12]
    return settings.work / f"{settings.folder.resolve().name}-{digest}"


def made(path: Path, write: Callable[[Any, Path, str], None], model: Any, kind: str) -> Path:
    """``path``, which ``write`` makes unless an earlier run did; one that is cut short leaves nothing of that name."""
    if not path.exists():
        say(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            with contextlib.redirect_stdout(sys.stderr):
                write(model, Path(scratch) / path.name, kind)
            (Path(scratch) / path.name).rename(path)
    return path


def load(folder: Path, dtype: str) -> Any:
    """The folder's model with transformers, from safetensors alone, dense or MoD as it was saved.

    Raises:
        ValueError: it is not a Llama.
    """
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{folder} is not a Llama, dense or MoD: its model_type is {kind!r}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True).eval()


def load_dense(folder: Path, dtype: str) -> Any:
    """Likewise, and without its routers if it has any."""
    model = load(folder, dtype)
    return restore(model) if isinstance(model, MoDModel) else model
