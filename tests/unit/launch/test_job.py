"""Training jobs on this machine: what workers get, and how their ends are reported."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import python_path

from firm.config.launch import LocalLaunch
from firm.launch.job import ERROR, JOB, TrainingJob
from firm.launch.launcher import launch
from firm.records import UserError
from firm.storage.artifacts import Output
from firm.storage.claims import claim

WORKER = """
import os, signal, time
from firm import dist
from firm.launch.job import worker_main
from firm.records import UserError
from firm.storage.checkpoint import Checkpoints
from firm.storage.files import parallel

def train(request, inputs, out):
    ranks = dist.start()
    rank, folder = ranks.rank, out.folder
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    match request["do"]:
        case "write":
            everyone = dist.gather([rank], ranks)
            (folder / f"out{rank}").write_text(f"{everyone} {request['x']}")
        case "fail":
            raise UserError("no cats", f"rank {rank}", "bring cats", usage=True)
        case "fail on 1":
            if rank == 1:
                raise UserError("no dogs", "here")
            time.sleep(60)
        case "crash":
            raise RuntimeError("a bug")
        case "crash beside a missing file":
            try:
                (folder / "nothing").read_text()
            except OSError:
                {}["a bug"]
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "fail while storing":
            out.publish = lambda *names: parallel(time.sleep, [200])  # a slow store
            checkpoints = Checkpoints(out)
            (checkpoints.folder / "step-1").mkdir(parents=True)
            (checkpoints.folder / "step-1" / "part").write_text("")
            checkpoints.begin("step-1", "part")
            time.sleep(1)
            raise UserError("no birds", "here")
        case "sleep":
            time.sleep(60)

worker_main(train)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """job(do): a job of the worker above."""
    (tmp_path / "jobworker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)
    return lambda do: TrainingJob("run", "rl", "jobworker", {"do": do, "x": "日本"}, {})


@pytest.fixture
def out(tmp_path: Path) -> Output:
    return Output.open(str(tmp_path / "out"))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_get_the_request(job: Any, out: Output, workers: int) -> None:
    launch(job("write"), out, LocalLaunch(num_workers=workers))
    ranks = list(range(workers))
    assert [(out.folder / f"out{r}").read_text() for r in ranks] == [f"{ranks} 日本"] * workers
    assert not (out.folder / ERROR).exists()
    assert out.files() == sorted(f"{name}{r}" for r in ranks for name in ("out", "pid"))


def test_a_job_that_ended_is_not_run_again(job: Any, out: Output) -> None:
    launch(job("write"), out, LocalLaunch())
    launch(job("crash"), out, LocalLaunch())
    assert json.loads((out.folder / JOB).read_text())["request"]["do"] == "write"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "out0").unlink(),
        lambda folder: (folder / "out0").write_text("short"),
        lambda folder: (folder / "work" / "entries.json").write_text(""),
        lambda folder: (folder / "work" / "entries.json").write_text('[{"path": "out0"}]'),
    ],
)
def test_what_a_job_left_and_is_not_whole_is_made_again(job: Any, out: Output, damage: Any, capfd: Any) -> None:
    launch(job("write"), out, LocalLaunch())
    damage(out.folder)
    launch(job("write"), out, LocalLaunch())
    assert "what the job left is damaged" in capfd.readouterr().out
    assert (out.folder / "out0").read_text() == "[0] 日本" and "out0" in [e.path for e in entries(out)]


def entries(out: Output) -> list[Any]:
    out.commit("rl", "k", {}, {}, out.files())
    manifest = out.manifest()
    assert manifest is not None
    return manifest.entries


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_worker_says_is_heard_and_forgotten_by_the_next_try(job: Any, out: Output, workers: int) -> None:
    with pytest.raises(UserError) as caught:
        launch(job("fail"), out, LocalLaunch(num_workers=workers))
    error = caught.value
    assert (error.what, error.fix, error.exit_code) == ("no cats", "bring cats", 2) and error.where.startswith("rank")
    launch(job("write"), out, LocalLaunch(num_workers=workers))


def test_a_failure_of_the_second_worker_ends_the_first(job: Any, out: Output) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="no dogs"):
        launch(job("fail on 1"), out, LocalLaunch(num_workers=2))
    assert time.monotonic() - start < 50


def test_a_worker_that_fails_does_not_wait_for_its_checkpoint(job: Any, out: Output) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="no birds"):
        launch(job("fail while storing"), out, LocalLaunch())
    assert time.monotonic() - start < 150


@pytest.mark.parametrize(
    ("do", "how"),
    [("crash", "exit code 1"), ("crash beside a missing file", "exit code 1"), ("die", "killed by signal 9")],
)
def test_a_silent_end_is_reported(job: Any, out: Output, do: str, how: str) -> None:
    with pytest.raises(UserError, match=f"the rl job.*{how}") as caught:
        launch(job(do), out, LocalLaunch())
    assert caught.value.exit_code == 1 and "run again to resume" in str(caught.value)


def test_a_folder_is_claimed_as_long_as_a_worker_of_a_killed_stage_lives(job: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code = (
        "import os, sys, threading, time; from firm.storage.artifacts import Output; from firm.config.launch import *\n"
        "from firm.launch.job import TrainingJob; from firm.launch.launcher import launch\n"
        "from firm.storage.claims import claim\n"
        "job = TrainingJob('run', 'rl', 'jobworker', {'do': 'sleep'}, {})\n"
        "with claim(sys.argv[1]) as place: launch(job, Output.open(place.uri), LocalLaunch())"
    )
    stage = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    worker = int(wait_for_text(folder / "pid0"))
    os.kill(worker, signal.SIGSTOP)  # so that it does not see that its stage has gone
    stage.kill()
    stage.wait()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(claimed, str(folder))
        time.sleep(1)
        assert not second.done()
        os.kill(worker, signal.SIGKILL)
        second.result(30)


def claimed(uri: str) -> None:
    with claim(uri):
        pass


def wait_for_text(path: Path) -> str:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    return path.read_text()


def test_a_termination_is_passed_on(job: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code = (
        "import sys; from firm.storage.artifacts import Output; from firm.config.launch import LocalLaunch\n"
        "from firm.launch.job import TrainingJob; from firm.launch.launcher import launch\n"
        "job = TrainingJob('run', 'rl', 'jobworker', {'do': 'sleep'}, {})\n"
        "launch(job, Output.open(sys.argv[1]), LocalLaunch())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True)
    pid = wait_for_text(folder / "pid0")
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=20)
    assert launcher.returncode != 0 and "exit code 143" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_asks_for_gpus_never_falls_back_to_the_cpu(job: Any, out: Output, workers: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no GPU can be used") as caught:
        launch(job("write"), out, LocalLaunch(num_workers=workers, gpus=2))
    assert "2 GPUs asked for" in caught.value.where and not list(out.folder.glob("out*"))
