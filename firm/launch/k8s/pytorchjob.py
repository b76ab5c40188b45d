"""The launcher for a Kubernetes cluster: one PyTorchJob per training job, owned, followed and explained.

The job has the same name in every attempt at the same work. An attempt that finds it running adopts it; one that finds
it failed replaces it, and the worker resumes from its checkpoint in the store.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TERMINATED, UNSAID, TrainingJob, cannot_write, worker_error
from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.manifest import job_name, manifest, owner_references
from firm.launch.k8s.names import CONFIG_MAP, SPEC, STAGE
from firm.launch.k8s.pods import LogFollower, Refusals, exit_code, is_suspended, start_problem, termination_reason
from firm.progress import log_line
from firm.records import UserError

POLL_S = 2.0
GONE_S = 180.0  # how long a deleted job may take to go


def run(job: TrainingJob, uri: str, config: PyTorchJobLaunch) -> None:
    """Run a job as a PyTorchJob to its end.

    Terminating this process deletes the job; the next attempt resumes it.

    Raises:
        UserError: It failed: what was wrong, on which pod, with the last lines of its log.
    """
    if "://" not in uri:
        fix = "set `store` to s3://bucket/prefix"
        raise UserError("pods cannot reach a store in a local folder", f"store: {uri}", fix, usage=True)
    cluster = Cluster.connect(config.namespace)
    owner = _owner(cluster)
    body = manifest(job, uri, config, cluster.config_map(config.config_map or CONFIG_MAP), owner)
    name = job_name(job, uri)
    first = f"{name}-{'worker' if config.min_workers else 'master'}-0"
    with _deleted_on_termination(cluster, name), LogFollower(cluster, first):
        while True:
            adopted = _submit(cluster, body, owner)
            if _wait(cluster, name, uri, config):
                return
            if not adopted:
                fix = "somebody deleted it (`firm cancel`?): run again to resume"
                raise UserError(f"the {job.stage} job was deleted while it ran", f"{cluster.namespace}/{name}", fix)


def _owner(cluster: Cluster) -> Mapping[str, str]:
    """The step's pod, where this runs in one of KFP."""
    name = os.environ.get("KFP_POD_NAME", "")
    uid = os.environ.get("KFP_POD_UID", "")
    if not name or not uid:
        return {}
    return {"name": name, "uid": uid, "kfp_run": cluster.labels_of_pod(name).get("pipeline/runid", "")}


@contextmanager
def _deleted_on_termination(cluster: Cluster, name: str) -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        cluster.delete_job(name)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _submit(cluster: Cluster, body: dict[str, Any], owner: Mapping[str, str]) -> bool:
    """Create the job, or adopt the same one that runs already; True where it was adopted."""
    metadata = body["metadata"]
    name = metadata["name"]
    end = time.monotonic() + GONE_S
    while time.monotonic() < end:
        there = cluster.job(name)
        if there is None:
            if cluster.create_job(body):
                log_line(f"created PyTorchJob {cluster.namespace}/{name}")
                return False
        elif there["metadata"].get("deletionTimestamp"):
            time.sleep(POLL_S)
        elif phase(there) in ("Succeeded", "Failed") or _specification(there) != _specification(body):
            cluster.delete_job(name)
        else:
            labels = metadata["labels"]
            references = owner_references(owner)
            cluster.patch_job(name, {"metadata": {"labels": labels, "ownerReferences": references}})
            log_line(f"adopted PyTorchJob {cluster.namespace}/{name}, which runs already")
            return True
    raise UserError("an earlier job does not go away", f"{cluster.namespace}/{name}", "look at its finalizers")


def _specification(job: Mapping[str, Any]) -> str:
    return str((job["metadata"].get("annotations") or {}).get(SPEC, ""))


def phase(job: Mapping[str, Any]) -> str:
    """The newest condition that holds: Created, Running, Restarting, Suspended, Succeeded or Failed; or empty."""
    holding = [c["type"] for c in (job.get("status") or {}).get("conditions") or [] if c["status"] == "True"]
    return next((end for end in ("Failed", "Succeeded") if end in holding), holding[-1] if holding else "")


def _wait(cluster: Cluster, name: str, uri: str, config: PyTorchJobLaunch) -> bool:
    """Wait for the end of a job; False where it was deleted.

    Raises:
        UserError: It failed, or will not start.
    """
    logged = ""
    refusals = Refusals(cluster, config.min_workers or config.num_workers, config.pending_s)
    ended: dict[str, Any] = {}  # pods whose container ended badly: the operator may delete them when the job fails
    while True:
        job = cluster.job(name)
        if job is None:
            return False
        if (now := phase(job)) != logged:
            logged = now
            log_line(f"PyTorchJob {name}: {logged}")
        if logged == "Succeeded":
            return True
        pods = cluster.pods(name)
        ended |= {pod.metadata.name: pod for pod in pods if termination_reason(pod)}
        if logged == "Failed":
            raise failure(cluster, job, list(ended.values()), uri)
        problem = _past_deadline(job, config.deadline_s) or start_problem(pods, config.pending_s, datetime.now(UTC))
        problem = problem or refusals.problem(job, pods)
        if problem is None and ended:
            problem = worker_error(uri)  # a worker that reported an error would fail the same way again
        if problem is not None:
            cluster.delete_job(name)
            raise problem
        time.sleep(POLL_S)


def _past_deadline(job: Mapping[str, Any], deadline_s: float) -> UserError | None:
    """An error once a job has run for longer; its operator looks at the deadline only when a pod starts or ends."""
    started = (job.get("status") or {}).get("startTime")
    if started is None or (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds() <= deadline_s:
        return None
    return _too_late(job)


def _too_late(job: Mapping[str, Any]) -> UserError:
    where = f"PyTorchJob {job['metadata']['namespace']}/{job['metadata']['name']}"
    return UserError("the job did not end before its deadline", where, "raise launch.deadline_s; it will resume")


def refused_jobs(cluster: Cluster, selector: str) -> list[UserError]:
    """Unfinished jobs with these labels that have no pod and of which an event says why."""
    found = []
    for job in cluster.jobs(selector):
        name = job["metadata"]["name"]
        if phase(job) in ("Succeeded", "Failed") or is_suspended(job) or cluster.pods(name):
            continue
        if said := cluster.last_warning(job["metadata"]):
            fix = "ask for less, or have the limit raised"
            found.append(
                UserError(f"the job's pods are refused: {said}", f"PyTorchJob {cluster.namespace}/{name}", fix)
            )
    return found


def failure(cluster: Cluster, job: Mapping[str, Any], pods: list[Any], uri: str) -> UserError:
    """Why a job failed: the reason, the pod, and the last lines of its log."""
    condition = next(c for c in job["status"]["conditions"] if c["type"] == "Failed")
    name = job["metadata"]["name"]
    reason = condition.get("reason", "")
    where = f"PyTorchJob {cluster.namespace}/{name}"
    if "deadline" in f"{reason} {condition.get('message', '')}".lower():
        return _too_late(job)
    if any(exit_code(pod) == UNSAID for pod in pods):
        return cannot_write(job["metadata"]["labels"][STAGE], uri)
    for pod in pods:
        if how := termination_reason(pod):
            lines = cluster.last_lines(pod.metadata.name)
            log = "\n     ".join(["its last lines:", *lines.splitlines()]) if lines else "it left no log"
            fix = "raise launch.memory; it will resume" if "memory" in how else "run again to resume"
            return UserError(f"{pod.metadata.name} {how}; {log}\n ", where, fix)
    return UserError(f"the job failed: {condition.get('message') or reason}", where, "see `kubectl describe`")
