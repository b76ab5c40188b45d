"""Two machines start a whole run of one name on one S3 server: both succeed, with one artifact of each stage."""

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from shared import whole_run

from firm.config import STAGES
from firm.storage.claims import find
from firm.storage.inputs import open_input, read_manifest
from firm.storage.open import open_store

pytestmark = pytest.mark.endurance
PAIRS = int(os.environ.get("PAIRS", "3"))
WITHIN_S = 2.0
TEACHER = {"kind": "python", "target": "firm.shapes.teacher:PixelTeacher"}


def start(machine: Path, store: str) -> subprocess.Popen[bytes]:
    """`firm run` on a machine with a disk of its own."""
    (machine / "tmp").mkdir(parents=True)
    (machine / "small.yaml").write_text(whole_run(TEACHER))
    command = [sys.executable, "-m", "firm.cli", "run", "small.yaml", "--set", f"store={store}"]
    env = {**os.environ, "TMPDIR": str(machine / "tmp")}
    log = (machine / "log").open("wb")
    return subprocess.Popen(command, cwd=machine, env=env, stdout=log, stderr=log)


@pytest.mark.parametrize("number", range(PAIRS))
def test_both_succeed_with_one_artifact_of_each_stage(s3: str, tmp_path: Path, number: int) -> None:
    machines = [tmp_path / name for name in ("one", "two")]
    processes = []
    for machine in machines:
        processes.append(start(machine, s3))
        time.sleep(WITHIN_S * number / max(1, PAIRS - 1) if machine is machines[0] else 0)
    for machine, process in zip(machines, processes, strict=True):
        assert process.wait(900) == 0, (machine / "log").read_text()[-3000:]

    states = defaultdict[str, Counter[str]](Counter)
    for machine in machines:
        events = map(json.loads, (machine / "runs/small/progress.jsonl").read_text().splitlines())
        for event in events:
            states[event["stage"]].update([event["state"]] if event.get("state") in ("finished", "reused") else [])
    assert states == {stage: {"finished": 1, "reused": 1} for stage in STAGES}, "the same work was done twice"

    names = {name.partition("/")[0] for name, _ in open_store(f"{s3}/small").list()}
    assert Counter(name.partition("-")[0] for name in names if "-" in name) == Counter(STAGES)
    for name in names:
        ref = find(f"{s3}/small/{name}")
        assert ref, f"{name} is not finished"
        open_input(ref, tmp_path / "reader" / name)  # every byte is compared with the manifest
        assert read_manifest(ref).stage == name.partition("-")[0]
    pages = [(machine / "runs/small/report.html").read_bytes() for machine in machines]
    assert pages[0] == pages[1]
