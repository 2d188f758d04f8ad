"""The desk: every request gets a place here before it works, and is counted, whatever it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from app.errors import UserError
from app.service.metrics import Metrics
from app.service.requests import Limits
from app.service.runs import Update
from app.service.turnstile import Turnstile

_BEAT = 0.4  # seconds after which who waits hears of it


class Desk:
    """Places on the machine.

    Args:
        limits: how many, and how much memory (``cache_bytes`` above 0).
        held: bytes of keys and values that are kept between requests.
        relieve: asked to free so many of them.
        metrics: where requests are counted.
    """

    def __init__(
        self, limits: Limits, held: Callable[[], int], relieve: Callable[[int], None], metrics: Metrics
    ) -> None:
        self.metrics = metrics
        self.turnstile = Turnstile(
            limits.running, limits.waiting, limits.each, limits.cache_bytes or None, held, relieve
        )
        self._closed, self._active = threading.Event(), set[object]()

    @property
    def closed(self) -> bool:
        """Whether nothing new is begun any more."""
        return self._closed.is_set()

    @contextlib.contextmanager
    def request(self, kind: str) -> Iterator[None]:
        """A request from its beginning to its end.

        Raises:
            UserError: the app is shutting down.
        """
        with self.metrics.request(kind):
            if self._closed.is_set():
                raise UserError("The app is shutting down: answers under way are finished, new ones are not begun.")
            mark = object()
            self._active.add(mark)
            try:
                yield
            finally:
                self._active.discard(mark)

    @contextlib.contextmanager
    def place(
        self, user: str = "", need: int = 0, own: Callable[[], int] = lambda: 0
    ) -> Iterator[Iterator[Update]]:
        """A place to work; the iterator within tells how many are ahead, until it is this one's turn.

        Args:
            user: whose request it is; empty where nobody's share is counted.
            need: bytes of keys and values that it may come to.
            own: those of them that are held for it already.

        Raises:
            UserError: no place for it, now or ever.
        """
        with in_line(self.turnstile, user, need, own) as line:
            yield line

    def close(self, patience: float) -> bool:
        """Begin nothing new, and wait for what is under way; whether all came to its end."""
        self._closed.set()
        until = time.monotonic() + patience
        while self._active and time.monotonic() < until:
            time.sleep(0.05)
        return not self._active


@contextlib.contextmanager
def in_line(
    turnstile: Turnstile, user: str = "", need: int = 0, own: Callable[[], int] = lambda: 0
) -> Iterator[Iterator[Update]]:
    """A place behind a turnstile; see :meth:`Desk.place`."""
    ticket = object()
    turnstile.join(ticket, user, need, own)

    def line() -> Iterator[Update]:
        while (ahead := turnstile.wait(ticket, _BEAT)) is not None:
            yield Update(waiting=ahead)

    try:
        yield line()
    finally:
        turnstile.leave(ticket)
