"""Fair waiting: a door that lets so many in at once, in order of arrival, as far as memory goes; and a fair lock."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from app.errors import UserError


@dataclass(frozen=True, slots=True)
class _Ask:
    user: str
    need: int
    own: Callable[[], int]


class Turnstile:
    """Lets ``size`` requests in at once, the rest in order of arrival.

    Args:
        size: requests inside.
        waiting: requests in line.
        each: requests of one user, inside and in line.
        room: bytes that those inside may need together, with what is ``held``.
        held: bytes that are in use but may be given back.
        relieve: asked to give back so many of them.
    """

    def __init__(
        self, size: int, waiting: int, each: int | None = None, room: int | None = None,
        held: Callable[[], int] = lambda: 0, relieve: Callable[[int], None] = lambda short: None,
    ) -> None:
        self._size, self._waiting, self._each = size, waiting, each
        self._room, self._held, self._relieve = room, held, relieve
        self._inside: dict[object, _Ask] = {}
        self._line: deque[object] = deque()
        self._asks: dict[object, _Ask] = {}
        self._changed = threading.Condition()

    def join(self, ticket: object, user: str = "", need: int = 0, own: Callable[[], int] = lambda: 0) -> None:
        """Take a place in line for something that needs so many bytes, those that it holds already (``own``) among
        them.

        Raises:
            UserError: the line is full, the user has enough requests, or memory would never do.
        """
        with self._changed:
            if self._room is not None and need > self._room:
                raise UserError(
                    f"This may need {need / 1e6:,.1f} MB for keys and values (estimated, at p = 0), and the app keeps "
                    f"at most {self._room / 1e6:,.1f} MB of them at a time. Shorten the text, or ask for fewer new "
                    "tokens."
                )
            mine = sum(ask.user == user for ask in self._asks.values())
            if self._each is not None and user and mine >= self._each:
                raise UserError(
                    f"You have {mine} requests here already, running or waiting; at most {self._each} at a time. Wait "
                    "for one to end, or stop it."
                )
            if len(self._line) >= self._waiting + self._open_places():
                raise UserError(f"The queue is full ({self._waiting} waiting). Please try again in a minute.")
            self._line.append(ticket)
            self._asks[ticket] = _Ask(user, need, own)

    def wait(self, ticket: object, seconds: float) -> int | None:
        """None once the ticket is inside; after ``seconds`` in line, how many are ahead."""
        with self._changed:
            if self._changed.wait_for(lambda: self._may_enter(ticket), timeout=seconds):
                self._line.remove(ticket)
                self._inside[ticket] = self._asks[ticket]
                self._changed.notify_all()
                return None
            return self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        """Give the place back, in line or inside."""
        with self._changed:
            self._inside.pop(ticket, None)
            self._asks.pop(ticket, None)
            if ticket in self._line:
                self._line.remove(ticket)
            self._changed.notify_all()

    def count(self) -> tuple[int, int]:
        """Requests inside and in line."""
        with self._changed:
            return len(self._inside), len(self._line)

    def promised(self) -> int:
        """Bytes that those inside may need."""
        with self._changed:
            return sum(ask.need for ask in self._inside.values())

    def _open_places(self) -> int:
        """Places that those in line are about to take; none while memory keeps the first of them waiting."""
        if self._line and not self._fits(self._asks[self._line[0]]):
            return 0
        return max(0, self._size - len(self._inside))

    def _may_enter(self, ticket: object) -> bool:
        return len(self._inside) < self._size and self._line[0] is ticket and self._fits(self._asks[ticket])

    def _fits(self, asked: _Ask) -> bool:
        if self._room is None or not asked.need:
            return True
        promised = asked.need + sum(ask.need for ask in self._inside.values())
        if (short := self._short(asked, promised)) > 0 and promised <= self._room:
            self._relieve(short)
        return self._short(asked, promised) <= 0

    def _short(self, asked: _Ask, promised: int) -> int:
        """Bytes that are missing; what is held of its own is within its need."""
        return promised + max(0, self._held() - asked.own()) - (self._room or 0)


class FairLock:
    """A lock that is handed to those who wait in order of arrival: who takes it again and again can't keep it."""

    def __init__(self) -> None:
        self._guard, self._line, self._taken = threading.Lock(), deque[threading.Lock](), False
        self._since = 0.0  # when it was taken, or others were last given a chance

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken, self._since = True, time.monotonic()
                return
            turn = threading.Lock()
            turn.acquire()
            self._line.append(turn)
        turn.acquire()  # released by the one before, who leaves the lock taken
        self._since = time.monotonic()

    def give_way(self) -> None:
        """Held: if others wait, let them have it in turn for as long as it was held."""
        held = time.monotonic() - self._since
        if self._line:
            self.__exit__(None, None, None)
            time.sleep(held)
            self.__enter__()
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._line:
                self._line.popleft().release()
            else:
                self._taken = False
