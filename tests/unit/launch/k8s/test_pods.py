"""What pods say becomes a sentence for people."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubernetes import client

from firm.config import PyTorchJobLaunch
from firm.launch.k8s import pytorchjob
from firm.launch.k8s.pods import start_problem, termination_reason
from firm.launch.k8s.pytorchjob import phase
from firm.records import UserError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DESERIALIZE = client.ApiClient()


def pod(age_s: float = 0, phase: str = "Pending", **status: Any) -> client.V1Pod:
    """A pod as the API server gives it."""
    created = (NOW - timedelta(seconds=age_s)).isoformat()
    plain = {
        "metadata": {"name": "job-master-0", "namespace": "team", "creationTimestamp": created},
        "status": {"phase": phase, **status},
    }

    class Answer:
        data = json.dumps(plain)

    return DESERIALIZE.deserialize(Answer, "V1Pod")


def container(state: dict[str, Any], last: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    common = {"name": "pytorch", "image": "firm:1", "imageID": "", "ready": False, "restartCount": 0}
    return [{**common, "state": state, "lastState": last or {}}]


def waiting(reason: str) -> list[dict[str, Any]]:
    return container({"waiting": {"reason": reason, "message": f"because of {reason}"}})


UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu"}]


@pytest.mark.parametrize(
    ("status", "age_s", "what"),
    [
        ({"containerStatuses": waiting("ImagePullBackOff")}, 61, "the image firm:1 cannot be pulled: ImagePullBackOff"),
        ({"initContainerStatuses": waiting("ErrImagePull")}, 61, "cannot be pulled"),
        ({"containerStatuses": waiting("InvalidImageName")}, 1, "cannot be pulled: InvalidImageName"),
        ({"containerStatuses": waiting("CreateContainerConfigError")}, 61, "cannot be configured: because of"),
        ({"conditions": UNSCHEDULABLE}, 301, "no node can take the pod: Insufficient cpu"),
        ({"containerStatuses": waiting("ContainerCreating")}, 301, "has not started after 301 s"),
    ],
)
def test_waiting_that_does_not_help_is_reported(status: dict[str, Any], age_s: float, what: str) -> None:
    problem = start_problem([pod(age_s, **status)], 300, NOW)
    assert problem is not None and what in str(problem) and "pod team/job-master-0" in str(problem) and problem.fix


@pytest.mark.parametrize(
    ("status", "age_s"),
    [
        ({"containerStatuses": waiting("ImagePullBackOff")}, 10),
        ({"containerStatuses": waiting("CreateContainerConfigError")}, 10),
        ({"containerStatuses": waiting("ContainerCreating")}, 299),
        ({"conditions": UNSCHEDULABLE}, 299),
        ({"phase": "Running", "containerStatuses": waiting("CrashLoopBackOff")}, 9999),
        ({"phase": "Succeeded", "containerStatuses": container({"terminated": {"exitCode": 0}})}, 9999),
    ],
)
def test_waiting_that_may_help_goes_on(status: dict[str, Any], age_s: float) -> None:
    assert start_problem([pod(age_s, **status)], 300, NOW) is None


@pytest.mark.parametrize(
    ("status", "how"),
    [
        (
            {"containerStatuses": container({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})},
            "ran out of memory",
        ),
        (
            {"containerStatuses": container({"running": {}}, {"terminated": {"exitCode": 2, "reason": "Error"}})},
            "code 2",
        ),
        ({"reason": "Evicted", "message": "low on disk", "phase": "Failed"}, "was evicted: low on disk"),
        ({"containerStatuses": container({"terminated": {"exitCode": 0}})}, ""),
        ({"containerStatuses": container({"running": {}})}, ""),
    ],
)
def test_how_a_pod_ended(status: dict[str, Any], how: str) -> None:
    found = termination_reason(pod(**status))
    assert how in found and bool(found) == bool(how)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], ""),
        ([("Created", "True")], "Created"),
        ([("Created", "True"), ("Running", "True"), ("Restarting", "True")], "Restarting"),
        ([("Created", "True"), ("Running", "False"), ("Succeeded", "True")], "Succeeded"),
        ([("Failed", "True"), ("Running", "True")], "Failed"),
        ([("Created", "True"), ("Succeeded", "False")], "Created"),
    ],
)
def test_the_phase_of_a_job(conditions: list[tuple[str, str]], expected: str) -> None:
    status = {"conditions": [{"type": t, "status": s} for t, s in conditions]}
    assert phase({"status": status}) == expected


def test_a_job_without_status_has_no_phase() -> None:
    assert phase({}) == "" and phase({"status": {}}) == ""


class Deleting:
    """A cluster whose operator deletes the pod of a job in the moment in which the job fails."""

    namespace = "team"

    def __init__(self) -> None:
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        killed = pod(1, "Running", containerStatuses=container({"waiting": {"reason": "CrashLoopBackOff"}}, ended))
        self.looks = [("Running", [pod(1, "Running")]), ("Running", [killed]), ("Failed", [])]

    def job(self, name: str) -> dict[str, Any]:
        conditions = [{"type": self.looks[0][0], "status": "True", "message": "the backoff limit"}]
        return {"metadata": {"name": name}, "spec": {}, "status": {"conditions": conditions}}

    def pods(self, name: str) -> list[client.V1Pod]:
        return self.looks.pop(0)[1]

    def last_lines(self, pod: str) -> str:
        return ""


def test_a_pod_that_is_deleted_when_its_job_fails_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(pytorchjob, "POLL_S", 0)
    monkeypatch.setattr(pytorchjob, "start_problem", lambda *_: None)
    with pytest.raises(UserError, match=r"job-master-0 ran out of memory \(OOMKilled\)") as caught:
        pytorchjob._wait(Deleting(), "job", str(tmp_path), PyTorchJobLaunch())  # type: ignore[arg-type]
    assert "raise launch.memory" in caught.value.fix
