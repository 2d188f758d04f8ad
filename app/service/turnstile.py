"""A fair queue: so many inside at once, the rest in order of arrival."""

from __future__ import annotations

import threading
from collections import deque

from app.errors import UserError


class Turnstile:
    """Lets ``size`` runs in at once, the rest in order of arrival."""

    def __init__(self, size: int, waiting: int) -> None:
        self._size, self._waiting = size, waiting
        self._inside: set[object] = set()
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def join(self, ticket: object) -> None:
        """Take a place in line; UserError when it is full."""
        with self._changed:
            if len(self._inside) >= self._size and len(self._line) >= self._waiting:
                raise UserError(f"The queue is full ({self._waiting} waiting). Please try again in a minute.")
            self._line.append(ticket)

    def wait(self, ticket: object, seconds: float) -> int | None:
        """None once the ticket is inside; after ``seconds`` in line, how many are ahead."""
        with self._changed:
            if self._changed.wait_for(lambda: self._may_enter(ticket), timeout=seconds):
                self._line.remove(ticket)
                self._inside.add(ticket)
                self._changed.notify_all()
                return None
            return self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        """Give the place back, in line or inside."""
        with self._changed:
            self._inside.discard(ticket)
            if ticket in self._line:
                self._line.remove(ticket)
            self._changed.notify_all()

    def _may_enter(self, ticket: object) -> bool:
        return len(self._inside) < self._size and self._line[0] is ticket
