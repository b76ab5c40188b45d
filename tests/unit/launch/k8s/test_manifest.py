"""The PyTorchJob that is made of a training job."""

from typing import Any

import pytest
from pydantic import ValidationError

from firm.config.launch import LocalLaunch, PyTorchJobLaunch, for_pod
from firm.gpus import ASKED
from firm.launch.job import TrainingJob
from firm.launch.k8s.manifest import job_name, manifest, merged
from firm.launch.k8s.names import GPU_TOLERATION, SPEC

JOB = TrainingJob("my.run", "rl", "firm.rl.train", {"x": 1}, {})
URI = "s3://firm/runs/my.run/rl-0123456789ab"
OWNER = {"name": "step", "uid": "42", "kfp_run": "run-id"}


def make(
    defaults: dict[str, str] | None = None, owner: dict[str, str] | None = None, **settings: Any
) -> dict[str, Any]:
    return manifest(JOB, URI, PyTorchJobLaunch(**settings), defaults or {}, owner or {})


def container(body: dict[str, Any], replica: str = "Master") -> dict[str, Any]:
    [found] = body["spec"]["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"]
    return dict(found)


def pod_of(body: dict[str, Any]) -> dict[str, Any]:
    return dict(body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"])


@pytest.mark.parametrize(("workers", "replicas"), [(1, {"Master": 1}), (4, {"Master": 1, "Worker": 3})])
def test_the_master_counts_as_a_worker(workers: int, replicas: dict[str, int]) -> None:
    spec = make(num_workers=workers)["spec"]
    assert {name: r["replicas"] for name, r in spec["pytorchReplicaSpecs"].items()} == replicas


def test_one_process_runs_the_worker_and_more_run_torchrun() -> None:
    assert container(make())["command"] == ["python3", "-m", "firm.rl.train", URI]
    many = make(gpus=8)
    assert container(many)["command"][1:3] == ["-m", "torch.distributed.run"] and many["spec"]["nprocPerNode"] == "8"
    limits = container(many)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8" and limits == container(many)["resources"]["requests"]


OTHER = {"key": "dedicated", "operator": "Exists"}


@pytest.mark.parametrize(
    ("settings", "tolerations"),
    [
        ({}, None),
        ({"gpus": 1}, [GPU_TOLERATION]),
        ({"tolerations": [OTHER]}, [OTHER]),
        ({"gpus": 1, "tolerations": [OTHER]}, [OTHER, GPU_TOLERATION]),
        ({"gpus": 1, "tolerations": [GPU_TOLERATION]}, [GPU_TOLERATION]),
    ],
)
def test_a_job_with_gpus_and_no_other_tolerates_their_nodes(settings: dict[str, Any], tolerations: Any) -> None:
    assert pod_of(make(**settings)).get("tolerations") == tolerations


@pytest.mark.parametrize(("gpus", "said"), [(0, None), (8, "8")])
def test_workers_are_told_how_many_gpus_their_pod_has(gpus: int, said: str | None) -> None:
    body = make(gpus=gpus, num_workers=2)
    for replica in ("Master", "Worker"):
        assert {e["name"]: e.get("value") for e in container(body, replica)["env"]}.get(ASKED) == said


def test_an_elastic_job_has_no_master() -> None:
    spec = make(num_workers=4, min_workers=2)["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    assert spec["elasticPolicy"]["minReplicas"] == 2 and spec["elasticPolicy"]["maxReplicas"] == 4


def test_names_are_those_of_dns_and_the_same_in_every_attempt() -> None:
    assert job_name(JOB, URI) == "firm-my-run-rl-0123456789ab"
    assert job_name(JOB, f"{URI}/2") == "firm-my-run-rl-0123456789ab-2"
    long = TrainingJob("r" * 60, "sft", "m", {}, {})
    assert len(job_name(long, f"{URI}/1") + "-worker-99") <= 63


def test_the_owner_and_the_run_are_on_the_job() -> None:
    metadata = make(owner=OWNER, queue="team")["metadata"]
    assert metadata["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "step", "uid": "42"}]
    assert metadata["labels"]["firm/kfp-run"] == "run-id" and metadata["labels"]["firm/run"] == "my.run"
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert "ownerReferences" not in make()["metadata"]


def test_the_specification_tells_a_changed_job_from_the_same_one() -> None:
    same, other = make(owner=OWNER), make(memory="32Gi")
    digests = [body["metadata"]["annotations"][SPEC] for body in (make(), same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_what_the_chart_offers_is_used_unless_the_run_says_otherwise() -> None:
    offered = {"FIRM_IMAGE": "registry/firm:1", "FIRM_MODEL_CACHE": "cache", "FIRM_PRIORITY_CLASS": "low"}
    pod = make(offered)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert container(make(offered))["image"] == "registry/firm:1" and pod["priorityClassName"] == "low"
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "cache"}} in pod["volumes"]
    secrets = {"FIRM_STORE_SECRET": "team-s3", "FIRM_ENDPOINTS_SECRET": "team-keys", "FIRM_SERVICE_ACCOUNT": "team"}
    by_name = {e["name"]: e.get("valueFrom", {}).get("secretKeyRef", {}) for e in container(make(secrets))["env"]}
    assert (by_name["AWS_ACCESS_KEY_ID"]["name"], by_name["HF_TOKEN"]["name"]) == ("team-s3", "team-keys")
    assert pod_of(make(secrets))["serviceAccountName"] == "team"
    chosen = make(offered, image="mine:2", priority_class="high")
    assert container(chosen)["image"] == "mine:2"
    assert chosen["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["priorityClassName"] == "high"


def test_limits_end_what_nobody_ends() -> None:
    policy = make(deadline_s=60, ttl_s=5, backoff_limit=2)["spec"]["runPolicy"]
    assert policy == {
        "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5, "backoffLimit": 2, "cleanPodPolicy": "Running",
    }  # fmt: skip


def test_no_secret_is_in_the_job_and_pods_are_restricted() -> None:
    body = make()
    by_name = {e["name"]: e for e in container(body)["env"]}
    assert by_name["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"] == {
        "name": "object-store", "key": "secretkey", "optional": False,
    }  # fmt: skip
    assert by_name["OPENAI_API_KEY"]["valueFrom"]["secretKeyRef"]["optional"] is True
    pod = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container(body)["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("cpu", "threads"), [("250m", "1"), ("4", "4"), ("7500m", "7")])
def test_as_many_threads_as_processors(cpu: str, threads: str) -> None:
    by_name = {e["name"]: e.get("value") for e in container(make(cpu=cpu))["env"]}
    assert by_name["OMP_NUM_THREADS"] == threads


def test_what_kfp_was_asked_for_goes_to_the_job() -> None:
    asked = {
        "resources": {"limits": {"nvidia.com/gpu": "2", "memory": "9Gi", "cpu": "3"}, "requests": {"cpu": "1"}},
        "node_selector": {"pool": "gpu"}, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "affinity": None,
    }  # fmt: skip
    found = for_pod(PyTorchJobLaunch(num_workers=2), asked)
    assert isinstance(found, PyTorchJobLaunch)
    assert (found.gpus, found.memory, found.cpu, found.cpu_limit, found.num_workers) == (2, "9Gi", "1", "3", 2)
    assert found.node_selector == {"pool": "gpu"} and found.tolerations == asked["tolerations"]
    nothing = {"resources": None, "node_selector": None, "tolerations": None}
    assert for_pod(found, nothing) == found and for_pod(LocalLaunch(), asked) == LocalLaunch()


def test_a_private_authority_is_mounted_where_the_configmap_says_and_nothing_else_of_its_secret() -> None:
    pod = pod_of(make({"FIRM_CA_SECRET": "company", "FIRM_CA_BUNDLE": "/etc/firm/ca/root.pem"}))
    [volume] = [v for v in pod["volumes"] if v["name"] == "ca"]
    assert volume["secret"] == {"secretName": "company", "items": [{"key": "root.pem", "path": "root.pem"}]}
    assert {"name": "ca", "mountPath": "/etc/firm/ca"} in pod["containers"][0]["volumeMounts"]
    assert not [v for v in pod_of(make())["volumes"] if "secret" in v]


def test_any_other_field_of_the_pods_is_merged_into_their_template() -> None:
    bound = {"limits": {"rdma/ib": 1}}
    added = {"name": "pytorch", "resources": bound, "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}
    more = {"name": "scratch", "hostPath": {"path": "/scratch"}}
    pod = {
        "metadata": {"labels": {"team": "vision"}},
        "spec": {
            "affinity": {"nodeAffinity": {}}, "containers": [added], "volumes": [more],
            "terminationGracePeriodSeconds": 5, "automountServiceAccountToken": None,
        },
    }  # fmt: skip
    plain, changed = make(num_workers=2), make(num_workers=2, pod=pod)
    for replica in ("Master", "Worker"):
        before, after = (b["spec"]["pytorchReplicaSpecs"][replica]["template"] for b in (plain, changed))
        assert after["metadata"]["labels"] == {**before["metadata"]["labels"], "team": "vision"}
        one, other = container(plain, replica), container(changed, replica)
        assert other["resources"] == {**one["resources"], "limits": {**one["resources"]["limits"], "rdma/ib": 1}}
        assert other["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert other["securityContext"]["readOnlyRootFilesystem"] and other["command"] == one["command"]
        assert after["spec"]["volumes"] == [*before["spec"]["volumes"], more]
        assert after["spec"]["affinity"] == {"nodeAffinity": {}} and after["spec"]["terminationGracePeriodSeconds"] == 5
        assert "automountServiceAccountToken" not in after["spec"]
    assert plain["metadata"]["annotations"][SPEC] != changed["metadata"]["annotations"][SPEC]


def test_lists_without_names_are_replaced() -> None:
    assert merged({"a": ["name", 1]}, {"a": ["x"]}) == {"a": ["x"]}
    assert merged({"a": [{"key": "x"}]}, {"a": [{"name": "y"}]}) == {"a": [{"name": "y"}]}
    assert merged({"a": [{"name": "x", "b": 1}]}, {"a": [{"name": "x", "c": 2}]}) == {
        "a": [{"name": "x", "b": 1, "c": 2}]
    }


def test_a_template_has_metadata_and_spec_alone() -> None:
    with pytest.raises(ValidationError, match="metadata and spec, and no affinity"):
        PyTorchJobLaunch(pod={"affinity": {}})
