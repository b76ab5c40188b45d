"""Observes the pods of a job: why they do not start, how they ended, and their logs as they grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from kubernetes import client
from urllib3.exceptions import HTTPError

from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.names import CONTAINER
from firm.progress import relay
from firm.records import UserError

GRACE_S = 60.0  # for faults that may pass: an image that is being pushed, a Secret that is being made
_NEVER = {"InvalidImageName", "ErrImageNeverPull"}
_IMAGE = {"ImagePullBackOff", "ErrImagePull", *_NEVER}
_CONFIGURATION = {"CreateContainerConfigError", "CreateContainerError"}


def start_problem(pods: Sequence[client.V1Pod], pending_s: float, now: datetime) -> UserError | None:
    """Why a pod will not start, once it is clear that waiting does not help.

    Args:
        pods: The pods of a job.
        pending_s: How long a pod may wait for a node or its image.
        now: The present time, with a time zone.
    """
    for pod in pods:
        if pod.status.phase not in ("Pending", "Running"):
            continue
        age = (now - pod.metadata.creation_timestamp).total_seconds()
        for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
            if (waiting := status.state.waiting if status.state else None) is None:
                continue
            if waiting.reason in _IMAGE and (waiting.reason in _NEVER or age > min(GRACE_S, pending_s)):
                what = f"the image {status.image} cannot be pulled: {waiting.reason}"
                fix = "correct launch.image (or FIRM_IMAGE in the ConfigMap), or push the image"
                return UserError(f"{what} {waiting.message or ''}".rstrip(), _where(pod), fix)
            if waiting.reason in _CONFIGURATION and age > min(GRACE_S, pending_s):
                fix = "create what is missing: the chart `firm` makes ConfigMap and Secret"
                return UserError(f"a container cannot be configured: {waiting.message}", _where(pod), fix)
        if pod.status.phase == "Pending" and age > pending_s:
            return _still_pending(pod, age)
    return None


def _still_pending(pod: client.V1Pod, age: float) -> UserError:
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            fix = "ask for less (launch.cpu, launch.memory, launch.gpus), or add nodes; launch.pending_s waits longer"
            return UserError(f"no node can take the pod: {condition.message}", _where(pod), fix)
    what = f"the pod has not started after {age:.0f} s"
    return UserError(what, _where(pod), "`kubectl describe pod` says what it waits for; launch.pending_s waits longer")


def _where(pod: client.V1Pod) -> str:
    return f"pod {pod.metadata.namespace}/{pod.metadata.name}"


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
