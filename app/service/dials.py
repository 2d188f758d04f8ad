"""Thresholds that are moved while runs go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from app.errors import UserError
from modification.config import check_threshold


class Dial:
    """A session's threshold, readable while a run goes on; with a shift per MoD layer, a threshold for each."""

    def __init__(self, p: float, shifts: tuple[float, ...] = ()) -> None:
        self.p, self.shifts = threshold(p), shifts

    def __call__(self) -> float | tuple[float, ...]:
        if not any(self.shifts):
            return self.p
        return tuple(min(1.0, max(0.0, self.p + shift)) for shift in self.shifts)


class Dials:
    """The dials of runs under way, by session."""

    def __init__(self) -> None:
        self._held: dict[str, Dial] = {}

    @contextlib.contextmanager
    def hold(self, key: str, dial: Dial) -> Iterator[Dial]:
        """Let it be moved under that key meanwhile."""
        self._held[key] = dial
        try:
            yield dial
        finally:
            if self._held.get(key) is dial:
                del self._held[key]

    def move(self, key: str, p: float, shifts: Sequence[float] | None = None) -> float:
        """Move a dial, if there is one there; the threshold."""
        value = threshold(p)
        if (dial := self._held.get(key)) is not None:
            dial.p = value
            if shifts is not None and len(shifts) == len(dial.shifts):
                dial.shifts = tuple(shifts)
        return value


def threshold(p: object) -> float:
    """A threshold; UserError says what is wrong with it."""
    try:
        return check_threshold(p)
    except ValueError as error:
        raise UserError(f"{error}.") from error
