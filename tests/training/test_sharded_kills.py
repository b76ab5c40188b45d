"""Two ranks that share a critic's parameters, killed at random moments: always the same critic, bit by bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from integration.kills import VICTIMS, alive, wait_for_end
from training.critics import request

from firm.lifeline import LIFELINE
from firm.storage.artifacts import Output

pytestmark = pytest.mark.endurance
KILLS = 10
STEPS = 24  # of 20 that an epoch has
START = """
import json, sys
from firm import lifeline
from firm.config.launch import LocalLaunch
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.records import ArtifactRef
from firm.storage.artifacts import Output
lifeline.exit_with_parent()
folder, asked, data = sys.argv[1:]
job = TrainingJob("run", "sft", "firm.sft.train", json.loads(asked), {"data": ArtifactRef(**json.loads(data))})
launch(job, Output.open(folder), LocalLaunch(num_workers=2))
"""


@pytest.fixture(scope="module")
def command(data: Path) -> list[str]:
    """Starts the job; its folder is to follow `python -c START`."""
    artifact = Output.open(str(data))
    ref = artifact.commit("curation", "k", {}, {}, artifact.files())
    few = request(batch_size=8, max_steps=STEPS, checkpoint_steps=3, learning_rate=1e-3, sharding="full")
    return [json.dumps(few), ref.model_dump_json()]


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in os.environ.items() if name != LIFELINE}
    log = (folder.parent / "log").open("ab")
    line = [sys.executable, "-c", START, str(folder), *command]
    return subprocess.Popen(line, stdout=log, stderr=log, env=env, start_new_session=True)


def finish(folder: Path, command: list[str]) -> dict[str, bytes]:
    """Run to the end; the files that are left of it."""
    assert start(folder, command).wait(900) == 0, (folder.parent / "log").read_text()[-3000:]
    return {name: (folder / name).read_bytes() for name in Output.attach(str(folder)).files()}


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What a job that nothing disturbed leaves, and its seconds."""
    began = time.monotonic()
    return finish(tmp_path_factory.mktemp("whole") / "out", command), time.monotonic() - began


@pytest.mark.parametrize("number", range(KILLS))
def test_it_ends_as_if_it_had_not_been_killed(
    command: list[str], whole: tuple[dict[str, bytes], float], tmp_path: Path, number: int
) -> None:
    files, seconds = whole
    victim = list(VICTIMS)[number % len(VICTIMS)]
    process = start(tmp_path / "out", command)
    time.sleep(random.Random(number).uniform(0.2, 0.98) * seconds)
    below = alive(process.pid)
    if process.poll() is None:
        VICTIMS[victim](process.pid)
    process.wait(900)
    wait_for_end(below)
    again = finish(tmp_path / "out", command)
    assert again.keys() == files.keys() and "critic/model.safetensors" in again
    assert all(again[name] == content for name, content in files.items()), victim
