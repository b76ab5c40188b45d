"""Training jobs on a real cluster: what goes wrong is said, what is left is removed, what is asked for is scheduled."""

import json
import secrets
import time
from typing import Any

import pytest

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.k8s.manifest import job_name
from firm.launch.launcher import launch
from firm.records import UserError
from firm.storage.artifacts import Output

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("environment")]
TINY: dict[str, Any] = {"cpu": "50m", "cpu_limit": "1", "memory": "1Gi", "shm": "64Mi", "backoff_limit": 1, "ttl_s": 60}


@pytest.fixture
def attempt(kind: Any) -> Any:
    """attempt(**launch settings): the error that a job without a meaning ends with, and the job's name."""
    names = []

    def run(**settings: Any) -> tuple[UserError, str]:
        uri = f"s3://firm/runs/faults/sft-{secrets.token_hex(6)}"
        job = TrainingJob("faults", "sft", "firm.sft.train", {"seed": 0}, {})
        names.append(job_name(job, uri))
        with pytest.raises(UserError) as caught:
            launch(job, Output.open(uri), PyTorchJobLaunch(namespace=kind.namespace, **{**TINY, **settings}))
        return caught.value, names[-1]

    yield run
    for name in names:
        kind.kubectl("delete", "pytorchjob", name, "--ignore-not-found")


def gone(kind: Any, name: str) -> bool:
    return not kind.get("pytorchjobs,pods", "-l", f"training.kubeflow.org/job-name={name}")


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"image": "localhost:5001/firm/none:1", "pending_s": 30}, "cannot be pulled", "launch.image"),
        ({"memory": "9000Gi", "pending_s": 20}, "no node can take the pod", "launch.memory"),
        ({"gpus": 1, "pending_s": 20}, "Insufficient nvidia.com/gpu", "launch.gpus"),
        ({"secret": "wrong", "pending_s": 90}, 'secret "wrong" not found', "the chart"),
        # With so little of a core it is still importing at its deadline.
        ({"cpu_limit": "50m", "deadline_s": 5}, "deadline", "launch.deadline_s"),
    ],
    ids=["image", "memory", "gpu", "secret", "deadline"],
)
def test_what_cannot_start_is_told_and_removed(
    attempt: Any, kind: Any, settings: dict[str, Any], what: str, fix: str
) -> None:
    error, name = attempt(**settings)
    assert what in str(error) and fix in error.fix, str(error)
    kind.wait_for("nothing left", lambda: gone(kind, name), 60)


QUOTA = {"apiVersion": "v1", "kind": "ResourceQuota", "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}}
LIMIT = {
    "apiVersion": "v1",
    "kind": "LimitRange",
    "spec": {"limits": [{"type": "Container", "max": {"memory": "8Gi"}}]},
}


@pytest.mark.parametrize(
    ("bound", "settings", "words"),
    [(QUOTA, {"gpus": 1}, "exceeded quota"), (LIMIT, {"memory": "9Gi"}, "maximum memory usage per Container is 8Gi")],
    ids=["quota", "limit"],
)
def test_a_job_whose_pods_are_refused_says_why(
    attempt: Any, kind: Any, bound: dict[str, Any], settings: dict[str, Any], words: str, capfd: Any
) -> None:
    name = f"bound-{secrets.token_hex(3)}"
    kind.kubectl("create", "-f", "-", input=json.dumps({**bound, "metadata": {"name": name}}))
    try:
        error, job = attempt(pending_s=20, **settings)
    finally:
        kind.kubectl("delete", bound["kind"].lower(), name)
    assert "1 of 1 pods are refused" in error.what and words in error.what and "launch.memory" in error.fix, str(error)
    assert f"PyTorchJob {job}: FailedCreatePod" in capfd.readouterr().out
    kind.wait_for("nothing left", lambda: gone(kind, job), 60)


def test_a_worker_that_crashes_is_quoted(attempt: Any) -> None:
    error, _ = attempt(backoff_limit=0)
    assert "ended with exit code 1" in str(error) and "KeyError: 'critic'" in str(error), str(error)


def test_a_worker_out_of_memory_is_told(attempt: Any) -> None:
    error, _ = attempt(memory="80Mi", shm="16Mi", backoff_limit=2)
    assert "ran out of memory" in str(error) and "launch.memory" in error.fix, str(error)


def test_gpus_are_scheduled_where_they_are(kind: Any) -> None:
    """A node that pretends: what asks for its GPUs is put there, what asks for more waits."""
    from firm.launch.k8s.cluster import Cluster
    from firm.launch.k8s.manifest import manifest

    [node] = [n["metadata"]["name"] for n in kind.get("nodes")]
    patch = '[{"op":"%s","path":"/status/capacity/nvidia.com~1gpu"%s}]'
    kind.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", patch % ("add", ',"value":"4"'))
    kind.wait_for("the kubelet", lambda: kind.get("nodes")[0]["status"]["allocatable"].get("nvidia.com/gpu") == "4")
    cluster, names = Cluster.connect(kind.namespace), []
    try:
        # The first waits for a Secret that is not there, and so holds its GPUs instead of failing.
        for gpus, settings, taken in ((4, {"secret": "wrong"}, True), (1, {}, False)):
            uri = f"s3://firm/runs/faults/rl-{secrets.token_hex(6)}"
            job = TrainingJob("gpus", "rl", "firm.rl.train", {}, {})
            launch_config = PyTorchJobLaunch(gpus=gpus, **{**TINY, **settings})
            names.append(job_name(job, uri))
            cluster.create_job(manifest(job, uri, launch_config, cluster.config_map("firm"), {}))
            time.sleep(3)
            pods = kind.wait_for("a pod", lambda: kind.get("pods", "-l", f"training.kubeflow.org/job-name={names[-1]}"))
            found = bool(pods[0]["spec"].get("nodeName"))
            assert found == taken, f"{gpus} GPUs: {pods[0]['status'].get('conditions')}"
    finally:
        for name in names:
            cluster.delete_job(name)
        kind.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", patch % ("remove", ""))
