"""Progress and metrics of long work.

A stage opens a :class:`Task` and updates it. Updates become plain lines in the stage's own log and, where
``FIRM_PROGRESS_FILE`` is set (``firm run`` sets it for every process it starts), JSON events in that file, which
:class:`Watcher` shows as one live picture of the whole run on a terminal, or as plain lines elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PROGRESS_FILE = "FIRM_PROGRESS_FILE"
LINE_EVERY_S = 10.0
EVENT_EVERY_S = 0.5


def emit(**event: Any) -> None:
    """Append one event to the run's progress file, if there is one. One write per line: lines never interleave."""
    if path := os.environ.get(PROGRESS_FILE):
        with suppress(OSError), open(path, "a") as file:  # a full disk is told by what needed it
            file.write(json.dumps({"time": time.time(), **event}) + "\n")


class Task:
    """A countable piece of a stage's work. ``done`` counts resumed work too; speed counts only what is new."""

    def __init__(self, stage: str, name: str, total: int, unit: str, done: int = 0) -> None:
        """Start at ``done`` of ``total`` ``unit`` (a plural noun)."""
        self.stage, self.name, self.total, self.unit = stage, name, total, unit
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
        now, last = time.monotonic(), self.done >= self.total
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
            print(_line(self.stage, self.name, self.done, self.total, self.unit, note, self.left_s), flush=True)


def duration(seconds: float | None) -> str:
    """Seconds for people: "45s", "3m05s"."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _line(stage: str, task: str, done: int, total: int, unit: str, note: str, left_s: float | None) -> str:
    left = f", {duration(left_s)} left" if left_s is not None and done < total else ""
    return f"[{stage}] {task}: {done}/{total} {unit}{left}{', ' + note if note else ''}"


_TOLD = re.compile(
    r"\[(?P<stage>\w+)\] (?P<task>[^:]+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+)"
    r"(?:, (?:(?P<minutes>\d+)m)?(?P<seconds>\d+)s left)?(?:, (?P<note>.*))?"
)


def relay(line: str) -> None:
    """Print a line that came from another machine; where it tells of a task, pass that on as an event too."""
    print(line, flush=True)
    if told := _TOLD.fullmatch(line):
        stage, task, done, total, unit, minutes, seconds, note = told.groups()
        left_s = None if seconds is None else int(minutes or 0) * 60 + int(seconds)
        emit(stage=stage, task=task, done=int(done), total=int(total), unit=unit, note=note or "", left_s=left_s)


# ---- the picture of a whole run ---------------------------------------------------------------------------------


@dataclass
class StageState:
    """What the watcher knows of one stage."""

    expected_s: float | None
    state: str = "waiting"
    started: float = 0.0
    ended: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        """Seconds since it started, until it ended."""
        return (self.ended or time.time()) - self.started if self.started else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds left: the expectation at first, the measured speed of its task after."""
        if self.state in ("finished", "reused", "failed"):
            return 0.0
        expected = max(self.expected_s - self.elapsed_s, 0.0) if self.expected_s is not None else None
        measured: float | None = self.last.get("left_s")
        return expected if measured is None else measured


class Watcher:
    """Follows a progress file in a thread and shows the run on ``stream``."""

    def __init__(self, path: Path, stages: Sequence[str], expected_s: Mapping[str, float], stream: TextIO) -> None:
        """Watch ``path`` (created empty) for events of ``stages``."""
        self.path, self.stream = path, stream
        self.stages = {name: StageState(expected_s.get(name)) for name in stages}
        self.failure: dict[str, Any] | None = None
        self._stop, self._offset, self._line = threading.Event(), 0, 0.0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def left_s(self) -> float | None:
        """Seconds left of the whole run; None when a stage's time is unknown."""
        known = [state.left_s for state in self.stages.values()]
        return None if None in known else sum(s for s in known if s is not None)

    def _follow(self) -> None:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            with Live(console=Console(file=self.stream), refresh_per_second=4, get_renderable=self._table):
                while not self._stop.wait(0.2):
                    self._read()
                self._read()
            return
        while not self._stop.wait(0.2):
            self._print(self._read())
        self._print(self._read())

    def _read(self) -> list[dict[str, Any]]:
        with open(self.path) as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind("\n") + 1]
        self._offset += len(complete.encode())
        events = [json.loads(line) for line in complete.splitlines()]
        for event in events:
            self._apply(event)
        return events

    def _apply(self, event: dict[str, Any]) -> None:
        state = self.stages.setdefault(event["stage"], StageState(None))
        if "state" not in event:
            state.last = event
            return
        state.state = event["state"]
        if event["state"] == "started":
            state.started, state.ended = event["time"], 0.0
        else:
            state.ended = event["time"]
            if event["state"] == "failed":
                self.failure = event

    def _print(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            name, now = event["stage"], time.monotonic()
            if "state" in event:
                state = self.stages[name]
                took = f" after {duration(state.elapsed_s)}" if event["state"] in ("finished", "failed") else ""
                self.stream.write(f"[{name}] {event['state']}{took} (run: about {duration(self.left_s)} left)\n")
            elif now - self._line >= LINE_EVERY_S or event["done"] >= event["total"]:
                self._line = now
                text = _line(name, *(event[k] for k in ("task", "done", "total", "unit", "note", "left_s")))
                self.stream.write(f"{text} (run: about {duration(self.left_s)} left)\n")
            self.stream.flush()

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column, width in (("stage", 9), ("", 1), ("progress", 20), ("time", 6), ("left", 6), ("", None)):
            table.add_column(column, overflow="ellipsis", no_wrap=True, min_width=width)
        marks = {"waiting": "·", "started": "▶", "finished": "✔", "reused": "✔", "failed": "✘"}
        for name, state in self.stages.items():
            done, total = state.last.get("done", 0), state.last.get("total", 1)
            ended = state.state in ("finished", "reused")
            bar = ProgressBar(total=1 if ended else total, completed=1 if ended else done, width=20)
            what = "already there" if state.state == "reused" else _what(state)
            spent = duration(state.elapsed_s) if state.started else ""
            left = "" if ended else duration(state.left_s)
            table.add_row(name, marks[state.state], bar, spent, left, what)
        table.add_row("", "", "", "run", duration(self.left_s), "")
        return table


def _what(state: StageState) -> str:
    last = state.last
    if not last or state.state == "waiting":
        return ""
    note = f", {last['note']}" if last["note"] else ""
    return f"{last['task']} {last['done']}/{last['total']} {last['unit']}{note}"


# ---- metrics ----------------------------------------------------------------------------------------------------


class MetricsLog:
    """Metrics of a training run: ``metrics.jsonl`` (deterministic) and TensorBoard events beside the artifact."""

    def __init__(self, path: Path, tensorboard: Path, keep: int) -> None:
        """Append to ``path`` after its first ``keep`` lines; later lines belong to work that is being redone."""
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
        path.write_text("".join(lines))
        self._file = open(path, "a")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(str(tensorboard), purge_step=keep)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of values at ``step``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stdout_is_terminal() -> bool:
    """True when a person is watching."""
    return sys.stdout.isatty()
