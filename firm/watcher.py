"""Shows a run while it works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from firm.progress import LINE_EVERY_S, duration, task_line


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

    def __init__(
        self, path: Path, stages: Sequence[str], expected_s: Mapping[str, float], stream: TextIO, rounds: int = 1
    ) -> None:
        """Watch ``path`` (created empty) for events of ``stages``, which run ``rounds`` times."""
        self.path = path
        self.stream = stream
        self.rounds = rounds
        self.stages = {
            self._name(name, number): StageState(expected_s.get(name))
            for number in range(1, rounds + 1)
            for name in stages
        }
        self.failure: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._offset = 0
        self._line = 0.0
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

    def _name(self, stage: str, number: int) -> str:
        return stage if self.rounds == 1 else f"{stage} {number}"

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
            event["stage"] = self._name(event["stage"], event.get("round", 1))
            self._apply(event)
        return events

    def _apply(self, event: dict[str, Any]) -> None:
        state = self.stages.setdefault(event["stage"], StageState(None))
        if "state" not in event:
            state.last = event
            return
        state.state = event["state"]
        if event["state"] == "started":
            state.started = event["time"]
            state.ended = 0.0
        else:
            state.ended = event["time"]
            if event["state"] == "failed":
                self.failure = event

    def _print(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            name = event["stage"]
            now = time.monotonic()
            if "state" in event:
                state = self.stages[name]
                took = f" after {duration(state.elapsed_s)}" if event["state"] in ("finished", "failed") else ""
                self.stream.write(f"[{name}] {event['state']}{took} (run: about {duration(self.left_s)} left)\n")
            elif now - self._line >= LINE_EVERY_S or event["done"] >= event["total"]:
                self._line = now
                text = task_line(name, *(event[k] for k in ("task", "done", "total", "unit", "note", "left_s")))
                self.stream.write(f"{text} (run: about {duration(self.left_s)} left)\n")
            self.stream.flush()

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column, width in (
            ("stage", 9 if self.rounds == 1 else 11),
            ("", 1),
            ("progress", 20),
            ("time", 6),
            ("left", 6),
            ("", None),
        ):
            table.add_column(column, overflow="ellipsis", no_wrap=True, min_width=width)
        marks = {"waiting": "·", "started": "▶", "finished": "✔", "reused": "✔", "failed": "✘"}
        for name, state in self.stages.items():
            done = state.last.get("done", 0)
            total = state.last.get("total", 1)
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
