"""The hybrid run: orchestrated on this machine, sft and rl as PyTorchJobs, artifacts through MinIO; with faults."""

import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest
from shared import paper_run

from firm.config import STAGES

pytestmark = pytest.mark.cluster
TOKEN = secrets.token_hex(2)  # runs of an earlier session are in the store: theirs would be found complete


@pytest.fixture(scope="module")
def whole(kind: Any, small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    name = f"whole-{TOKEN}"
    finish(kind, start(kind, small, folder, name))
    assert (folder / "runs" / name / "report.html").stat().st_size > 10_000
    return name


def start(kind: Any, small: Path, folder: Path, name: str) -> "subprocess.Popen[str]":
    settings = (f"name={name}", f"launch.namespace={kind.namespace}")
    return kind.start("run", str(small), *(x for s in settings for x in ("--set", s)), folder=folder)


def finish(kind: Any, process: "subprocess.Popen[str]", code: int = 0) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def hashes(kind: Any, run: str, stage: str) -> dict[str, str]:
    manifest = json.loads(kind.read(f"runs/{run}/{stage}-", "/manifest.json"))
    return {entry["path"]: entry["sha256"] for entry in manifest["entries"]}


def steps(kind: Any, run: str, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in kind.read(f"runs/{run}/{stage}-", "/metrics.jsonl").splitlines()]


def test_every_stage_is_in_the_store_and_no_work_is_left(kind: Any, whole: str) -> None:
    found = {name.split("/")[2].rpartition("-")[0] for name in kind.objects(f"runs/{whole}/")}
    assert found == set(STAGES)
    assert not [name for name in kind.objects(f"runs/{whole}/") if "work" in name.split("/")]
    assert steps(kind, whole, "sft") == list(range(1, 61)) and steps(kind, whole, "rl") == list(range(1, 13))


def test_jobs_were_of_two_pods(kind: Any, whole: str) -> None:
    for stage in ("sft", "rl"):
        [job] = kind.get("pytorchjobs", "-l", f"firm/run={whole},firm/stage={stage}")
        specs = job["spec"]["pytorchReplicaSpecs"]
        assert specs["Master"]["replicas"] == specs["Worker"]["replicas"] == 1


def test_the_paper_at_scale_goes_through_on_two_pods(kind: Any, tmp_path: Path) -> None:
    """A critic in equal shares and a policy that trains a LoRA, from the preset for eight GPUs."""
    path, name = tmp_path / "small.yaml", f"paper-{TOKEN}"
    path.write_text(paper_run("gen-sd35-kubernetes", cpu="250m", cpu_limit="1", memory="2Gi", shm="256Mi"))
    finish(kind, start(kind, path, tmp_path, name))
    assert {n.split("/")[2].rpartition("-")[0] for n in kind.objects(f"runs/{name}/")} == set(STAGES)
    assert steps(kind, name, "sft") == [1, 2] and steps(kind, name, "rl") == [1, 2]
    for stage in ("sft", "rl"):
        [job] = kind.get("pytorchjobs", "-l", f"firm/run={name},firm/stage={stage}")
        assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1


def in_the_middle(kind: Any, process: Any, run: str, stage: str) -> None:
    """Wait until a stage's job has left a checkpoint and goes on."""

    def reached() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return any(n.endswith("/checkpoint.json") for n in kind.objects(f"runs/{run}/{stage}-"))

    kind.wait_for(f"a checkpoint of {stage}", reached, 300)


def test_pods_deleted_in_the_middle_and_a_restart_of_the_store_change_nothing(
    kind: Any, small: Path, whole: str, tmp_path: Path
) -> None:
    name = f"disturbed-{TOKEN}"
    process = start(kind, small, tmp_path, name)
    in_the_middle(kind, process, name, "sft")
    kind.kubectl("delete", "pod", "-l", f"firm/run={name},firm/stage=sft,training.kubeflow.org/replica-type=worker")
    in_the_middle(kind, process, name, "rl")
    kind.kubectl("delete", "pod", "-l", f"firm/run={name},firm/stage=rl,training.kubeflow.org/replica-type=master")
    kind.kubectl("delete", "pod", "-l", "app.kubernetes.io/name=minio")
    finish(kind, process)
    for stage in ("sft", "rl"):
        assert hashes(kind, name, stage) == hashes(kind, whole, stage), stage
        assert steps(kind, name, stage) == steps(kind, whole, stage)


def test_a_killed_run_finds_its_job_again(kind: Any, small: Path, whole: str, tmp_path: Path) -> None:
    name = f"killed-{TOKEN}"
    first = start(kind, small, tmp_path, name)
    in_the_middle(kind, first, name, "sft")
    [before] = kind.get("pytorchjobs", "-l", f"firm/run={name},firm/stage=sft")
    first.kill()
    first.wait()
    finish(kind, start(kind, small, tmp_path, name))
    [after] = kind.get("pytorchjobs", "-l", f"firm/run={name},firm/stage=sft")
    assert after["metadata"]["uid"] == before["metadata"]["uid"], "another job was made"
    assert hashes(kind, name, "rl") == hashes(kind, whole, "rl")


def test_cancel_leaves_no_pod(kind: Any, small: Path, tmp_path: Path) -> None:
    name = f"cancelled-{TOKEN}"
    process = start(kind, small, tmp_path, name)
    in_the_middle(kind, process, name, "sft")
    said = kind.run("firm", "cancel", name, "-n", kind.namespace)
    assert "deleted PyTorchJob" in said
    assert "was deleted while it ran" in finish(kind, process, code=1)
    assert not kind.get("pods", "-l", f"firm/run={name}")
