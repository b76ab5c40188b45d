"""`firm doctor` as the README types it, against an API server and an S3 server."""

from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import FakeCluster, fake_cluster
from integration.conftest import BUCKET, S3Server
from typer.testing import CliRunner

from firm import __version__
from firm.cli import app

Said = Callable[..., dict[str, str]]
CONTAINER = {"name": "main", "image": "firm:1", "imageID": "", "ready": False, "restartCount": 0}
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient nvidia.com/gpu"}
PAINT = "a\x9b2J\u202e\x7fb"  # what is not ASCII or DEL stands in JSON as it is
SHOWN = "a\\x9b2J\\u202e\\x7fb"
STEP = {"pipeline/runid": "1234", "workflows.argoproj.io/workflow": "firm-x"}


def keys(access: str = "firm-key", secret: str = "firm-secret") -> dict[str, str]:
    return {"accesskey": b64encode(access.encode()).decode(), "secretkey": b64encode(secret.encode()).decode()}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> Iterator[FakeCluster]:
    """Chart firm is installed; nothing of the object store is in this environment."""
    for name in ("FIRM_S3_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # what doctor sets is taken back afterwards
    with fake_cluster(tmp_path, monkeypatch) as cluster:
        data = {
            "FIRM_S3_ENDPOINT": s3_server.env["FIRM_S3_ENDPOINT"],
            "FIRM_IMAGE": f"registry/firm/runtime:{__version__}",
            "FIRM_STORE": f"s3://{BUCKET}/runs",
            "FIRM_STORE_SECRET": "seaweedfs-s3",
        }
        cluster.add("configmaps", "firm", data=data)
        cluster.add("secrets", "seaweedfs-s3", data=keys())
        cluster.kfp["healthz"] = {"tag_name": "2.17.0"}
        yield cluster


@pytest.fixture
def doctor(cluster: FakeCluster) -> Said:
    """doctor(*options): what it says of each check, mark and remedy included; ``code`` is its exit code."""

    def said(*options: str) -> dict[str, str]:
        result = CliRunner().invoke(app, ["doctor", "-n", "team", "--endpoint", cluster.address, *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        lines: list[str] = []
        for line in result.output.splitlines():
            if line.startswith("    "):
                lines[-1] += line
            else:
                lines.append(line)
        return {line[2:].partition(":")[0]: line for line in lines} | {"code": str(result.exit_code)}

    return said


def change(cluster: FakeCluster, **data: str) -> None:
    cluster.objects["configmaps"][0]["data"] |= data


def test_endpoint_and_keys_are_those_of_the_chart(doctor: Said) -> None:
    said = doctor()
    assert said["object store"] == f"✔ object store: s3://{BUCKET}/runs can be written, read and cleaned"
    assert said["chart firm"].endswith("with the keys in Secret seaweedfs-s3") and said["code"] == "0", said


def test_the_job_that_is_tried_is_one_that_the_chart_allows(doctor: Said, cluster: FakeCluster) -> None:
    assert doctor()["Training Operator"].startswith("✔")
    [job] = [thing for thing in cluster.tried if thing["kind"] == "PyTorchJob"]
    pods = [replicas["template"]["spec"] for replicas in job["spec"]["pytorchReplicaSpecs"].values()]
    assert {c["image"] for pod in pods for c in pod["containers"]} == {f"registry/firm/runtime:{__version__}"}


def test_what_the_environment_says_comes_first(doctor: Said, cluster: FakeCluster, monkeypatch: Any) -> None:
    endpoint = cluster.objects["configmaps"][0]["data"]["FIRM_S3_ENDPOINT"]
    change(cluster, FIRM_S3_ENDPOINT="http://minio:9000")
    said = doctor()["object store"]
    assert said.startswith("? object store: http://minio:9000 is an address inside the cluster")
    assert "kubectl -n team port-forward svc/minio 9000" in said and "FIRM_S3_ENDPOINT=http://localhost:9000" in said
    monkeypatch.setenv("FIRM_S3_ENDPOINT", endpoint)
    assert doctor()["object store"].startswith("✔")


def test_keys_that_may_not_be_read_are_asked_for(doctor: Said, cluster: FakeCluster, monkeypatch: Any) -> None:
    cluster.forbidden = {"secrets"}
    said = doctor()
    assert said["object store"].startswith("✘") and "Secret seaweedfs-s3" in said["object store"]
    assert "-> set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said["object store"]
    assert said["chart firm"].startswith("✔")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "firm-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "firm-secret")
    assert doctor()["object store"].startswith("✔")


@pytest.mark.parametrize("data", [None, {}, {"accesskey": keys()["accesskey"]}])
def test_a_secret_that_is_missing_or_lacks_a_key_is_found(
    doctor: Said, cluster: FakeCluster, data: dict[str, str] | None
) -> None:
    cluster.objects["secrets"] = []
    if data is not None:
        cluster.add("secrets", "seaweedfs-s3", data=data)
    said = doctor()
    assert said["chart firm"].startswith("✘ chart firm: no Secret seaweedfs-s3 with the keys accesskey and secretkey")
    assert said["object store"].startswith("✘ object store: no Secret seaweedfs-s3") and said["code"] == "1"


def test_without_the_chart_nobody_is_asked(doctor: Said, cluster: FakeCluster) -> None:
    cluster.objects["configmaps"] = []
    said = doctor()
    assert said["chart firm"].startswith("✘") and said["object store"].startswith("? object store: nothing says where")


def waiting(reason: str) -> list[dict[str, Any]]:
    return [{**CONTAINER, "state": {"waiting": {"reason": reason, "message": f"because of {reason}"}}}]


@pytest.mark.parametrize(
    ("labels", "age_s", "status", "mark", "words"),
    [
        (STEP, 90, {"conditions": [UNSCHEDULABLE]}, "!", ["Insufficient nvidia.com/gpu", "gpus= and memory="]),
        ({}, 90, {"conditions": [UNSCHEDULABLE]}, "!", ["Insufficient nvidia.com/gpu", "launch.gpus"]),
        (STEP, 90, {"containerStatuses": waiting("CreateContainerConfigError")}, "✘", ["because of"]),
        (STEP, 90, {"containerStatuses": waiting("ImagePullBackOff")}, "✘", ["firm:1", "REGISTRY="]),
        (STEP, 10, {"conditions": [UNSCHEDULABLE]}, "✔", []),
        (STEP, 90, {"phase": "Running"}, "✔", []),
    ],
)
def test_pods_that_wait_are_seen(
    doctor: Said, cluster: FakeCluster, labels: Any, age_s: float, status: Any, mark: str, words: list[str]
) -> None:
    cluster.add_pod("firm-x-1", age_s, labels, **status)
    said = doctor()
    assert said["pods"].startswith(f"{mark} pods: ") and not [w for w in words if w not in said["pods"]], said["pods"]
    assert ("team/firm-x-1" in said["pods"]) == (mark != "✔") and said["code"] == str(int(mark == "✘"))


def test_a_job_whose_pods_are_refused_is_seen(doctor: Said, cluster: FakeCluster) -> None:
    cluster.add("pytorchjobs", "firm-run-sft-1", spec={}, metadata={"labels": {"app.kubernetes.io/part-of": "firm"}})
    assert doctor()["pods"].startswith("✔")
    cluster.warn("firm-run-sft-1", "FailedCreatePod", "exceeded quota: firm")
    said = doctor()["pods"]
    assert said.startswith("✘ pods: the job's pods are refused: FailedCreatePod: exceeded quota: firm")
    assert "PyTorchJob team/firm-run-sft-1" in said


def test_what_a_server_says_does_not_act_on_the_terminal(doctor: Said, cluster: FakeCluster) -> None:
    cluster.refusal = f"no {PAINT}"
    cluster.add_pod("firm-x-1", 90, STEP, conditions=[{**UNSCHEDULABLE, "message": f"0/1 nodes {PAINT}"}])
    said = doctor()
    assert SHOWN in said["Training Operator"] and SHOWN in said["pods"], said
    assert not set(PAINT) & set("".join(said.values())) - set("ab2J")


def test_a_server_adds_no_check(doctor: Said, cluster: FakeCluster) -> None:
    cluster.add_pod("firm-x-1", 90, STEP, conditions=[{**UNSCHEDULABLE, "message": "no\n✔ doors: open"}])
    said = doctor()
    assert "doors" not in said and "✔ doors: open" in said["pods"], said


def test_of_many_pods_that_wait_some_are_named(doctor: Said, cluster: FakeCluster) -> None:
    for i in range(8):
        cluster.add_pod(f"firm-x-{i}", 90, STEP, conditions=[UNSCHEDULABLE])
    assert doctor()["pods"].count("pod team/firm-x-") == 5 and "and 3 more" in doctor()["pods"]
