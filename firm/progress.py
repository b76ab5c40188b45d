"""Progress of long work: a stage opens a :class:`Task` and updates it.

Updates become plain lines in the stage's own log and, where ``FIRM_PROGRESS_FILE`` is set (``firm run`` sets it for
every process it starts), JSON events in that file, which `firm.watcher` shows.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from typing import Any

PROGRESS_FILE = "FIRM_PROGRESS_FILE"
ROUND = "FIRM_ROUND"
LINE_EVERY_S = 10.0
EVENT_EVERY_S = 0.5


def emit(**event: Any) -> None:
    """Append one event of this round to the run's progress file, if there is one; lines never interleave."""
    if path := os.environ.get(PROGRESS_FILE):
        with suppress(OSError), open(path, "a") as file:  # a full disk is reported by the code that needs it
            file.write(json.dumps({"time": time.time(), "round": int(os.environ.get(ROUND, "1")), **event}) + "\n")


class Task:
    """A countable piece of a stage's work. ``done`` counts resumed work too; speed counts only what is new."""

    def __init__(self, stage: str, name: str, total: int, unit: str, done: int = 0) -> None:
        """Start at ``done`` of ``total`` ``unit`` (a plural noun)."""
        self.stage = stage
        self.name = name
        self.total = total
        self.unit = unit
        self.done = self._first = done
        self._start = self._line = time.monotonic()
        self._event = 0.0
        self._report("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more as done; ``note`` is a short remark such as "loss 0.41"."""
        self.done += count
        self._report(note)

    @property
    def left_s(self) -> float | None:
        """Seconds left at the speed so far; None before anything was done."""
        new = self.done - self._first
        return (time.monotonic() - self._start) / new * (self.total - self.done) if new else None

    def _report(self, note: str) -> None:
        now = time.monotonic()
        last = self.done >= self.total
        if last or now - self._event >= EVENT_EVERY_S:
            self._event = now
            emit(
                stage=self.stage,
                task=self.name,
                done=self.done,
                total=self.total,
                unit=self.unit,
                note=note,
                left_s=self.left_s,
            )
        if last or now - self._line >= LINE_EVERY_S:
            self._line = now
            log_line(task_line(self.stage, self.name, self.done, self.total, self.unit, note, self.left_s))


def duration(seconds: float | None) -> str:
    """Seconds for people: "45s", "3m05s"."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def task_line(stage: str, task: str, done: int, total: int, unit: str, note: str, left_s: float | None) -> str:
    """A task's state as a log line, which `relay` parses."""
    left = f", {duration(left_s)} left" if left_s is not None and done < total else ""
    return f"[{stage}] {task}: {done}/{total} {unit}{left}{', ' + note if note else ''}"


_TASK_LINE = re.compile(
    r"\[(?P<stage>\w+)\] (?P<task>[^:]+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+)"
    r"(?:, (?:(?P<minutes>\d+)m)?(?P<seconds>\d+)s left)?(?:, (?P<note>.*))?"
)


def log_line(text: str) -> None:
    """Print a line into the stage's log."""
    print(text, flush=True)


def relay(line: str) -> None:
    """Print a log line of another machine; a `task_line` also becomes an event."""
    log_line(line)
    if match := _TASK_LINE.fullmatch(line):
        stage, task, done, total, unit, minutes, seconds, note = match.groups()
        left_s = None if seconds is None else int(minutes or 0) * 60 + int(seconds)
        emit(stage=stage, task=task, done=int(done), total=int(total), unit=unit, note=note or "", left_s=left_s)
