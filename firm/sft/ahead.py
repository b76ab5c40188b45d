"""What the next step needs is prepared while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Ahead(Iterator[T]):
    """What an iterator gives, in its order, prepared by one thread; an error of its own comes in its place.

    The first is prepared by who asks for it, as ranks may have to begin together.
    """

    def __init__(self, source: Iterator[T], number: int, thread: ThreadPoolExecutor) -> None:
        """``number``: how many are prepared before they are asked for."""
        self._source = source
        self._number = number
        self._thread = thread
        self._waiting = deque[Future[T]]()

    def __next__(self) -> T:
        made = self._waiting.popleft().result() if self._waiting else next(self._source)
        while len(self._waiting) < self._number:
            self._waiting.append(self._thread.submit(next, self._source))
        return made


def one_thread() -> ThreadPoolExecutor:
    """A thread that pins memory, if it does, for the GPU of the thread that calls this."""
    if torch.cuda.is_available():
        return ThreadPoolExecutor(1, "ahead", torch.cuda.set_device, (torch.cuda.current_device(),))
    return ThreadPoolExecutor(1, "ahead")
