"""A job on an API server: pods that are refused are told at once, and as its error after `launch.pending_s`."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import FakeCluster, fake_cluster

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.k8s import pytorchjob
from firm.launch.k8s.manifest import job_name
from firm.records import UserError

URI = "s3://firm/runs/run/sft-0123456789ab"
JOB = TrainingJob("run", "sft", "firm.sft.train", {}, {})
NAME = job_name(JOB, URI)
LABELS = {"training.kubeflow.org/job-name": NAME}
QUOTA = 'pods "m-0" is forbidden: exceeded quota: firm, requested: limits.memory=2Gi'
LIMIT = 'pods "m-0" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi'
WEBHOOK = 'admission webhook "policy.example.com" denied the request: images must be signed'


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(pytorchjob, "POLL_S", 0.05)
    monkeypatch.setattr(pytorchjob, "worker_error", lambda uri: None)
    with fake_cluster(tmp_path, monkeypatch) as cluster:
        yield cluster


def run(**settings: Any) -> None:
    pytorchjob.run(JOB, URI, PyTorchJobLaunch(**{"pending_s": 1, **settings}))


def running(name: str) -> dict[str, Any]:
    return {"name": name, "labels": LABELS, "phase": "Running"}


@pytest.mark.parametrize("said", [QUOTA, LIMIT, WEBHOOK])
def test_refused_pods_are_told_and_the_job_is_deleted(
    cluster: FakeCluster, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.warn(NAME, "FailedCreatePod", "an older one", age_s=90)
    cluster.warn(NAME, "FailedCreatePod", f"Error creating: {said}", age_s=2)
    cluster.warn("another", "FailedCreatePod", "of another job")
    cluster.warn(NAME, "FailedCreatePod", "of an earlier job of this name", age_s=1, uid="earlier")
    with pytest.raises(UserError) as caught:
        run()
    error = caught.value
    assert error.what == f"1 of 1 pods are refused: FailedCreatePod: Error creating: {said}"
    assert f"team/{NAME}" in error.where and "launch.memory" in error.fix and "launch.pending_s" in error.fix
    assert f"PyTorchJob {NAME}: FailedCreatePod: Error creating: {said}" in capsys.readouterr().out.splitlines()
    assert len(cluster.created) == 1 and not cluster.objects["pytorchjobs"]


def test_one_worker_of_two_that_is_refused_is_not_waited_for_by_the_other(cluster: FakeCluster) -> None:
    cluster.add_pod(**running("master-0"))
    cluster.warn(NAME, "FailedCreatePod", QUOTA)
    with pytest.raises(UserError, match="1 of 2 pods are refused"):
        run(num_workers=2)


@pytest.mark.parametrize("forbidden", [set(), {"events"}])
def test_an_operator_that_makes_no_pods_is_noticed(cluster: FakeCluster, forbidden: set[str]) -> None:
    cluster.forbidden = forbidden
    with pytest.raises(UserError, match="1 of 1 pods were not made within 1 s") as caught:
        run()
    assert "Training Operator" in caught.value.fix


def becomes(cluster: FakeCluster, seconds: float, condition: str) -> None:
    """The job has this condition so many seconds from now."""

    def change() -> None:
        cluster.created[0]["status"] = {"conditions": [{"type": condition, "status": "True"}]}

    threading.Timer(seconds, change).start()


def test_a_job_that_hangs_ends_at_its_deadline(cluster: FakeCluster) -> None:
    """The operator would not notice: nothing happens to its pods."""
    cluster.add_pod(**running("master-0"))
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    threading.Timer(0.2, lambda: cluster.created[0].update(status={"startTime": started})).start()
    begin = time.monotonic()
    with pytest.raises(UserError, match="did not end before its deadline") as caught:
        run(deadline_s=2)
    assert time.monotonic() - begin > 1 and "launch.deadline_s" in caught.value.fix
    assert not cluster.objects["pytorchjobs"]


def test_pods_that_come_within_the_time_are_waited_for(cluster: FakeCluster) -> None:
    cluster.warn(NAME, "FailedCreatePod", QUOTA)
    threading.Timer(1, lambda: cluster.add_pod(**running("master-0"))).start()
    becomes(cluster, 2.5, "Succeeded")
    run(pending_s=2)


def test_a_job_that_a_queue_suspends_waits_without_limit(cluster: FakeCluster) -> None:
    threading.Timer(0.2, lambda: cluster.created[0]["spec"]["runPolicy"].update(suspend=True)).start()
    becomes(cluster, 2.5, "Succeeded")
    run()


def test_an_elastic_job_needs_as_many_as_it_can_shrink_to(cluster: FakeCluster) -> None:
    cluster.add_pod(**running("worker-0"))
    cluster.add_pod(**running("worker-1"))
    cluster.warn(NAME, "FailedCreatePod", QUOTA)
    becomes(cluster, 2, "Succeeded")
    run(num_workers=4, min_workers=2)


def test_a_worker_that_could_not_even_write_why_means_a_full_store(cluster: FakeCluster) -> None:
    ended = {"name": "pytorch", "image": "firm:1", "imageID": "", "ready": False, "restartCount": 5}
    status = {**ended, "state": {"terminated": {"exitCode": 74, "reason": "Error"}}}
    cluster.add_pod("master-0", labels=LABELS, phase="Failed", containerStatuses=[status])
    becomes(cluster, 0.3, "Failed")
    with pytest.raises(UserError, match="disk full: the sft job cannot write") as caught:
        run()
    assert caught.value.where == URI and "free some space" in caught.value.fix
