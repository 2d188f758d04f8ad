"""Attention of many rows in one launch (Triton): the same as row by row, and done without where it can't be had."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import REPO, mod_model

from modification.executor import choose

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


@needs_triton
def test_the_laws_hold_in_the_interpreter():
    """In a process of its own: Triton learns on its import that the interpreter is to run its kernels."""
    laws = Path(__file__).with_name("ragged_laws.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(laws)], cwd=REPO, capture_output=True,
        text=True, timeout=900, env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_a_gpu(kind, head):
    """For one that isn't here: Triton brings its own assembler."""
    triton = importlib.import_module("triton")
    ragged, compiling = (importlib.import_module(name) for name in ("modification.executor.ragged", "triton.compiler"))
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    pointer, counts = f"*{kind}", {"D": head, "WIDTH": head}
    block = ragged.BLOCK_BYTES // (4 if kind == "fp32" else 2)
    given = {
        ragged._store: {"k": pointer, "v": pointer, "table": "*i64", **dict.fromkeys(
            ("k_head", "k_row", "v_head", "v_row"), "i32")},
        ragged._look: {"q": pointer, "table": "*i64", "part": "*fp32", "weight": "*fp32", "scale": "fp32",
                       **dict.fromkeys(("q_head", "q_row", "window", "span", "spans"), "i32")},
    }
    fixed = {ragged._store: counts, ragged._look: {**counts, "GROUP": 4, "QUERIES": 16, "BLOCK": block}}
    for kernel, kinds in given.items():
        signature = {**kinds, **dict.fromkeys(fixed[kernel], "constexpr")}
        source = compiling.ASTSource(fn=kernel, signature=signature, constexprs=fixed[kernel])
        made = triton.compile(source, target=target)
        assert made.asm["cubin"]
        assert made.metadata.shared <= 100 << 10


def test_without_triton_rows_attend_one_by_one(monkeypatch):
    """And the note says why."""
    monkeypatch.setitem(sys.modules, "modification.executor.ragged", None)
    model = SimpleNamespace(device=torch.device("cuda"), config=mod_model("llama").config, dtype=torch.float32)
    made, why = choose._together(model, 16)
    assert made is None
    assert "one by one" in why
