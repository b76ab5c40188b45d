"""Both charts on a real cluster: rights, passwords, volumes, and what `firm doctor` says of it."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, S3Error

pytestmark = pytest.mark.cluster


def test_doctor_finds_all_well(kind: Any) -> None:
    said = kind.run("firm", "doctor", "-n", kind.namespace)
    assert "✔ pods: " in said, said
    for check in ("Kubernetes API", "PyTorchJob CRD", "rights", "chart firm", "Training Operator", "object store"):
        assert f"✔ {check}: " in said, said


@pytest.mark.parametrize("endpoint", [True, False])
def test_doctor_as_the_readme_types_it(kind: Any, endpoint: bool) -> None:
    """Keys from the Secret; the address of a Service in the cluster is no fault, and is said to be one."""
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"), "")
    elsewhere = replace(kind, env={**keys, "FIRM_S3_ENDPOINT": kind.env["FIRM_S3_ENDPOINT"] if endpoint else ""})
    said = elsewhere.run("firm", "doctor", "-n", kind.namespace)
    expected = (
        "✔ object store: s3://firm/runs" if endpoint else "? object store: http://minio:9000 is an address inside"
    )
    assert expected in said, said


def test_doctor_tells_what_is_missing(kind: Any) -> None:
    said = kind.run("firm", "doctor", "-n", "kube-public", "--gpus", "8", check=False)
    assert "✘ chart firm: no ConfigMap firm" in said and "-> install the chart firm" in said
    assert "✘ GPU nodes: 0 GPUs" in said


@pytest.mark.parametrize(
    ("account", "verb", "resource", "allowed"),
    [
        ("pipeline-runner", "create", "pytorchjobs.kubeflow.org", "yes"),
        ("pipeline-runner", "get", "secrets/object-store", "yes"),
        ("pipeline-runner", "get", "secrets/other", "no"),
        ("pipeline-runner", "get", "secrets/minio", "no"),
        ("pipeline-runner", "list", "secrets", "no"),
        ("pipeline-runner", "create", "pods", "no"),
        ("pipeline-runner", "delete", "pods", "no"),
        ("firm-training", "get", "pods", "no"),
        ("firm-training", "get", "secrets/object-store", "no"),
    ],
)
def test_nobody_may_do_more_than_it_needs(kind: Any, account: str, verb: str, resource: str, allowed: str) -> None:
    who = f"--as=system:serviceaccount:{kind.namespace}:{account}"
    assert kind.kubectl("auth", "can-i", verb, resource, who, check=False).split()[-1] == allowed


def test_helm_test_is_green(kind: Any) -> None:
    said = kind.run("helm", "test", "firm", "-n", kind.namespace, "--timeout", "10m")
    assert "Phase:" in said and "Failed" not in said, said


def test_an_upgrade_keeps_passwords_and_data(kind: Any) -> None:
    kind.store.put_object("firm", "kept", io.BytesIO(b"x"), 1)
    before = json.loads(kind.kubectl("get", "secret", "object-store", "-o", "json"))["data"]
    values = ["-n", kind.namespace, "--reuse-values"]
    kind.run("helm", "upgrade", "platform", "charts/platform", *values)
    kind.run("helm", "upgrade", "firm", "charts/firm", *values)
    kind.kubectl("wait", "--for=condition=Available", "deployment", "--all", "--timeout=300s")
    assert json.loads(kind.kubectl("get", "secret", "object-store", "-o", "json"))["data"] == before
    kind.wait_for("the object", lambda: "kept" in kind.objects("kept"))


def test_the_namespace_may_enforce_restricted_pods(kind: Any) -> None:
    said = kind.kubectl(
        "label",
        "ns",
        kind.namespace,
        "pod-security.kubernetes.io/enforce=restricted",
        "--overwrite",
        "--dry-run=server",
    )
    assert "violate" not in said, said


def test_steps_and_jobs_do_not_hold_the_administrators_keys(kind: Any) -> None:
    keys = kind.secret("object-store")
    host = kind.env["FIRM_S3_ENDPOINT"].removeprefix("http://")
    steps = StaticProvider(keys["accesskey"], keys["secretkey"])
    with pytest.raises(MinioAdminException):
        MinioAdmin(endpoint=host, credentials=steps, secure=False).user_list()
    kind.store.put_object("firm", "kfp/pipelines/theirs", io.BytesIO(b"x"), 1)
    with pytest.raises(S3Error, match="Access Denied"):
        Minio(host, credentials=steps, secure=False).get_object("firm", "kfp/pipelines/theirs")


@pytest.mark.kfp
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("controller", ["training-operator", "workflow-controller"])
def test_of_two_controllers_one_leads_and_the_other_takes_over(kind: Any, controller: str) -> None:
    upgrade = ("helm", "upgrade", "platform", "charts/platform", "-n", kind.namespace, "--reuse-values", "--set")

    def leader() -> str:
        """The pod that leads; empty while none does, or one that has gone."""
        leases = kind.get("leases", f"--field-selector=metadata.name={controller}")
        pods = [pod["metadata"]["name"] for pod in kind.get("pods")]
        return next((pod for pod in pods for lease in leases if lease["spec"]["holderIdentity"].startswith(pod)), "")

    kind.run(*upgrade, f"components.{controller}.replicas=2")
    try:
        kind.kubectl("rollout", "status", f"deployment/{controller}", "--timeout=180s")
        first = kind.wait_for("a leader", leader, 60)
        kind.kubectl("delete", "pod", first)
        kind.wait_for("another leader", lambda: leader() not in ("", first), 120)
    finally:
        kind.run("helm", "rollback", "platform", "-n", kind.namespace)  # to the values of before, not one more of them
        kind.kubectl("rollout", "status", f"deployment/{controller}", "--timeout=180s")


@pytest.mark.kfp
@pytest.mark.usefixtures("backend")
def test_a_lost_password_stops_an_upgrade(kind: Any) -> None:
    lost = kind.kubectl("get", "secret", "mysql", "-o", "json")
    kind.kubectl("delete", "secret", "mysql")
    try:
        said = kind.run(
            "helm", "upgrade", "platform", "charts/platform", "-n", kind.namespace, "--reuse-values", check=False
        )
        assert "Secret mysql is gone and its database is not" in said, said
        password = kind.kubectl("exec", "deploy/mysql", "-c", "mysql", "--", "printenv", "MYSQL_ROOT_PASSWORD").strip()
    finally:
        secret = json.loads(lost)
        secret["metadata"] = {key: secret["metadata"][key] for key in ("name", "labels", "annotations")}
        kind.kubectl("create", "-f", "-", input=json.dumps(secret))
    assert password == kind.secret("mysql")["password"]
    kind.run("helm", "upgrade", "platform", "charts/platform", "-n", kind.namespace, "--reuse-values")
