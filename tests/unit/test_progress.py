"""Progress: lines of a task, events, the picture of a run, estimates, metrics."""

import io
import json
import time
from pathlib import Path

import pytest

from firm import progress
from firm.metrics import Board, MetricsLog, read_metrics
from firm.progress import ROUND, Task, duration, emit, relay
from firm.storage.artifacts import Output
from firm.watcher import StageState, Watcher


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "progress.jsonl"
    monkeypatch.setenv(progress.PROGRESS_FILE, str(path))
    monkeypatch.setattr(progress, "EVENT_EVERY_S", 0.0)
    return path


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0, "0s"), (45.4, "45s"), (59.6, "1m00s"), (185, "3m05s"), (7325, "122m05s")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_task_prints_a_line_at_its_end_and_in_between_only_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.PROGRESS_FILE, raising=False)
    task = Task("sft", "training", 3, "steps")
    task.advance()
    assert capsys.readouterr().out == ""
    task.advance(2, "loss 0.4")
    assert capsys.readouterr().out == "[sft] training: 3/3 steps, loss 0.4\n"
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    task = Task("rl", "epochs", 4, "epochs", done=1)
    assert task.left_s is None
    task._start -= 10
    task.advance()
    assert "[rl] epochs: 2/4 epochs, 20s left\n" in capsys.readouterr().out


def test_speed_counts_only_what_is_new() -> None:
    task = Task("rl", "epochs", 100, "epochs", done=90)
    task._start -= 8
    task.advance(4)
    assert task.left_s == pytest.approx(12, abs=0.5)


def test_events_go_to_the_file(file: Path) -> None:
    emit(stage="rl", state="started")
    task = Task("rl", "epochs", 2, "epochs")
    task.advance(1, "a note")
    found = events(file)
    assert found[0]["state"] == "started" and isinstance(found[0]["time"], float)
    assert [e["done"] for e in found[1:]] == [0, 1] and found[2]["note"] == "a note" and found[1]["left_s"] is None


def test_events_are_not_written_faster_than_people_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVENT_EVERY_S", 60.0)
    task = Task("rl", "epochs", 1000, "epochs")
    for _ in range(1000):
        task.advance()
    assert [e["done"] for e in events(file)] == [0, 1000]


def test_a_watcher_shows_plain_lines_off_a_terminal(file: Path) -> None:
    stream = io.StringIO()
    with Watcher(file, ["curation", "sft"], {"curation": 20, "sft": 100}, stream) as watcher:
        emit(stage="curation", state="started")
        with open(file, "a") as handle:
            handle.write('{"half": ')  # a line in the making is left alone
            handle.flush()
            time.sleep(0.5)
            handle.write("1}\n".replace("1}", '1, "stage": "curation", "state": "reused", "time": 1.0}'))
        emit(stage="sft", state="started")
        emit(stage="sft", task="training", done=5, total=5, unit="steps", note="日本", left_s=None)
        emit(stage="sft", state="failed", message="no space")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[curation] started (run: about") and lines[1].startswith("[curation] reused (run")
    assert lines[3].startswith("[sft] training: 5/5 steps, 日本") and lines[4].startswith("[sft] failed after")
    assert len(lines) == 5 and "\x1b" not in stream.getvalue()
    assert watcher.failure is not None and watcher.failure["message"] == "no space"
    assert watcher.stages["curation"].state == "reused" and watcher.left_s == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_watcher_draws_a_picture_on_a_terminal(file: Path) -> None:
    stream = Terminal()
    with Watcher(file, ["curation", "sft"], {"curation": 20}, stream):
        emit(stage="curation", state="started")
        emit(stage="curation", task="judging", done=1, total=4, unit="images", note="", left_s=9.0)
        emit(stage="unforeseen", state="started")
    assert "judging 1/4 images" in stream.getvalue() and "unforeseen" in stream.getvalue()


def test_a_watcher_tells_rounds_apart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Watcher(file, ["rl"], {"rl": 20}, stream, rounds=2) as watcher:
        for number in ("1", "2"):
            monkeypatch.setenv(ROUND, number)
            emit(stage="rl", state="started")
            emit(stage="rl", state="finished")
    assert [line.split("]")[0] for line in stream.getvalue().splitlines()] == ["[rl 1", "[rl 1", "[rl 2", "[rl 2"]
    assert list(watcher.stages) == ["rl 1", "rl 2"] and watcher.left_s == 0


def test_estimates_of_a_stage() -> None:
    state = StageState(expected_s=100)
    assert state.left_s == 100 and StageState(None).left_s is None
    state.state, state.started = "started", time.time() - 30
    assert state.left_s == pytest.approx(70, abs=1)
    state.last = {"left_s": 500.0}
    assert state.left_s == 500
    state.state, state.ended = "finished", time.time()
    assert state.left_s == 0 and state.elapsed_s == pytest.approx(30, abs=1)


def test_a_faster_task_shortens_the_estimate() -> None:
    """Once a task has a measured speed, that counts and not the expectation."""
    state = StageState(expected_s=1000, state="started", started=time.time() - 30)
    state.last = {"left_s": 10.0, "done": 75, "total": 100}
    left = state.left_s
    assert left is not None and left < 100


def test_an_unknown_stage_makes_the_run_unknown(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "new" / "p.jsonl", ["a", "b"], {"a": 10}, io.StringIO())
    assert watcher.left_s is None
    watcher.stages["b"].state = "finished"
    assert watcher.left_s == 10


def test_metrics_keep_what_is_not_redone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    out = Output.open(str(tmp_path))
    log = MetricsLog(path, Board(out, 0), 0)
    for step in range(1, 5):
        log.write(step, {"loss": 1 / step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    again = MetricsLog(path, Board(out, 2), 2)
    again.write(3, {"loss": 9.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "[sft] training the critic: 100/1500 steps, 2m05s left, loss 0.512",
            ("sft", "training the critic", 100, 1500, 125, "loss 0.512"),
        ),
        (
            "[rl] DiffusionNFT: 80/80 epochs, reward 0.6, auditor 3.5",
            ("rl", "DiffusionNFT", 80, 80, None, "reward 0.6, auditor 3.5"),
        ),
        ("[rl] DiffusionNFT: 0/80 epochs", ("rl", "DiffusionNFT", 0, 80, None, "")),
    ],
)
def test_a_line_from_another_machine_is_an_event_again(
    line: str,
    expected: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FIRM_PROGRESS_FILE", str(tmp_path / "events"))
    relay("anything else")
    relay(line)
    [event] = [json.loads(text) for text in (tmp_path / "events").read_text().splitlines()]
    assert tuple(event[k] for k in ("stage", "task", "done", "total", "left_s", "note")) == expected
    assert capsys.readouterr().out == f"anything else\n{line}\n"
