"""Work beside the page: it runs in a thread, reports as it goes, and ends when nobody reads it any more.

Decoding too: its kernels run outside Python's lock, so that a page's messages are put together meanwhile.
"""

from __future__ import annotations

import contextlib
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


class Mailbox:
    """Reports on their way from whoever works to the one who reads.

    Attributes:
        ended: set once nothing more will come.
        given_up: set once nobody reads any more.
    """

    def __init__(self) -> None:
        self.ended, self.given_up = threading.Event(), threading.Event()
        self._reports: list[Any] = []
        self._news = threading.Condition()

    def put(self, value: Any) -> None:
        """A report."""
        with self._news:
            self._reports.append(value)
            self._news.notify()

    def finish(self, value: Any = None) -> None:
        """The last report: the result."""
        self.put(Finished(value))
        self.ended.set()

    def fail(self, error: BaseException) -> None:
        """The last report: what went wrong, to be raised to the reader."""
        self.put(_Failed(error))
        self.ended.set()

    def take(self) -> list[Any]:
        """All that was reported since; waits a beat for the first."""
        with self._news:
            self._news.wait_for(lambda: self._reports, timeout=_BEAT)
            taken, self._reports = self._reports, []
        return taken

    def close(self) -> None:
        """Nobody reads any more."""
        self.given_up.set()
        self.ended.wait(_PATIENCE)


def batches(source: Mailbox | Callable[[Report], Any], frame: float) -> Iterator[list[Any]]:
    """What comes into a mailbox, or what ``work(report)`` reports from a thread of its own, gathered for ``frame``
    seconds at a time (up to thrice that where much is reported); the last report is Finished.

    The first batch comes at once; an empty one now and then while nothing is reported. Closing the iterator cancels
    the work at its next report. An error of the work is raised here, after its reports.
    """
    box = source if isinstance(source, Mailbox) else in_thread(source)
    try:
        while True:
            began = time.monotonic()
            batch = box.take()
            if batch and isinstance(batch[-1], _Failed):
                yield batch[:-1]
                raise batch[-1].error
            yield batch
            if batch and isinstance(batch[-1], Finished):
                return
            # The more there is to show, the rarer: fast work should not spend its time on being watched.
            pause = min(3 * frame, frame + _EACH * len(batch))
            box.ended.wait(max(_LEAST, began + pause - time.monotonic()))
    finally:
        box.close()


def one_by_one(box: Mailbox) -> Iterator[Any]:
    """What comes into a mailbox, one by one, None while nothing does, and Finished at the end."""
    for batch in batches(box, _LEAST):
        yield from batch or [None]


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


def in_thread(work: Callable[[Report], Any]) -> Mailbox:
    """Where what ``work(report)`` reports from a thread of its own comes in."""
    box = Mailbox()

    def report(value: Any) -> None:
        if box.given_up.is_set():
            raise Cancelled
        box.put(value)

    def go() -> None:
        try:
            box.finish(work(report))
        except Cancelled:
            box.ended.set()
        except BaseException as error:  # handed on to the reader
            box.fail(error)

    try:
        threading.Thread(target=go, daemon=True).start()
    except RuntimeError:  # the system has no thread left: nobody will ever report
        box.ended.set()
        raise
    return box


def beside(work: Callable[[], None]) -> None:
    """Do it in a thread of its own; here, if the system has none left: it must be done."""
    try:
        threading.Thread(target=work, daemon=True).start()
    except RuntimeError:
        work()


def once_ended(box: Mailbox, held: contextlib.ExitStack) -> Callable[..., None]:
    """An exit that gives back what is held, now or when the work behind a mailbox has come to its end."""
    def wait() -> None:
        box.ended.wait()
        held.close()

    def leave(*error: Any) -> None:
        if box.ended.is_set():
            held.close()
        else:
            beside(wait)

    return leave
