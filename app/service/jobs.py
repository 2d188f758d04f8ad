"""Work beside the page: it runs in a thread, reports as it goes, and ends when nobody reads it any more.

Decoding too: its kernels run outside Python's lock, so that a page's messages are put together meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Report = Callable[[Any], None]
_BEAT = 0.5  # seconds after which a reader hears that there is nothing new
_PATIENCE = 0.1  # seconds to wait for the end of work that nobody reads any more; Gradio closes on its event loop
_LEAST = 0.001
_EACH = 0.001  # seconds by which a report puts off the next batch


@dataclass(frozen=True, slots=True)
class Finished:
    """The work's result."""

    value: Any


class Cancelled(Exception):
    """Raised inside the work, at its next report, once nobody reads it."""


def batches(work: Callable[[Report], Any], frame: float) -> Iterator[list[Any]]:
    """What ``work(report)`` reports, gathered for ``frame`` seconds at a time (up to thrice that where much is
    reported); the last report is Finished.

    The first batch comes at once; an empty one now and then while nothing is reported. Closing the iterator cancels
    the work at its next report. An error of the work is raised here, after its reports.
    """
    job = _Job(work)
    try:
        while True:
            began = time.monotonic()
            batch = job.take()
            if batch and isinstance(batch[-1], _Failed):
                yield batch[:-1]
                raise batch[-1].error
            yield batch
            if batch and isinstance(batch[-1], Finished):
                return
            # The more there is to show, the rarer: fast work should not spend its time on being watched.
            pause = min(3 * frame, frame + _EACH * len(batch))
            job.ended.wait(max(_LEAST, began + pause - time.monotonic()))
    finally:
        job.close()


def in_background(work: Callable[[Report], Any]) -> Iterator[Any]:
    """What ``work(report)`` reports, one by one, None while it reports nothing, and Finished at its end."""
    for batch in batches(work, _LEAST):
        yield from batch or [None]


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class _Job:
    """The work's thread and what it has reported so far."""

    def __init__(self, work: Callable[[Report], Any]) -> None:
        self.ended, self._given_up = threading.Event(), threading.Event()
        self._reports: list[Any] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._go, args=(work,), daemon=True)
        self._thread.start()

    def take(self) -> list[Any]:
        """All that was reported since; waits a beat for the first."""
        with self._news:
            self._news.wait_for(lambda: self._reports, timeout=_BEAT)
            taken, self._reports = self._reports, []
        return taken

    def close(self) -> None:
        """Nobody reads any more."""
        self._given_up.set()
        self._thread.join(_PATIENCE)

    def _go(self, work: Callable[[Report], Any]) -> None:
        try:
            self._put(Finished(work(self._report)))
        except Cancelled:
            pass
        except BaseException as error:  # handed on to the reader
            self._put(_Failed(error))
        finally:
            self.ended.set()

    def _report(self, value: Any) -> None:
        if self._given_up.is_set():
            raise Cancelled
        self._put(value)

    def _put(self, value: Any) -> None:
        with self._news:
            self._reports.append(value)
            self._news.notify()
