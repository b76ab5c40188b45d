"""Observes the pods of a job: why they do not start, how they ended, and their logs as they grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.names import CONTAINER, RUN_ID
from firm.progress import log_line, relay
from firm.records import UserError

GRACE_S = 60.0  # for faults that may pass: an image that is being pushed, a Secret that is being made
_NEVER = {"InvalidImageName", "ErrImageNeverPull"}
_IMAGE = {"ImagePullBackOff", "ErrImagePull", *_NEVER}
_CONFIGURATION = {"CreateContainerConfigError", "CreateContainerError"}


def start_problem(pods: Sequence[client.V1Pod], pending_s: float, now: datetime) -> UserError | None:
    """Why the first pod that will not start does not; see `start_problems`."""
    return next(start_problems(pods, pending_s, now), None)


def start_problems(pods: Sequence[client.V1Pod], pending_s: float, now: datetime) -> Iterator[UserError]:
    """Why pods will not start, once it is clear that waiting does not help.

    Args:
        pods: The pods of a job or of a run.
        pending_s: How long a pod may wait for a node or its image.
        now: The present time, with a time zone.
    """
    for pod in pods:
        if pod.status.phase not in ("Pending", "Running"):
            continue
        age = (now - pod.metadata.creation_timestamp).total_seconds()
        if problem := _container_problem(pod, age > min(GRACE_S, pending_s)):
            yield problem
        elif pod.status.phase == "Pending" and age > pending_s:
            yield _still_pending(pod, age)


def _container_problem(pod: client.V1Pod, waited: bool) -> UserError | None:
    for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        if (waiting := status.state.waiting if status.state else None) is None:
            continue
        if waiting.reason in _IMAGE and (waiting.reason in _NEVER or waited):
            what = f"the image {status.image} cannot be pulled: {waiting.reason}"
            fix = "correct launch.image (or FIRM_IMAGE in the ConfigMap), or push the image"
            if _is_step(pod):
                fix = "push the image, or `firm cancel` the run and submit what `make pipelines REGISTRY=...` makes"
            return UserError(f"{what} {waiting.message or ''}".rstrip(), _where(pod), fix)
        if waiting.reason in _CONFIGURATION and waited:
            fix = "create what is missing: the chart `firm` makes the ConfigMap, and says in it which Secrets it needs"
            return UserError(f"a container cannot be configured: {waiting.message}", _where(pod), fix)
    return None


def _still_pending(pod: client.V1Pod, age: float) -> UserError:
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            fix = "ask for less (launch.cpu, launch.memory, launch.gpus), or add nodes; launch.pending_s waits longer"
            if _is_step(pod):
                fix = "add nodes, or `firm cancel` the run and submit it with other gpus= and memory="
            return UserError(f"no node can take the pod: {condition.message}", _where(pod), fix)
    what = f"the pod has not started after {age:.0f} s"
    return UserError(what, _where(pod), "`kubectl describe pod` says what it waits for; launch.pending_s waits longer")


def _is_step(pod: client.V1Pod) -> bool:
    """Whether it belongs to a step of a pipeline, and not to a job."""
    return RUN_ID in (pod.metadata.labels or {})


def _where(pod: client.V1Pod) -> str:
    return f"pod {pod.metadata.namespace}/{pod.metadata.name}"


def exit_code(pod: client.V1Pod) -> int:
    """With which code a pod's container last ended; 0 if it never did."""
    for status in pod.status.container_statuses or []:
        for state in (status.state, status.last_state):
            if state and state.terminated and state.terminated.exit_code:
                return int(state.terminated.exit_code)
    return 0


def termination_reason(pod: client.V1Pod) -> str:
    """How a pod's container last ended, in words; empty if it never did."""
    if pod.status.reason == "Evicted":
        return f"was evicted: {pod.status.message}"
    for status in pod.status.container_statuses or []:
        for state in (status.state, status.last_state):
            ended = state.terminated if state else None
            if ended is None or ended.exit_code == 0:
                continue
            if ended.reason == "OOMKilled":
                return "ran out of memory (OOMKilled)"
            return f"ended with exit code {ended.exit_code}" + (f" ({ended.reason})" if ended.reason else "")
    return ""


def is_suspended(job: Mapping[str, Any]) -> bool:
    """Whether a job waits in a queue, such as Kueue's: none of its pods is to be made yet."""
    return bool((job["spec"].get("runPolicy") or {}).get("suspend"))


class Refusals:
    """Notices that pods of a job are refused, by a quota, a limit or a webhook: the job's events alone say so."""

    def __init__(self, cluster: Cluster, number: int, pending_s: float) -> None:
        """``number``: pods that the job needs; ``pending_s``: how long it may lack some."""
        self._cluster = cluster
        self._number = number
        self._pending_s = pending_s
        self._since: float | None = None
        self._said = ""

    def problem(self, job: Mapping[str, Any], pods: Sequence[client.V1Pod]) -> UserError | None:
        """Log why pods are lacking as soon as that is known; an error when they have been for too long.

        Args:
            job: As plain JSON; where a queue has suspended it, it waits for its turn without limit.
            pods: Those that there are.
        """
        if is_suspended(job) or len(pods) >= self._number:
            self._since = None
            return None
        now = time.monotonic()
        self._since = self._since or now
        name = job["metadata"]["name"]
        if (said := self._cluster.last_warning(job["metadata"])) and said != self._said:
            self._said = said
            log_line(f"PyTorchJob {name}: {said}")
        if now - self._since <= self._pending_s:
            return None
        where = f"PyTorchJob {self._cluster.namespace}/{name}"
        lacking = f"{self._number - len(pods)} of {self._number} pods"
        if not self._said:
            fix = "is the Training Operator running? `firm doctor` says"
            return UserError(f"{lacking} were not made within {self._pending_s:.0f} s", where, fix)
        fix = "ask for less (launch.cpu, launch.memory, launch.gpus, launch.num_workers), or have the limit raised"
        return UserError(f"{lacking} are refused: {self._said}", where, f"{fix}; launch.pending_s waits longer")


class LogFollower:
    """Prints a pod's log as it grows, through restarts, replacement of the pod and lost connections."""

    def __init__(self, cluster: Cluster, pod: str) -> None:
        """Follow ``pod``, which need not exist yet, from now on."""
        self._cluster = cluster
        self._pod = pod
        self._stop = threading.Event()
        self._last = ""
        self._started = datetime.now(UTC)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LogFollower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait a moment for the last lines."""
        self._stop.set()
        self._thread.join(5)

    def _follow(self) -> None:
        while True:
            ending = self._stop.is_set()
            try:
                for line in self._lines(follow=not ending):
                    stamp, _, text = line.partition(" ")
                    if stamp > self._last:
                        self._last = stamp
                        relay(text)
            except (client.ApiException, HTTPError, OSError):
                pass  # not there yet, or already gone
            if ending:
                return
            self._stop.wait(1.0)

    def _lines(self, follow: bool) -> Iterator[str]:
        since = self._last or self._started.isoformat()
        seconds = max(int(time.time() - datetime.fromisoformat(since[:19] + "+00:00").timestamp()) + 2, 1)
        response = self._cluster.core.read_namespaced_pod_log(
            self._pod,
            self._cluster.namespace,
            container=CONTAINER,
            follow=follow,
            timestamps=True,
            since_seconds=seconds,
            _preload_content=False,
            _request_timeout=(10, 60),
        )
        rest = b""
        for block in response.stream(2**14):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if follow and self._stop.is_set():
                return
        if rest:
            yield rest.decode(errors="replace")
