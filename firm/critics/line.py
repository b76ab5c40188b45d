"""Questions that wait for a critic, those of the least demanding callers in front."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

from firm.chat.messages import Caller, Reply
from firm.critics.asked import Question
from firm.critics.pen import Manner


@dataclass(eq=False)
class Asked:
    """A question that waits for its answer.

    Attributes:
        question: It.
        manner: How the answer is to be written.
        caller: Who waits.
        reply: The answer; cancelled where the caller has left.
    """

    question: Question
    manner: Manner
    caller: Caller
    reply: Future[Reply]

    def settle(self, outcome: Reply | Exception) -> None:
        """Give the caller an answer or an error, unless it has left."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.reply.set_exception(outcome)
            else:
                self.reply.set_result(outcome)


class Line:
    """What waits; where a question stands changes with what its caller has cost meanwhile.

    Args:
        max_pixels: Most pixels of questions that are taken together, unless one has more.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._waiting: list[Asked] = []
        self._change = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, asked: Asked) -> None:
        """Add a question."""
        with self._change:
            self._waiting.append(asked)
            self._change.notify()

    def drop(self, asked: Asked) -> None:
        """Remove a question, if it is here."""
        with self._change, suppress(ValueError):
            self._waiting.remove(asked)

    def take(self, size: int, patience_s: float = 0.0) -> list[Asked]:
        """Wait for the first questions, up to so many; ``patience_s`` is how long the first one waits for more."""
        taken: list[Asked] = []
        pixels, end = 0, math.inf
        with self._change:
            while len(taken) < size:
                left_s = None if end == math.inf else max(0.0, end - time.monotonic())
                if not self._change.wait_for(lambda: self._waiting, left_s):
                    break
                first = min(self._waiting, key=lambda asked: asked.caller.standing())
                pixels += first.question.pixels
                if taken and pixels > self._max_pixels:
                    break
                self._waiting.remove(first)
                taken.append(first)
                end = min(end, time.monotonic() + patience_s)
        return taken
