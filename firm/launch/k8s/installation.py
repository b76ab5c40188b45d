"""How a program that is no step reaches the object store: chart `firm` says where it is and which Secret opens it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from firm.launch.k8s.cluster import Cluster
from firm.launch.k8s.names import STORE_KEYS, STORE_SECRET, STORE_SECRET_KEY
from firm.records import UserError


def reach_store(cluster: Cluster, data: Mapping[str, str]) -> tuple[str, str] | None:
    """Complete this process's environment for `firm.storage.open.open_store`; what is set already stays.

    Args:
        cluster: Where the Secret is.
        data: Data of the chart's ConfigMap.

    Returns:
        Why the store cannot be reached from here and what to do about it; None where nothing is known against it.

    Raises:
        UserError: The keys are neither in the environment nor to be read.
    """
    env = os.environ
    if not env.get("AWS_ENDPOINT_URL"):
        for name in ("FIRM_S3_ENDPOINT", "AWS_REGION"):
            if not env.get(name) and data.get(name):
                env[name] = data[name]
    endpoint = env.get("FIRM_S3_ENDPOINT") or env.get("AWS_ENDPOINT_URL", "")
    if not endpoint:
        return "nothing says where it is", "install the chart firm, or set FIRM_S3_ENDPOINT"
    if missing := [variable for variable in STORE_KEYS.values() if not env.get(variable)]:
        env |= _keys(cluster, data.get(STORE_SECRET_KEY) or STORE_SECRET, f"set {' and '.join(missing)}")
    if not _resolves(endpoint):
        service = urlsplit(endpoint)
        forward = f"kubectl -n {cluster.namespace} port-forward svc/{service.hostname} {service.port or 80}"
        fix = (
            f"`{forward}`, and FIRM_S3_ENDPOINT=http://localhost:{service.port or 80}; `helm test` tries it from inside"
        )
        return f"{endpoint} is an address inside the cluster", fix
    return None


def _keys(cluster: Cluster, secret: str, fix: str) -> dict[str, str]:
    try:
        found = cluster.secret(secret)
    except UserError as error:
        raise UserError(
            f"the keys of the object store may not be read: {error.what}", f"Secret {secret}", fix
        ) from error
    if missing := [key for key in STORE_KEYS if not found.get(key)]:
        raise UserError(f"no Secret {secret} with {' and '.join(missing)}", f"namespace {cluster.namespace}", fix)
    return {variable: found[key] for key, variable in STORE_KEYS.items()}


def _resolves(endpoint: str) -> bool:
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True
