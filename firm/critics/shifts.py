"""Who may use the one model: short work in front, and long work behind it, a little at a time."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.2
"""Part of the time that work behind gets while there is work in front."""
LONG = 4
MIN_LONG_S = 0.1
"""A batch takes too long after so many times the usual seconds, but not before so many."""
MAX_DEBT_S = 0.1


class Shifts:
    """Lets one thread at a time work."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._working = False
        self._waiting = {"front": 0, "behind": 0}
        self._owed_s = 0.0  # time that work behind should have had
        self._usual_s = 0.0  # of a batch, about

    @contextmanager
    def front(self) -> Iterator[None]:
        """Work at once."""
        began = self._begin("front")
        try:
            yield
        finally:
            self._end("front", began)

    @contextmanager
    def batch(self) -> Iterator[Callable[[], bool]]:
        """Answer a batch at once; yields a function that says whether it has taken too long since its first call."""
        with self.front():
            began = time.monotonic()
            limit_s = max(MIN_LONG_S, LONG * self._usual_s)
            first = functools.cache(time.monotonic)
            yield lambda: time.monotonic() - first() > limit_s
            self._usual_s += 0.2 * (min(time.monotonic() - began, limit_s) - self._usual_s)

    @contextmanager
    def behind(self) -> Iterator[Callable[[], bool]]:
        """Work in what time is left; yields what to call every now and then, to give way to others."""
        began = self._begin("behind")

        def give_way() -> bool:
            nonlocal began
            self._end("behind", began)
            began = self._begin("behind")
            return False

        try:
            yield give_way
        finally:
            self._end("behind", began)

    def _begin(self, place: str) -> float:
        """Wait for the turn of work in front or behind; returns the time."""
        with self._change:
            self._waiting[place] += 1
            self._change.wait_for(lambda: not self._working and self._due(place))
            self._waiting[place] -= 1
            self._working = True
            return time.monotonic()

    def _due(self, place: str) -> bool:
        first = "behind" if self._owed_s > 0 else "front"
        return place == first or not self._waiting[first]

    def _end(self, place: str, began: float) -> None:
        with self._change:
            took = time.monotonic() - began
            self._owed_s += -took if place == "behind" else took * SHARE / (1 - SHARE)
            self._owed_s = min(max(self._owed_s, -MAX_DEBT_S), MAX_DEBT_S)
            self._working = False
            self._change.notify_all()
