"""A second installation: a namespace that enforces Pod Security, with a quota, limits and a critic that may scale."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import second

from firm.shapes.models import WEIGHTS

pytestmark = pytest.mark.cluster
BUCKET = "firm"


@pytest.fixture(scope="module")
def own(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The installation, reached from this machine; its critic is the one of the shapes."""
    scenarios = {"platform": ["jobs", "gitops", "restricted"], "firm": ["gitops", "restricted"]}
    settings = {"platform": {}, "firm": {"critic.resources.requests.cpu": "10m"}}  # the whole cluster has two cores
    with second.namespace(kind, "restricted") as own:
        own.run("kubectl", "label", "namespace", own.namespace, "pod-security.kubernetes.io/enforce=restricted")
        with second.installed(kind, own, tmp_path_factory.mktemp("own"), scenarios, settings):
            own.kubectl("wait", "--for=condition=Available", "deployment/minio", "--timeout=300s")
            with own.reached() as own:
                for path in (WEIGHTS / "critic").iterdir():
                    own.store.fput_object(BUCKET, f"runs/first/critic/{path.name}", str(path))
                own.kubectl("wait", "--for=condition=Available", "deployment", "--all", "--timeout=300s")
                yield own


def test_doctor_and_helm_test_are_green(own: Any) -> None:
    second.all_is_well(own, BUCKET)


def test_a_job_of_two_pods_runs(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    second.a_job_reads_its_request(own, BUCKET, monkeypatch, num_workers=2)


def test_nothing_was_refused_and_the_quota_counts(own: Any) -> None:
    refused = [
        event["message"] for event in own.get("events") if event["reason"] in ("FailedCreate", "FailedCreatePod")
    ]
    assert refused == []
    [quota] = own.get("resourcequotas")
    assert int(quota["status"]["used"]["pods"]) >= len(own.get("deployments"))


def test_a_pod_that_asks_for_more_is_refused(own: Any) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}}
    pod["spec"] = {"containers": [{"name": "c", "image": "busybox", "securityContext": {"privileged": True}}]}
    assert "PodSecurity" in own.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod), check=False)
