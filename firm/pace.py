"""How fast a job works and what it takes: seconds of its parts, images a second, memory, requests to judges.

Two equal runs differ in these numbers, so they are never part of an artifact: see `firm.metrics.Board`.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from firm.chat.traffic import TRAFFIC

GB = 10**9


class Pace:
    """Of this process, since the numbers were last taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds inside as those of a part of the work."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - start

    def take(self, images: int = 0) -> dict[str, float]:
        """The numbers by name, from zero again; memory is the peak.

        Args:
            images: How many of them all processes have made and judged in this time.
        """
        seconds, self._seconds = self._seconds, defaultdict(float)
        found = {f"seconds/{name}": value for name, value in seconds.items()}
        if images:
            found["images_a_second"] = images / max(sum(seconds.values()), 1e-9)
        return found | memory() | TRAFFIC.take()


def memory() -> dict[str, float]:
    """Peak GB of this process so far, and of its GPU since the last time."""
    import torch

    found = {"memory/process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if torch.cuda.is_available():
        found["memory/gpu_gb"] = torch.cuda.max_memory_allocated() / GB
        torch.cuda.reset_peak_memory_stats()
    return found
