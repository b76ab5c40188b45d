"""Both charts on a real cluster: rights, passwords, volumes, and what `firm doctor` says of it."""

import io
import json
from typing import Any

import pytest

pytestmark = pytest.mark.cluster


def test_doctor_finds_all_well(kind: Any) -> None:
    said = kind.run("firm", "doctor", "-n", kind.namespace)
    for check in ("Kubernetes API", "PyTorchJob CRD", "rights", "chart firm", "Training Operator", "object store"):
        assert f"✔ {check}: " in said, said


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
