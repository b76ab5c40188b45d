"""Checkpoints in parts: each rank stores its own, on a machine of its own, while work goes on."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.checkpoints import read, save
from servers import free_port
from shared import python_path

from firm.records import UserError
from firm.storage.artifacts import Output
from firm.storage.checkpoint import Checkpoints
from firm.storage.open import open_store
from firm.storage.parts import part_name, write_part

POD = """
import json
from pathlib import Path

import torch

from firm import dist
from firm.launch.job import worker_main
from firm.storage.checkpoint import Checkpoints
from firm.storage.parts import Parts, part_name, write_part

def train(request, inputs, out):
    ranks = dist.start()
    checkpoints = Checkpoints(out)
    last = checkpoints.last()
    seen = {"last": last and last.name}
    if last is None:
        for number in (1, 2, 3):
            folder = checkpoints.folder / f"step-{number}"
            write_part(folder, ranks.rank, 2, {"x": torch.full((3,), 10.0 * number + ranks.rank)})
            if ranks.is_main:
                (folder / "state.json").write_text(str(number))
            shared = ["state.json"] if ranks.is_main else []
            checkpoints.begin(folder.name, part_name(ranks.rank, 2), *shared)
        checkpoints.finish()
    else:
        seen["x"] = Parts(last, ranks).read("x", torch.zeros(3)).tolist()
    seen["files"] = sorted(str(p.relative_to(checkpoints.folder)) for p in checkpoints.folder.rglob("*") if p.is_file())
    Path(request["seen"], f"{ranks.rank}.json").write_text(json.dumps(seen))

worker_main(train)
"""


def run_pods(uri: str, folder: Path) -> list[dict[str, Any]]:
    """Run the worker above on two machines that share the store alone; what each has seen."""
    folder.mkdir()
    open_store(uri).put(
        "work/job.json",
        json.dumps({"request": {"seen": str(folder)}, "inputs": {}, "reads": {}, "streams": []}).encode(),
    )
    (folder / "pod.py").write_text(POD)
    shared = {
        "PYTHONPATH": python_path(folder), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "FIRM_LIFELINE_PID": "",
    }  # fmt: skip
    pods = []
    for rank in range(2):
        (folder / f"pod{rank}").mkdir()
        env = {**os.environ, **shared, "RANK": str(rank), "TMPDIR": str(folder / f"pod{rank}")}
        pods.append(subprocess.Popen([sys.executable, "-m", "pod", uri], env=env))
    try:
        assert [pod.wait(300) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            pod.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def files_of(number: int, rank: int) -> list[str]:
    return [f"step-{number}/{file}" for file in ("checkpoint.json", f"part-{rank}-of-2.safetensors", "state.json")]


def test_each_machine_stores_its_part_and_gets_no_other(s3_uri: str, tmp_path: Path) -> None:
    made = run_pods(s3_uri, tmp_path / "first")
    assert [pod["last"] for pod in made] == [None, None]
    assert not [file for pod in made for file in pod["files"] if "step-1" in file], "of three two are kept"
    for rank, pod in enumerate(run_pods(s3_uri, tmp_path / "second")):
        assert pod["last"] == "step-3" and pod["x"] == [30.0 + rank] * 3
        shared = [file for file in files_of(2, rank) if "part" not in file]
        assert pod["files"] == [*shared, *files_of(3, rank)]
    store = open_store(s3_uri)
    key = "work/checkpoints/step-3/part-1-of-2.safetensors"
    store.put(key, store.get(key)[:-4] + b"\0\0\0\0")
    for rank, pod in enumerate(run_pods(s3_uri, tmp_path / "third")):
        assert pod["last"] == "step-2" and pod["x"] == [20.0 + rank] * 3, "the first rank cannot see the damage"
    assert not store.list("work/checkpoints/step-3/")


def test_a_checkpoint_does_not_exist_before_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work goes on meanwhile."""
    out, going_on = Output.open(str(tmp_path)), threading.Event()
    save(out, 1)
    publish = out.publish
    monkeypatch.setattr(out, "publish", lambda *names: (going_on.wait(30), publish(*names)))
    checkpoints = Checkpoints(out)
    write_part(checkpoints.folder / "step-2", 0, 1, {"x": torch.zeros(3)})
    checkpoints.begin("step-2", part_name(0, 1))
    assert not checkpoints.overdue() and read(out) == 1
    going_on.set()
    deadline = time.monotonic() + 30
    while (last := Checkpoints(out).last()) and last.name == "step-1" and time.monotonic() < deadline:
        checkpoints.overdue()
    assert last and last.name == "step-2"


def test_what_a_kill_has_left_of_a_checkpoint_goes_with_the_next(tmp_path: Path) -> None:
    out = Output.open(str(tmp_path))
    save(out, 1)
    checkpoints = Checkpoints(out)
    for number in (2, 3):
        write_part(checkpoints.folder / f"step-{number}", 0, 1, {"x": torch.zeros(3)})
    checkpoints.begin("step-3", part_name(0, 1))
    checkpoints.finish()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-1", "step-3"]


def test_a_checkpoint_that_cannot_be_stored_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output.open(str(tmp_path))
    checkpoints = Checkpoints(out)
    write_part(checkpoints.folder / "step-1", 0, 1, {"x": torch.zeros(3)})

    def full(*names: str) -> None:
        raise UserError("disk full", "here", "free some space")

    monkeypatch.setattr(out, "publish", full)
    checkpoints.begin("step-1", part_name(0, 1))
    with pytest.raises(UserError, match="disk full"):
        checkpoints.finish()
    assert Checkpoints(out).last() is None
