"""Processes forked from one that has imported the packages that all of them need, which takes longer than they do.

What is forked has imported nothing of this project yet, and holds nothing of the tests' own process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import huggingface_hub

from app.headless import ROOT, await_answer, free_port


class Forked:
    """A process that calls a function; what that returns is its exit code.

    Args:
        work: found by its name in its module, which is imported there.
        arguments: pickled on their way.
        environment: besides the tests' own, set before it works.

    Attributes:
        out: what it prints, to be read from as it goes.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self.out, self._errors = (tempfile.NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115
        environment = {**os.environ, **environment}
        given = (work, arguments, environment, self.out.name, self._errors.name)
        self.process = _context().Process(target=_work, args=given)
        self.process.start()

    def line(self) -> str:
        """The next whole line that it prints."""
        line = ""
        while not line.endswith("\n"):
            going = self.process.is_alive()
            if not (more := self.out.readline()) and not going:
                raise EOFError(self._errors.read()[-3000:])
            line += more
            self.process.join(0 if more else 0.01)
        return line

    def end(self, seconds: float = 240) -> tuple[str, str]:
        """Wait until it ends, well: what it printed, and its errors."""
        self.process.join(seconds)
        self.process.kill()
        errors = self._errors.read()
        assert self.process.exitcode == 0, errors[-6000:]
        return self.out.read(), errors


def python(code: str, *arguments: str) -> None:
    """The work of ``python -c``."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def app(*flags: str) -> Iterator[str]:
    """The address of the app with these flags, until the context ends."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    process = Forked(_app, "--port", str(port), *flags, HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="0").process
    try:
        await_answer(address, process.is_alive)
        yield address
    finally:
        process.terminate()
        process.join(60)
        process.kill()


def _app(*flags: str) -> None:
    sys.argv = ["app.py", *flags]
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")


def together(work: Callable[..., Any], *arguments: Any) -> None:
    """The same in two processes, started by torch's launcher."""
    Forked(_launch, free_port(), work, *arguments).end()


def _launch(port: int, work: Callable[..., Any], *arguments: Any) -> None:
    """As ``torch.distributed.run`` does, but that its processes are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="tests", rdzv_backend="static", max_restarts=0,
        rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"rank": 0}, monitor_interval=0.1, start_method="fork",
    )
    codes = elastic_launch(config, work)(*arguments)
    assert not any(codes.values()), codes


@functools.cache
def _context() -> Any:
    """Starts the process that the others are forked from: one thread, and no CUDA, which survives no fork."""
    families = sorted(name for name in sys.modules if name.startswith("transformers.models."))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "peft", "gradio", *families])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _work(work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], *files: str) -> None:
    gc.freeze()
    for number, name in enumerate(files, 1):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.update({**environment, "CUDA_VISIBLE_DEVICES": ""})
    importlib.reload(huggingface_hub.constants)  # which reads the environment when it is imported
    huggingface_hub.hf_api.api.__init__()
    sys.exit(work(*arguments))
