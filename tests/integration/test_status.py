"""`firm status RUN`: steps that really ran against an S3 server, in a run that an API server and a KFP API tell of."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import FakeCluster, fake_cluster
from integration.conftest import S3Server
from shared import rendered, small_run, stage_command
from typer.testing import CliRunner

from firm.cli import app
from firm.config.loading import load_config
from firm.records import UserError
from firm.storage.inputs import read_ref
from firm.storage.notes import KFP_RUN, noted, notes_of

ID = "0f4a-run"
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient nvidia.com/gpu"}
Status = Callable[..., list[str]]


@pytest.fixture
def store(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KFP_RUN, ID)
    return s3_uri


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> Iterator[FakeCluster]:
    """KFP has one run, in which check has succeeded and curation runs."""
    with fake_cluster(tmp_path, monkeypatch) as cluster:
        run: dict[str, Any] = {"run_id": ID, "display_name": "first", "state": "RUNNING"}
        cluster.kfp["runs"] = {"runs": [run]}
        names = {"root": "RUNNING", "check-driver": "SUCCEEDED", "check": "SUCCEEDED", "curation": "RUNNING"}
        details = {"task_details": [{"display_name": name, "state": state} for name, state in names.items()]}
        config = {"runtime_config": {"parameters": {"config": {"store": store}}}}
        cluster.kfp[f"runs/{ID}"] = {**run, "run_details": details, **config}
        yield cluster


@pytest.fixture
def status(cluster: FakeCluster) -> Status:
    def lines(name: str = "first") -> list[str]:
        result = CliRunner().invoke(app, ["status", name, "-n", "team", "--endpoint", cluster.address])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output.splitlines()

    return lines


def test_each_step_says_whether_it_ran_or_was_reused_and_where_its_artifact_is(
    status: Status, store: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(small_run(rendered(8), shard_size=4, batch_size=4, test_share=0.25))
    config = load_config(str(path), [f"store={store}"]).model_dump(mode="json", exclude_none=True)
    for word in ("ran", "reused"):
        command = stage_command("curation", config, {}, str(tmp_path / "data"))
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
        assert status()[1:] == [
            "check        succeeded",
            f"curation     {word} {read_ref(tmp_path / 'data').uri}",
        ]
    command = stage_command("sft", config, {"data": str(tmp_path / "none")}, str(tmp_path / "critic"))
    assert subprocess.run(command, check=False, capture_output=True, env=os.environ).returncode == 1
    assert status()[3] == f"sft          failed no such file or folder ({tmp_path / 'none'})"


def test_a_first_step_that_failed_is_quoted(status: Status, cluster: FakeCluster) -> None:
    for task in cluster.kfp[f"runs/{ID}"]["run_details"]["task_details"]:
        task["state"] = "FAILED"
    cluster.add_pod("firm-x-driver", 5, {"pipeline/runid": ID}, phase="Succeeded")
    cluster.add_pod("firm-x-check", 5, {"pipeline/runid": ID}, phase="Failed")
    cluster.logs["firm-x-driver"] = "error: not of this pod"
    cluster.logs["firm-x-check"] = (
        "starts\nerror: no model (policy.model)\n  -> give one\nI1127 launcher: exit status 2\n"
    )
    assert status()[1:3] == ["check        failed no model (policy.model)", "      -> give one"]


def test_rounds_come_in_turn(status: Status, store: str, cluster: FakeCluster) -> None:
    done = {"display_name": "reach", "state": "SUCCEEDED"}
    cluster.kfp[f"runs/{ID}"]["run_details"]["task_details"].insert(0, done)
    for step in ("curation-2", "gate", "report", "curation", "bench"):
        with noted(store, step) as note:
            note |= {"state": "finished", "uri": f"s3://x/{step}"}
    steps = ["check", "reach", "curation", "bench", "gate", "report", "curation-2"]
    assert [line.split()[0] for line in status()[1:]] == steps


def test_a_pod_of_the_run_that_waits_is_explained(status: Status, cluster: FakeCluster) -> None:
    cluster.add_pod("firm-x-1", 90, {"pipeline/runid": ID}, conditions=[UNSCHEDULABLE])
    cluster.add_pod("firm-y-1", 90, {"pipeline/runid": "another"}, conditions=[UNSCHEDULABLE])
    said = status()
    assert said[0] == f"run first ({ID}): RUNNING" and said[2] == "curation     running"
    assert said[3] == "! no node can take the pod: 0/1 nodes: Insufficient nvidia.com/gpu (pod team/firm-x-1)"
    assert "gpus= and memory=" in said[4] and len(said) == 5


def test_a_job_of_the_run_and_why_it_has_no_pods(status: Status, cluster: FakeCluster) -> None:
    cluster.add("pytorchjobs", "firm-first-sft-1", spec={}, metadata={"labels": {"firm/kfp-run": ID}})
    cluster.warn("firm-first-sft-1", "FailedCreatePod", "exceeded quota: firm")
    said = status()
    assert "PyTorchJob firm-first-sft-1: just made" in said
    assert (
        "! the job's pods are refused: FailedCreatePod: exceeded quota: firm (PyTorchJob team/firm-first-sft-1)" in said
    )


def test_what_a_server_says_does_not_act_on_the_terminal(status: Status, cluster: FakeCluster) -> None:
    cluster.add("pytorchjobs", "firm-first-sft-1", spec={}, metadata={"labels": {"firm/kfp-run": ID}})
    cluster.warn("firm-first-sft-1", "FailedCreatePod", "exceeded \x1b[31m\x9b2J\u202equota\x07")
    cluster.kfp[f"runs/{ID}"]["display_name"] = "first\x1b]0;owned"
    said = "\n".join(status())
    assert "exceeded \\x1b[31m\\x9b2J\\u202equota\\x07" in said and "first\\x1b]0;owned" in said
    assert not set("\x1b\x9b\u202e\x07") & set(said)


def test_a_run_that_is_orchestrated_elsewhere_has_its_jobs(status: Status, cluster: FakeCluster) -> None:
    condition = {"conditions": [{"type": "Running", "status": "True"}]}
    cluster.add("pytorchjobs", "firm-mine-rl-1", spec={}, metadata={"labels": {"firm/run": "mine"}}, status=condition)
    assert status("mine") == ["PyTorchJob firm-mine-rl-1: Running"]
    with pytest.raises(UserError, match="no run or job named 'nobody'"):
        status("nobody")


def test_a_store_that_cannot_be_reached_hides_nothing_else(
    status: Status, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    monkeypatch.setenv("FIRM_S3_ENDPOINT", "http://minio:9000")
    said = status()
    assert said[1].startswith(
        "? where artifacts are cannot be read: http://minio:9000 is an address inside the cluster"
    )
    assert "port-forward svc/minio 9000" in said[2] and said[3:] == ["check        succeeded", "curation     running"]


def test_notes_are_kept_in_runs_of_kfp_alone_and_never_in_the_way(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), noted(store, "rl"):
        assert notes_of(store, ID) == {"rl": {"state": "started"}}
        raise KeyError("x")
    assert notes_of(store, ID)["rl"] == {"state": "failed", "message": "'x'"}
    with noted("s3://no-such-bucket/runs", "rl"):
        pass
    monkeypatch.delenv(KFP_RUN)
    with noted(store, "gate"):
        pass
    assert set(notes_of(store, ID)) == {"rl"}
