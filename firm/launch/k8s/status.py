"""Says where a run on a cluster stands: each step, its artifact, and what waits for what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kubernetes import client

from firm.config import STAGES
from firm.launch.k8s.backend import Backend
from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.installation import reach_store
from firm.launch.k8s.names import CONFIG_MAP, KFP_RUN, RUN, RUN_ID, STEP_CONTAINER
from firm.launch.k8s.pods import GRACE_S, start_problems
from firm.launch.k8s.pytorchjob import phase, refused_jobs
from firm.records import UserError
from firm.storage.notes import Note, notes_of

_STEP = re.compile(rf"(check|reach|{'|'.join(STAGES)})(-\d+)?")
_ERROR = re.compile(r"^error: (.*(?:\n  .*)*)", re.MULTILINE)
_WORDS = {"started": "runs", "finished": "ran", "reused": "reused", "failed": "failed"}


def status(run: str, cluster: Cluster, backend: Backend) -> Iterator[str]:
    """Lines about a run.

    Args:
        run: Id or name of a run of Kubeflow Pipelines, or the name of a run that is orchestrated elsewhere.
        cluster: Where its pods and jobs are.
        backend: Kubeflow Pipelines; treated as absent if it does not answer.

    Raises:
        UserError: There is no such run.
    """
    try:
        run_id = backend.run_id(run)
    except UserError as error:
        yield f"no Kubeflow Pipelines here ({error.what})"
        run_id = None
    selector = f"{KFP_RUN}={run_id}" if run_id else f"{RUN}={run}"
    jobs = cluster.jobs(selector)
    if not run_id and not jobs:
        raise UserError(f"no run or job named {run!r}", f"namespace {cluster.namespace}", "see `kfp run list`", True)
    pods = cluster.pods_with(f"{RUN_ID}={run_id}") if run_id else []
    if run_id:
        yield from _steps(backend.run(run_id), cluster, pods)
    for job in jobs:
        name = job["metadata"]["name"]
        yield f"PyTorchJob {name}: {phase(job) or 'just made'}"
        pods += cluster.pods(name)
    for problem in [*start_problems(pods, GRACE_S, datetime.now(UTC)), *refused_jobs(cluster, selector)]:
        yield f"! {problem.what} ({problem.where})"
        yield f"    -> {problem.fix}"


def _steps(run: Mapping[str, Any], cluster: Cluster, pods: Sequence[client.V1Pod]) -> Iterator[str]:
    yield f"run {run.get('display_name', '')} ({run['run_id']}): {run.get('state', 'PENDING')}"
    notes: dict[str, Note] = {}
    try:
        notes = _notes(run, cluster)
    except UserError as error:
        yield f"? where artifacts are cannot be read: {error.what} ({error.where})"
        yield f"    -> {error.fix}"
    tasks = (run.get("run_details") or {}).get("task_details") or []
    states = {task.get("display_name", ""): task.get("state", "") for task in tasks}
    for name in sorted(filter(_STEP.fullmatch, {*states, *notes}), key=_place):
        note = notes.get(name, {})
        message = _error_of(cluster, pods) if states.get(name) == "FAILED" and not note else note.get("message", "")
        words = [_WORDS[note["state"]] if note else states[name].lower(), note.get("uri", ""), message]
        yield f"{name:<12} {' '.join(filter(None, words))}".replace("\n", "\n    ")


def _error_of(cluster: Cluster, pods: Sequence[client.V1Pod]) -> str:
    """What the one failed pod says of a step that could keep no note, as the first step cannot."""
    failed = [pod.metadata.name for pod in pods if pod.status.phase == "Failed"]
    found = [_ERROR.search(cluster.last_lines(name, container=STEP_CONTAINER)) for name in failed]
    return next((match[1] for match in found if match), "")


def _notes(run: Mapping[str, Any], cluster: Cluster) -> dict[str, Note]:
    data = cluster.config_map(CONFIG_MAP)
    if unreachable := reach_store(cluster, data):
        raise UserError(unreachable[0], "object store", unreachable[1])
    config = ((run.get("runtime_config") or {}).get("parameters") or {}).get("config") or {}
    return notes_of(config.get("store") or data.get("FIRM_STORE") or "s3://firm/runs", run["run_id"])


def _place(name: str) -> tuple[int, int]:
    """By round, then left to right."""
    stage, _, number = name.partition("-")
    return int(number or 1), ("check", "reach", *STAGES).index(stage)
