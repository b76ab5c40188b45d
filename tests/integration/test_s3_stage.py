"""Stages whose artifacts are in S3: complete with the manifest last, found again, resumed on another machine."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from shared import python_path, rendered, small_run, stage_command

from firm.config.loading import load_config
from firm.records import ArtifactRef, JudgedCandidate
from firm.storage.inputs import open_input, read_manifest, read_ref
from firm.storage.shards import count_rows, iter_shards

ROWS = 64
PER_SHARD = 8
DIMENSIONS = 2
TEACHER = {"kind": "python", "target": "telling:Teacher"}
SMALL = small_run(rendered(ROWS), shard_size=PER_SHARD, batch_size=4, test_share=0.25, evaluator=TEACHER)
SMALL += "sft: {batch_size: 4, max_steps: 10, checkpoint_steps: 5}\n"
# The teacher; it logs every question, can be slowed down, and can answer in other words than on other machines.
TELLING = """
import os, time
from firm.shapes.teacher import PixelTeacher

class Teacher(PixelTeacher):
    def complete(self, messages, **options):
        with open(os.environ["TOLD"], "a") as file:
            file.write("asked\\n")
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        return super().complete(messages, **options) + " " * int(os.environ.get("BLANKS", "0"))
"""


class Machine:
    """A machine with a disk of its own: pointers, caches and scratch files of one do not exist on another."""

    def __init__(self, folder: Path, store: str, told: Path) -> None:
        self.folder = folder
        self.told = told
        self.scratch = folder / "tmp"
        self.scratch.mkdir(parents=True)
        (folder / "telling.py").write_text(TELLING)
        (folder / "small.yaml").write_text(SMALL)
        self.config = load_config(str(folder / "small.yaml"), [f"store={store}"]).model_dump(
            mode="json", exclude_none=True
        )
        self.env = {
            **os.environ, "PYTHONPATH": python_path(folder), "TMPDIR": str(self.scratch), "TOLD": str(told),
            "FIRM_PROGRESS_FILE": str(folder / "progress"),
        }  # fmt: skip

    def start(
        self, stage: str = "curation", inputs: dict[str, str] | None = None, slow_s: float = 0, blanks: int = 0
    ) -> subprocess.Popen[str]:
        command = stage_command(stage, self.config, inputs or {}, stage)
        env = {**self.env, "SLOW_S": str(slow_s), "BLANKS": str(blanks)}
        return subprocess.Popen(command, cwd=self.folder, env=env, stderr=subprocess.PIPE, text=True)

    def execute(self, stage: str = "curation", inputs: dict[str, str] | None = None) -> tuple[ArtifactRef, str]:
        """Pointer to the stage's artifact, and whether it was "finished" or "reused"."""
        return self.finish(self.start(stage, inputs), stage)

    def finish(self, process: subprocess.Popen[str], stage: str = "curation") -> tuple[ArtifactRef, str]:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        last = json.loads((self.folder / "progress").read_text().splitlines()[-1])
        return read_ref(self.folder / stage), last["state"]

    @property
    def questions(self) -> int:
        return len(self.told.read_text().splitlines()) if self.told.exists() else 0


@pytest.fixture
def machine(tmp_path: Path, s3_uri: str) -> Any:
    """machine(name): a new machine with its own disk, on the same store."""

    def make(name: str, store: str = s3_uri) -> Machine:
        return Machine(tmp_path / name, store, tmp_path / f"{name}-told")

    return make


def objects(s3_server: Any, uri: str) -> dict[str, Any]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = s3_server.client.list_objects(bucket, prefix, recursive=True)
    return {o.object_name.removeprefix(prefix).lstrip("/"): o for o in found}


def test_an_artifact_in_s3_is_complete_and_found_again(machine: Any, s3_server: Any, tmp_path: Path) -> None:
    first = machine("first")
    second = machine("second")
    ref, state = first.execute()
    assert state == "finished" and first.questions == ROWS * DIMENSIONS
    assert ref.uri.startswith(first.config["store"]) and "/small/curation-" in ref.uri
    manifest = read_manifest(ref)
    there = objects(s3_server, ref.uri)
    assert set(there) == {"manifest.json", "timing.json", *(entry.path for entry in manifest.entries)}
    last = there["manifest.json"].last_modified
    assert all(there[entry.path].last_modified <= last for entry in manifest.entries)
    folder = open_input(ref, tmp_path / "reader")
    assert count_rows(folder / "judged") == ROWS and (folder / "summary.json").is_file()
    assert not list(first.folder.glob("s3*")), "a folder named after the URI"

    again, state = first.execute()
    assert (again, state) == (ref, "reused") and first.questions == ROWS * DIMENSIONS
    elsewhere, state = second.execute()
    assert (elsewhere, state) == (ref, "reused") and second.questions == 0

    # The next stage reads it there, and its own artifact points back at it.
    critic, state = second.execute("sft", {"data": "curation"})
    assert state == "finished" and read_manifest(critic).inputs == {"data": ref.sha256}
    assert any(name.startswith("critic/") for name in objects(s3_server, critic.uri))
    assert not any(name.startswith("work") for name in objects(s3_server, critic.uri))


@pytest.mark.slow
def test_killed_while_it_writes_to_s3_it_goes_on_elsewhere(
    machine: Any, s3_server: Any, s3_uri: str, tmp_path: Path
) -> None:
    lost = machine("lost")
    heir = machine("heir")
    process = lost.start(slow_s=0.01)
    deadline = time.monotonic() + 60
    while sum("/1/judged/" in name for name in objects(s3_server, s3_uri)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "finished shards are not published"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    published = {n: o.etag for n, o in objects(s3_server, s3_uri).items() if "/1/judged/" in n}
    assert 3 <= len(published) < ROWS // PER_SHARD
    assert not any(name.endswith("manifest.json") for name in objects(s3_server, s3_uri))

    ref, state = heir.execute()
    assert state == "finished"
    assert heir.questions == (ROWS - len(published) * PER_SHARD) * DIMENSIONS, "published shards were judged again"
    after = objects(s3_server, s3_uri)
    assert {n: after[n.replace("/1/", "/2/")].etag for n in published} == published
    assert not any("/1/" in n for n in after), "something is left of the attempt that was killed"

    whole, _ = machine("whole", str(tmp_path / "store")).execute()
    assert whole.sha256 == ref.sha256, "differs from an artifact made without interruption in a folder"
    rows = [list(iter_shards(open_input(r, tmp_path / "reader") / "judged", JudgedCandidate)) for r in (whole, ref)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_damaged_artifact_in_s3_is_named_by_the_next_stage(machine: Any, s3_server: Any) -> None:
    first = machine("first")
    ref, _ = first.execute()
    bucket, _, prefix = ref.uri.removeprefix("s3://").partition("/")
    s3_server.client.remove_object(bucket, f"{prefix}/train/part-00000.parquet")
    other = machine("other")
    (other.folder / "curation").write_bytes((first.folder / "curation").read_bytes())
    for damaged in (other.start("sft", {"data": "curation"}), other.start()):  # the next stage, and who reuses it
        _, said = damaged.communicate(timeout=100)
        assert damaged.returncode == 1 and "Traceback" not in said
        assert f"{ref.uri}/train/part-00000.parquet" in said and "\n  -> " in said


def test_a_critic_is_trained_on_shards_that_stay_in_s3(machine: Any) -> None:
    first = machine("first")
    first.execute()
    other = machine("other")
    (other.folder / "curation").write_bytes((first.folder / "curation").read_bytes())
    trained = other.start("sft", {"data": "curation"})
    _, said = trained.communicate(timeout=300)
    assert trained.returncode == 0, said
    assert list(other.scratch.rglob("critic/model.safetensors"))
    assert not list(other.scratch.rglob("*.parquet")) and not list(other.scratch.rglob("*.arrow"))


def pair(machine: Any, name: str, delay_s: float) -> None:
    """Two machines do the same work at once, for teachers that answer in other words: there is one artifact, whole."""
    machines = [machine(f"{name}-{who}") for who in ("one", "two")]
    processes = []
    for blanks, each in enumerate(machines):
        each.config["name"] = name
        processes.append(each.start(blanks=blanks, slow_s=0.01))
        time.sleep(delay_s)
    ended = [each.finish(process) for each, process in zip(machines, processes, strict=True)]
    assert ended[0][0] == ended[1][0], "two artifacts of one run"
    assert sorted(state for _, state in ended) == ["finished", "reused"], "the same work was done twice"
    for each in machines:
        open_input(ended[0][0], each.folder / "reader")


@pytest.mark.parametrize("delay_s", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_two_runs_of_one_name_make_one_artifact(machine: Any, delay_s: float) -> None:
    pair(machine, "pair", delay_s)


@pytest.mark.endurance
def test_twenty_pairs_of_runs_make_twenty_artifacts(machine: Any) -> None:
    for number in range(20):
        pair(machine, f"pair-{number}", 2 * number / 19)
