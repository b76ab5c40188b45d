"""Requests to endpoints, for whoever watches a run: how many, how long they took, how many failed."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


LATEST = 10_000
"""Of so many requests the seconds are kept: not everybody who asks takes the numbers."""


class _Requests:
    """Requests to one model."""

    def __init__(self) -> None:
        self.number = self.failed = 0
        self.seconds: deque[float] = deque(maxlen=LATEST)


class Traffic:
    """Requests since the numbers were last taken; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[str, _Requests] = defaultdict(_Requests)

    def count(self, model: str, seconds: float, failed: bool) -> None:
        """Count a request, with the tries that were needed."""
        with self._lock:
            requests = self._requests[model]
            requests.number += 1
            requests.failed += failed
            requests.seconds.append(seconds)

    def take(self) -> dict[str, float]:
        """Numbers by name, from zero again: requests of each model, failed ones, median and longest seconds."""
        with self._lock:
            taken, self._requests = self._requests, defaultdict(_Requests)
        found = {}
        for model, requests in taken.items():
            seconds = sorted(requests.seconds)
            found[f"requests/{model}"] = float(requests.number)
            found[f"requests/{model}/failed"] = float(requests.failed)
            found[f"requests/{model}/seconds_median"] = seconds[len(seconds) // 2]
            found[f"requests/{model}/seconds_longest"] = seconds[-1]
        return found


TRAFFIC = Traffic()
"""Of this process."""


def counted(complete: Callable[..., R]) -> Callable[..., R]:
    """A client's method that asks a model, whose requests are to be counted under the client's ``name``."""

    @functools.wraps(complete)
    def counting(client: Any, *arguments: Any, **options: Any) -> R:
        start = time.monotonic()
        failed = True
        try:
            reply = complete(client, *arguments, **options)
            failed = False
            return reply
        finally:
            TRAFFIC.count(client.name, time.monotonic() - start, failed)

    return counting
