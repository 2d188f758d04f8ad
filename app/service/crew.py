"""One thread a model, while there is anything to run: it decodes all runs of that model together.

Runs join and leave between tokens (see ``modification.batching``). What must be timed by itself (a chat's two sides, a
sweep, a benchmark) takes the model's lock instead, and takes turns with the crew.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from app.service.jobs import Mailbox
from app.service.turnstile import FairLock
from modification import Step
from modification.batching import Batch, Stream
from modification.executor import executor_of


class Crew:
    """The runs of one model.

    Args:
        model: a MoD model.
        lock: held for every step.
    """

    def __init__(self, model: Any, lock: FairLock) -> None:
        self.model, self.lock = model, lock
        self._new: list[_Run] = []
        self._table = threading.Lock()
        self._at_work = False

    def run(self, stream: Stream) -> Mailbox:
        """Where (step, seconds since the one before) come in, and Finished at the end. Closing it frees the cache."""
        run = _Run(stream)
        with self._table:
            if not self._at_work:
                threading.Thread(target=self._go, daemon=True).start()  # may fail; waits for the table
                self._at_work = True
            self._new.append(run)
        return run.box

    def _go(self) -> None:
        runs: dict[int, _Run] = {}
        try:
            batch = Batch(executor_of(self.model))
            while self._admit(batch, runs):
                with self.lock:
                    events = batch.step()
                for stream, found in events:
                    if (run := runs.get(id(stream))) is not None and run.tell(found):
                        del runs[id(stream)]
        except BaseException as error:  # nobody may be left waiting
            with self._table:
                self._at_work, left = False, [*runs.values(), *self._new]
                self._new = []
            for run in left:
                run.stream.cache.reset()
                run.box.fail(error)

    def _admit(self, batch: Batch, runs: dict[int, _Run]) -> bool:
        """Let runs in and out; False once there are none, and this thread is over."""
        with self._table:
            new, self._new = self._new, []
            if not new and not runs:
                self._at_work = False
                return False
        for run in new:
            runs[id(run.stream)] = run
            batch.join(run.stream)
        for key in [key for key, run in runs.items() if run.box.given_up.is_set()]:
            run = runs.pop(key)
            batch.leave(run.stream)
            run.box.ended.set()
        return True


class _Run:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.box, self.clock = stream, Mailbox(), time.perf_counter()

    def tell(self, found: Step | Exception) -> bool:
        """Report a step or a failure; whether it was the last."""
        if isinstance(found, Exception):
            self.box.fail(found)
            return True
        before, self.clock = self.clock, time.perf_counter()
        self.box.put((found, self.clock - before))
        if self.stream.ended:
            self.box.finish()
        return self.stream.ended
