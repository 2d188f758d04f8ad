"""Long work beside the page: it runs in a thread, reports as it goes, and ends when nobody reads it any more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Report = Callable[[Any], None]
_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Finished:
    """The work's result."""

    value: Any


class Cancelled(Exception):
    """Raised inside the work, at its next report, once nobody reads it."""


def in_background(work: Callable[[Report], Any]) -> Iterator[Any]:
    """What ``work(report)`` reports, None now and then while it reports nothing, and Finished at its end.

    Closing the iterator cancels the work at its next report. An error of the work is raised here.
    """
    reports: queue.Queue[Any] = queue.Queue()
    given_up = threading.Event()

    def report(value: Any) -> None:
        if given_up.is_set():
            raise Cancelled
        reports.put(value)

    def go() -> None:
        try:
            reports.put(Finished(work(report)))
        except Cancelled:
            pass
        except BaseException as error:  # handed on to the reader
            reports.put(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        while True:
            try:
                found = reports.get(timeout=_SECONDS)
            except queue.Empty:
                yield None
                continue
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, Finished):
                return
    finally:
        given_up.set()
