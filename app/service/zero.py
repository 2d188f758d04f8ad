"""ZeroGPU: runs in a forked process that holds a GPU as long as a run takes (huggingface.co/docs/hub/spaces-zerogpu).

A fork sees the models as they were before it, and nothing that changes here after; thresholds lie in memory that is
made before the fork and shared with it, so that p still moves while text streams. Models stay on the CPU in this
process: chats, sweeps and benchmarks run there.
"""

from __future__ import annotations

import contextvars
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from app.errors import UserError
from app.service.dials import Dial
from app.service.jobs import Mailbox
from app.service.requests import ALTERNATIVES, Request
from modification import Step
from modification.executor import executor_of
from modification.generate import generate

if TYPE_CHECKING:
    from app.service.loaded import Loaded

SECONDS = 120  # of GPU time that a run may take
_SLOTS, _WIDTH = 64, 514  # of thresholds: p, a wish to stop, and a shift for each of 512 MoD layers
Decorate = Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]


def gpu_decorator() -> Decorate | None:
    """``spaces.GPU`` where there is a ZeroGPU to be had; else None."""
    if not os.environ.get("SPACES_ZERO_GPU"):
        return None
    import spaces

    decorate: Decorate = spaces.GPU(duration=SECONDS)
    return decorate


class Zero:
    """Runs in forks.

    Args:
        decorate: makes a generator run in a fork; ``spaces.GPU``, or a test's.
    """

    def __init__(self, decorate: Decorate) -> None:
        memory = mmap.mmap(-1, 8 * _SLOTS * _WIDTH)  # shared with forks
        self._rows = np.frombuffer(memory, np.float64).reshape(_SLOTS, _WIDTH)
        self._free = list(range(_SLOTS))
        self._table = threading.Lock()
        self.models: dict[str, Loaded] = {}  # the library's own: a fork has those that were loaded before it
        self._forked = decorate(self._decode)

    def run(self, loaded: Loaded, ids: list[int], dial: Dial, budget: int, request: Request) -> Mailbox:
        """Like ``Crew.run``: where steps and their seconds come in. ``dial`` moves what the fork reads."""
        box = Mailbox()
        told = contextvars.copy_context()  # whose request it is: `spaces` looks there for the visitor's share of GPUs
        arguments = (self._go, box, loaded.name, ids, dial, budget, request)
        threading.Thread(target=told.run, args=arguments, daemon=True).start()
        return box

    def _go(self, box: Mailbox, name: str, ids: list[int], dial: Dial, budget: int, request: Request) -> None:
        with self._table:
            slot = self._free.pop() if self._free else None
        if slot is None:
            return box.fail(UserError(f"{_SLOTS} runs are at work. Please try again in a minute."))
        try:
            row, shifts = self._rows[slot], len(dial.shifts)
            row[:2] = dial.p, 0.0
            row[2 : 2 + shifts] = dial.shifts
            for found in self._forked(name, ids, slot, shifts, budget, request):
                row[0], row[2 : 2 + shifts] = dial.p, dial.shifts
                if box.given_up.is_set():
                    row[1] = 1.0
                else:
                    box.put(found)
            box.finish()
        except BaseException as error:  # whoever reads must hear of it
            # What `spaces` has to say (no GPU left for this visitor, one held for too long) is a sentence of Gradio's.
            said = getattr(error, "message", "") if type(error).__module__.startswith("gradio") else ""
            box.fail(UserError(str(said)) if said else error)
        finally:
            with self._table:
                self._free.append(slot)

    def _decode(
        self, name: str, ids: list[int], slot: int, shifts: int, budget: int, request: Request
    ) -> Iterator[tuple[Step, float]]:
        """In the fork: the model goes to the GPU, and its steps come back."""
        row = self._rows[slot]
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # threads don't live on in a fork
        model = self.models[name].model.to("cuda" if torch.cuda.is_available() else "cpu")
        executor_of(model, compiled=False)  # what a fork compiles is gone with it

        def p() -> float | tuple[float, ...]:
            return Dial(float(row[0]), tuple(row[2 : 2 + shifts].tolist()))()

        clock = time.perf_counter()
        for step in generate(
            model, ids, p=p, max_new_tokens=budget, alternatives=ALTERNATIVES, **request.sampling()
        ):
            before, clock = clock, time.perf_counter()
            yield step, clock - before
            if row[1]:
                return
