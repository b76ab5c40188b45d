"""Training jobs on this machine: what workers get, and how their ends are told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from firm.config import LaunchConfig
from firm.launch.job import TrainingJob, launch
from firm.records import UserError

WORKER = """
import os, signal, time
from firm import dist
from firm.launch.job import work
from firm.records import UserError

def train(request, folder):
    world = dist.start()
    rank = world.rank
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    match request["do"]:
        case "write":
            ranks = dist.gather([rank], world)
            (folder / f"out{rank}").write_text(f"{ranks} {request['x']}")
        case "fail":
            raise UserError("no cats", f"rank {rank}", "bring cats", usage=True)
        case "fail on 1":
            if rank == 1:
                raise UserError("no dogs", "here")
            time.sleep(60)
        case "crash":
            raise RuntimeError("a bug")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            time.sleep(60)

work(train)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """job(do): a job of the worker above."""
    (tmp_path / "jobworker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)
    return lambda do: TrainingJob("rl", "jobworker", {"do": do, "x": "日本"}, tmp_path / "work")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_get_the_request(job: Any, workers: int) -> None:
    made = job("write")
    launch(made, LaunchConfig(num_workers=workers))
    ranks = list(range(workers))
    assert [(made.folder / f"out{r}").read_text() for r in ranks] == [f"{ranks} 日本"] * workers
    assert not (made.folder / "error.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_says_is_heard_and_forgotten_by_the_next_try(job: Any, workers: int) -> None:
    with pytest.raises(UserError) as caught:
        launch(job("fail"), LaunchConfig(num_workers=workers))
    error = caught.value
    assert (error.what, error.fix, error.exit_code) == ("no cats", "bring cats", 2) and error.where.startswith("rank")
    launch(job("write"), LaunchConfig(num_workers=workers))


def test_a_failure_of_the_second_worker_ends_the_first(job: Any) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="no dogs"):
        launch(job("fail on 1"), LaunchConfig(num_workers=2))
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(("do", "how"), [("crash", "exit code 1"), ("die", "killed by signal 9")])
def test_a_silent_end_is_told(job: Any, do: str, how: str) -> None:
    with pytest.raises(UserError, match=f"the rl job.*{how}") as caught:
        launch(job(do), LaunchConfig())
    assert caught.value.exit_code == 1 and "run again to resume" in str(caught.value)


def test_a_termination_is_passed_on(job: Any) -> None:
    made = job("sleep")
    code = (
        "import json, sys; from pathlib import Path\n"
        "from firm.config import LaunchConfig; from firm.launch.job import TrainingJob, launch\n"
        f"launch(TrainingJob('rl', 'jobworker', {json.dumps(made.request)}, Path(sys.argv[1])), LaunchConfig())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(made.folder)], stderr=subprocess.PIPE, text=True)
    pid = made.folder / "pid0"
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=20)
    assert launcher.returncode != 0 and "killed by signal 15" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
