"""Ends runs on request, and deletes jobs left over from finished runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from firm.launch.k8s.backend import Backend
from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.names import KFP_RUN, PART_OF, RUN, RUN_ID
from firm.launch.k8s.pytorchjob import phase
from firm.records import UserError

WAIT_S = 180.0
_ENDED = ("Succeeded", "Failed")
_WORKFLOW_ENDED = ("Succeeded", "Failed", "Error")


def cancel(run: str, cluster: Cluster, backend: Backend, say: Callable[[str], None]) -> None:
    """Terminate a run of Kubeflow Pipelines and its jobs; returns when none of its pods is active.

    Args:
        run: Id or name of a KFP run, or the name of a FIRM run that is orchestrated elsewhere.
        cluster: Where its jobs are.
        backend: The KFP API; treated as absent if it does not answer.
        say: Called with a line about each action.

    Raises:
        UserError: There is no such run, or its pods do not terminate.
    """
    try:
        run_id = backend.run_id(run)
    except UserError as error:
        say(f"no Kubeflow Pipelines here ({error.what})")
        run_id = None
    selector = f"{KFP_RUN}={run_id}" if run_id else f"{RUN}={run}"
    if run_id is None and not cluster.jobs(selector):
        raise UserError(f"no run or job named {run!r}", f"namespace {cluster.namespace}", "see `kfp run list`", True)
    if run_id:
        backend.terminate(run_id)
        say(f"terminated run {run_id}")
    names: set[str] = set()
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        jobs = cluster.jobs(selector)  # again and again: a step that is ending may have created one meanwhile
        for job in jobs:
            name = job["metadata"]["name"]
            if not job["metadata"].get("deletionTimestamp"):
                cluster.delete_job(name)
                say(f"deleted PyTorchJob {name}")
            names.add(name)
        left = [pod.metadata.name for name in names for pod in cluster.pods(name)]
        if run_id:
            pods = cluster.pods_with(f"{RUN_ID}={run_id}")
            left += [pod.metadata.name for pod in pods if pod.status.phase not in _ENDED]
        if not left and not jobs:
            return
        time.sleep(2)
    raise UserError(f"pods are still there: {', '.join(left)}", f"namespace {cluster.namespace}", "look at their node")


def reap(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Delete unfinished jobs of KFP runs whose workflow has ended or is gone."""
    jobs = cluster.jobs(f"{PART_OF}=firm,{KFP_RUN}")  # first: the run of each has begun by now
    arguments = ("argoproj.io", "v1alpha1", cluster.namespace, "workflows")
    workflows = cluster.call(lambda: cluster.custom.list_namespaced_custom_object(*arguments))["items"]
    alive = {
        (w["metadata"].get("labels") or {}).get(RUN_ID)
        for w in workflows
        if (w.get("status") or {}).get("phase") not in _WORKFLOW_ENDED
    }
    for job in jobs:
        name = job["metadata"]["name"]
        run_id = job["metadata"]["labels"][KFP_RUN]
        if run_id not in alive and phase(job) not in _ENDED:
            cluster.delete_job(name)
            say(f"deleted PyTorchJob {name}: its run {run_id} is over")
