"""Checks a cluster, from inside or outside, and says how to fix what is wrong."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal, cast

from kubernetes import client

from firm import __version__
from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.k8s.backend import Backend
from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.installation import reach_store
from firm.launch.k8s.manifest import manifest
from firm.launch.k8s.names import (
    CONFIG_MAP,
    GPU,
    GROUP,
    IMAGE,
    PART_OF,
    PLURAL,
    PROJECT,
    STORE_KEYS,
    STORE_SECRET,
    STORE_SECRET_KEY,
    VERSION,
)
from firm.launch.k8s.pods import GRACE_S, start_problems
from firm.launch.k8s.pytorchjob import refused_jobs
from firm.records import UserError
from firm.storage.open import open_store

SHOWN = 5  # pods that are named
State = Literal["ok", "warning", "failed", "unknown"]
# What a step of a pipeline does: verb, API group, resource, name.
RIGHTS = (
    *((verb, GROUP, PLURAL, "") for verb in ("create", "get", "list", "patch", "delete")),
    ("get", "", "pods", ""),
    ("list", "", "pods", ""),
    ("get", "", "pods/log", ""),
    ("list", "", "events", ""),
    ("get", "", "configmaps", CONFIG_MAP),
)


@dataclass(frozen=True)
class Finding:
    """Outcome of one check; ``fix`` says what to do where it is not ok."""

    check: str
    state: State
    detail: str
    fix: str = ""


def examine(cluster: Cluster, backend: Backend, store: str, launch: PyTorchJobLaunch) -> Iterator[Finding]:
    """Run all checks; a failing one does not stop the others.

    Args:
        cluster: The namespace.
        backend: Kubeflow Pipelines.
        store: Where runs keep their artifacts; where empty, the chart says.
        launch: What jobs ask for.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "Kubernetes API": lambda: _api(cluster),
        "PyTorchJob CRD": lambda: _resource(cluster, GROUP, VERSION, PLURAL, "failed", "install the chart platform"),
        "rights": lambda: _rights(cluster),
        "chart firm": lambda: _chart(cluster, launch),
        "Training Operator": lambda: _operator(cluster, launch),
        "object store": lambda: _store(cluster, store, launch),
        "Kubeflow Pipelines": lambda: _pipelines(backend),
        "Argo Workflows": lambda: _resource(
            cluster, "argoproj.io", "v1alpha1", "workflows", "unknown", "Kubeflow Pipelines needs it: argo.enabled=true"
        ),
        "pods": lambda: _pods(cluster),
        "GPU nodes": lambda: _gpus(cluster, launch),
        "storage class": lambda: _storage(cluster),
    }
    for name, check in checks.items():
        try:
            found = check()
        except UserError as error:
            found = Finding(name, "failed", f"{error.what} ({error.where})", error.fix)
        except client.ApiException as error:
            state: State = "unknown" if error.status == 403 else "failed"
            found = Finding(
                name, state, f"the API says {error.status} {error.reason}", "ask as a cluster administrator"
            )
        yield Finding(name, found.state, found.detail, found.fix)


def _finding(state: State, detail: str, fix: str = "") -> Finding:
    return Finding("", state, detail, fix)


def _api(cluster: Cluster) -> Finding:
    server = cluster.call(lambda: client.VersionApi(cluster.api).get_code())
    return _finding("ok", f"{server.git_version} at {cluster.host}, namespace {cluster.namespace}")


def _resource(cluster: Cluster, group: str, api_version: str, plural: str, missing: State, fix: str) -> Finding:
    try:
        listed = cluster.custom.get_api_resources(group, api_version).resources
    except client.ApiException as error:
        if error.status != 404:
            raise
        listed = []
    if plural in [resource.name for resource in listed]:
        return _finding("ok", f"{plural}.{group}/{api_version}")
    return _finding(missing, f"{plural}.{group}/{api_version} is not served", fix)


def _rights(cluster: Cluster) -> Finding:
    missing = []
    for verb, group, resource, name in RIGHTS:
        plain, _, sub = resource.partition("/")
        attributes = client.V1ResourceAttributes(
            namespace=cluster.namespace,
            verb=verb,
            group=group,
            resource=plain,
            subresource=sub or None,
            name=name or None,
        )
        review = client.V1SelfSubjectAccessReview(
            spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
        )
        answer = client.AuthorizationV1Api(cluster.api).create_self_subject_access_review(review)
        if not answer.status.allowed:
            missing.append(f"{verb} {resource}")
    if missing:
        return _finding("failed", f"not allowed: {', '.join(missing)}", "use the ServiceAccount of the chart firm")
    return _finding("ok", f"all {len(RIGHTS)} that a step needs")


def _chart(cluster: Cluster, launch: PyTorchJobLaunch) -> Finding:
    name = launch.config_map or CONFIG_MAP
    data = cluster.config_map(name)
    if not data:
        return _finding("failed", f"no ConfigMap {name}", "install the chart firm in this namespace")
    image = data.get("FIRM_IMAGE") or IMAGE
    if "@" not in image and image.rpartition(":")[2].partition("-")[0] != __version__:
        return _finding("warning", f"jobs run {image}, this is {__version__}", "upgrade the chart or this package")
    secret = launch.secret or data.get(STORE_SECRET_KEY) or STORE_SECRET
    try:
        if not set(STORE_KEYS) <= set(cluster.secret(secret)):
            fix = "make it, or give objectStore.existingSecret of both charts its name"
            return _finding("failed", f"no Secret {secret} with the keys {' and '.join(STORE_KEYS)}", fix)
    except UserError:
        return _finding("ok", f"jobs run {image}; whether Secret {secret} is there may not be seen")
    return _finding("ok", f"jobs run {image} with the keys in Secret {secret}")


def _operator(cluster: Cluster, launch: PyTorchJobLaunch) -> Finding:
    """A dry run passes the operator's webhook, which answers only while the operator runs."""
    job = TrainingJob("doctor", "sft", "firm.sft.train", {}, {})
    defaults = cluster.config_map(launch.config_map or CONFIG_MAP)
    body = manifest(job, f"s3://doctor/sft-{secrets.token_hex(6)}", launch, defaults, {})
    try:
        cluster.custom.create_namespaced_custom_object(
            GROUP, VERSION, cluster.namespace, PLURAL, body, dry_run="All", _request_timeout=20
        )
    except client.ApiException as error:
        if error.status == 403:
            raise
        fix = "is the operator running? `kubectl get pods -A | grep training-operator`, then its log"
        return _finding("failed", f"refuses a PyTorchJob: {str(error.body or error.reason)[:200]}", fix)
    return _finding("ok", "takes a PyTorchJob (dry run)")


def _store(cluster: Cluster, uri: str, launch: PyTorchJobLaunch) -> Finding:
    data = cluster.config_map(launch.config_map or CONFIG_MAP)
    uri = uri or data.get("FIRM_STORE") or "s3://firm/runs"
    if unreachable := reach_store(cluster, data):
        return _finding("unknown", *unreachable)
    store = open_store(uri)
    key = f"doctor/{secrets.token_hex(8)}"
    store.create(key, b"firm doctor")  # refused by a server without conditional writes
    try:
        if store.get(key) != b"firm doctor":
            return _finding("failed", f"{uri} gives back other bytes than it was given", "use another S3 server")
    finally:
        store.delete(key)
    return _finding("ok", f"{uri} can be written, read and cleaned")


def _pipelines(backend: Backend) -> Finding:
    try:
        found = backend.version()
    except UserError as error:
        return _finding("unknown", f"{error.what} ({error.where})", error.fix)
    sdk = version("kfp")
    if found and found.split(".")[:2] != sdk.split(".")[:2]:
        return _finding("warning", f"backend {found}, SDK {sdk}", f"install kfp=={found.rpartition('.')[0]}.*")
    return _finding("ok", f"backend {found or 'of unknown version'}, SDK {sdk}")


def _pods(cluster: Cluster) -> Finding:
    pods = cluster.pods_with()
    now = datetime.now(UTC)
    broken = [*start_problems(pods, float("inf"), now), *refused_jobs(cluster, f"{PART_OF}={PROJECT}")]
    waiting = [*start_problems(pods, GRACE_S, now)]
    for state, found in (("failed", broken), ("warning", waiting)):
        if found:
            what = "; ".join(f"{problem.what} ({problem.where})" for problem in found[:SHOWN])
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            return _finding(cast(State, state), what + more, found[0].fix)
    return _finding("ok", f"none of {len(pods)} waits for a node, an image or a Secret")


def _gpus(cluster: Cluster, launch: PyTorchJobLaunch) -> Finding:
    nodes = cluster.core.list_node().items
    counts = [int((node.status.allocatable or {}).get(GPU, 0)) for node in nodes]
    needed = launch.gpus * launch.num_workers
    state: State = "failed" if sum(counts) < needed else "ok"
    fix = "add nodes, or ask for less with launch.gpus and launch.num_workers" if state == "failed" else ""
    return _finding(state, f"{sum(counts)} GPUs on {sum(c > 0 for c in counts)} of {len(nodes)} nodes", fix)


def _storage(cluster: Cluster) -> Finding:
    classes = client.StorageV1Api(cluster.api).list_storage_class().items
    usual = [
        c.metadata.name
        for c in classes
        if (c.metadata.annotations or {}).get("storageclass.kubernetes.io/is-default-class") == "true"
    ]
    if usual:
        return _finding("ok", f"default is {usual[0]}")
    names = ", ".join(c.metadata.name for c in classes) or "none"
    return _finding(
        "warning", f"no default StorageClass (there are: {names})", "set persistence.storageClass in values"
    )
