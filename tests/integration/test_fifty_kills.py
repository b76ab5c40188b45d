"""A whole small run with judges at an endpoint, killed at fifty random moments: fifty times the same artifacts."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from integration.asked import Teacher
from integration.kills import VICTIMS, alive, wait_for_end
from shared import whole_run

from firm.records import Manifest

pytestmark = pytest.mark.endurance
CONCURRENCY = 4
KILLS = 50


@pytest.fixture(scope="module")
def config(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    judge = {
        "kind": "endpoint", "base_url": teacher.url, "model": "pixel-teacher", "concurrency": CONCURRENCY,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(whole_run(judge))
    return path


def start(folder: Path, config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "firm.cli", "run", str(config), "--set", f"store={folder}"]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, config: Path) -> None:
    assert start(folder, config).wait(300) == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def manifests(folder: Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for path in (folder / "small").glob("*-*/manifest.json")}
    return {Manifest.model_validate_json(content).stage: content for content in found.values()}


class Whole(NamedTuple):
    """What a run has left and asked, and the seconds that it took."""

    manifests: dict[str, bytes]
    seconds: float
    asked: Counter[str]


@pytest.fixture(scope="module")
def whole(teacher: Teacher, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "runs"
    began = time.monotonic()
    finish(folder, config)
    return Whole(manifests(folder), time.monotonic() - began, teacher.requests(""))


@pytest.mark.parametrize("number", range(KILLS))
def test_it_ends_as_if_it_had_not_been_killed(
    teacher: Teacher, config: Path, whole: Whole, tmp_path: Path, number: int
) -> None:
    chance = random.Random(number)
    victim = list(VICTIMS)[number % len(VICTIMS)]
    teacher.forget()
    process = start(tmp_path / "runs", config)
    time.sleep(chance.uniform(0.02, 0.98) * whole.seconds)
    below = alive(process.pid)
    if process.poll() is None:
        VICTIMS[victim](process.pid)
    process.wait(300)
    wait_for_end(below)
    finish(tmp_path / "runs", config)
    assert manifests(tmp_path / "runs") == whole.manifests, victim
    again = teacher.requests("") - whole.asked
    assert again.total() <= CONCURRENCY, f"{victim}: asked again {again}"
    assert not list((tmp_path / "runs").glob("small/*/work"))
