"""Curation over the real HTTP protocol: the same judgements, and no request twice whatever dies in between."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shared import rendered, small_run, stage_command

from firm.config.loading import load_config
from firm.records import JudgedCandidate, Manifest
from firm.shapes.serve import teacher_server
from firm.storage.inputs import read_manifest, read_ref
from firm.storage.shards import iter_shards

ROWS = 96
DIMENSIONS = 2
CONCURRENCY = 4
SMALL = small_run(rendered(ROWS), shard_size=16, batch_size=8, test_share=0.25)
# The teacher's server; it logs every request that it receives: its kind and a hash of what was asked.
SERVER = """
import hashlib, json, os, sys, time
from firm.chat.client import PythonClient
from firm.chat.server import ChatServer
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

class Logging(PythonClient):
    def complete(self, messages, **options):
        text = json.dumps([messages, options], sort_keys=True)
        kind = "rating" if "image_url" in text else "plan"
        os.write(log, f"{kind} {hashlib.sha256(text.encode()).hexdigest()}\\n".encode())
        time.sleep(0.01)
        return super().complete(messages, **options)

teacher = Logging("firm.shapes.teacher:PixelTeacher")
teacher.name = "pixel-teacher"
ChatServer(teacher, port=int(sys.argv[1])).serve()
"""


class Teacher:
    """The logging server in a process of its own, always at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.log = folder / "requests"
        self.process = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, str(self.port), str(self.log)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0, "the teacher does not listen")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def requests(self, kind: str) -> Counter[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(line.split()[1] for line in lines if line.startswith(kind))

    def forget(self) -> None:
        self.log.write_text("")


def until(done: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def settings(folder: Path, url: str | None, *assignments: str) -> dict[str, Any]:
    (folder / "small.yaml").write_text(SMALL)
    chat = f"{{kind: endpoint, base_url: '{url}', model: pixel-teacher, concurrency: {CONCURRENCY}, deadline_s: 2}}"
    judges = [f"curation.{who}={chat}" for who in ("planner", "evaluator")] if url else []
    config = load_config(str(folder / "small.yaml"), [f"store={folder}", *judges, *assignments])
    return config.model_dump(mode="json", exclude_none=True)


def start(folder: Path, config: dict[str, Any]) -> subprocess.Popen[str]:
    command = stage_command("curation", config, {}, folder / "data")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def curate(folder: Path, url: str | None, *assignments: str) -> tuple[Path, Manifest]:
    """Run the stage to its end; its artifact."""
    process = start(folder, settings(folder, url, *assignments))
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    ref = read_ref(folder / "data")
    return Path(ref.uri), read_manifest(ref)


def stop_when(folder: Path, url: str, ready: Callable[[], bool], strike: Callable[[int], None]) -> tuple[int, str]:
    """Start the stage and strike once ready; its exit code and what it said."""
    process = start(folder, settings(folder, url))
    until(lambda: ready() or process.poll() is not None, "curation never got there")
    assert process.poll() is None, process.communicate()
    strike(process.pid)
    _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    server = Teacher(tmp_path_factory.mktemp("teacher"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def whole(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """An artifact made without interruption, from the same address."""
    made = curate(tmp_path_factory.mktemp("whole"), teacher.url)
    assert teacher.requests("rating").total() == ROWS * DIMENSIONS
    plans = teacher.requests("plan")
    assert 0 < plans.total() == len(plans) <= ROWS
    return made


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("small/curation-*/judged/part-*.parquet"))


def test_the_endpoint_judges_as_the_teacher_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "far").mkdir()
    near, _ = curate(tmp_path / "near", None)
    with teacher_server().running() as url:
        far, _ = curate(tmp_path / "far", url)
    columns = [
        [j.model_dump(exclude={"provenance": {"teacher"}}) for j in iter_shards(f / "judged", JudgedCandidate)]
        for f in (near, far)
    ]
    assert columns[0] == columns[1] and len(columns[0]) == ROWS
    assert {j.provenance.teacher for j in iter_shards(far / "judged", JudgedCandidate)} == {"pixel-teacher"}
    for split in ("train", "test"):
        assert (near / split / "part-00000.parquet").read_bytes() == (far / split / "part-00000.parquet").read_bytes()


def test_killed_again_and_again_nothing_is_asked_twice(
    teacher: Teacher, whole: tuple[Path, Manifest], tmp_path: Path
) -> None:
    teacher.forget()
    kills = (10, 90, 150)  # ratings: in the first shard, and after others were finished
    for number in kills:
        before = {p: p.stat().st_mtime_ns for p in shards(tmp_path)}
        code, _ = stop_when(
            tmp_path,
            teacher.url,
            lambda number=number: teacher.requests("rating").total() >= number,  # type: ignore[misc]
            lambda pid: os.kill(pid, signal.SIGKILL),
        )
        assert code == -signal.SIGKILL
        assert before == {p: p.stat().st_mtime_ns for p in before}, "a finished shard was written again"
    assert shards(tmp_path)
    folder, manifest = curate(tmp_path, teacher.url)
    asked = teacher.requests("rating")
    assert len(asked) == ROWS * DIMENSIONS <= asked.total() <= ROWS * DIMENSIONS + CONCURRENCY * len(kills)
    plans = teacher.requests("plan")
    assert plans.total() <= len(plans) + len(kills)  # one at a time
    assert manifest == whole[1]
    for entry in manifest.entries:
        assert (folder / entry.path).read_bytes() == (whole[0] / entry.path).read_bytes()
    assert not (folder / "work").exists()


def test_a_server_that_dies_is_named_and_the_run_goes_on_when_it_is_back(
    teacher: Teacher, whole: tuple[Path, Manifest], tmp_path: Path
) -> None:
    teacher.forget()
    code, said = stop_when(
        tmp_path, teacher.url, lambda: teacher.requests("rating").total() >= 80, lambda _: teacher.kill()
    )
    teacher.start()
    assert code == 1 and "Traceback" not in said
    assert said.count("error: ") == 1 and teacher.url in said and "\n  -> " in said
    _, manifest = curate(tmp_path, teacher.url)
    asked = teacher.requests("rating")
    assert len(asked) == ROWS * DIMENSIONS <= asked.total() <= ROWS * DIMENSIONS + CONCURRENCY
    assert manifest == whole[1]


def test_a_finished_curation_asks_nobody(teacher: Teacher, whole: tuple[Path, Manifest]) -> None:
    teacher.forget()
    _, manifest = curate(whole[0].parent.parent, teacher.url)
    assert manifest == whole[1] and not teacher.log.read_text()
