"""The part of the Kubernetes API that `lookup` of helm asks: which objects are there."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

KINDS = {
    "v1": "Namespace Secret PersistentVolumeClaim ConfigMap Service ServiceAccount Pod ResourceQuota LimitRange",
    "apps/v1": "Deployment",
    "batch/v1": "Job CronJob",
    "autoscaling/v2": "HorizontalPodAutoscaler",
    "policy/v1": "PodDisruptionBudget",
    "networking.k8s.io/v1": "NetworkPolicy Ingress",
    "scheduling.k8s.io/v1": "PriorityClass",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding ClusterRole ClusterRoleBinding",
    "apiextensions.k8s.io/v1": "CustomResourceDefinition",
    "admissionregistration.k8s.io/v1": "ValidatingWebhookConfiguration ValidatingAdmissionPolicy "
    "ValidatingAdmissionPolicyBinding",
    "monitoring.coreos.com/v1": "ServiceMonitor PodMonitor",
}
WITHOUT_NAMESPACE = re.compile("Namespace|PriorityClass|Cluster.*|CustomResource.*|Validating.*")
OBJECT = re.compile(
    r"^/apis?/(?P<version>.+?)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)/(?P<name>[^/]+)$"
)


def plural(kind: str) -> str:
    """The name of a kind in paths."""
    name = kind.lower()
    return name.removesuffix("y") + "ies" if name.endswith("y") else name + ("es" if name.endswith("s") else "s")


def answer(path: str, objects: dict[tuple[str, str, str], Any], kubernetes: str) -> Any:
    """What the API says at ``path``; None where there is nothing."""
    if path == "/version":
        return {"major": "1", "minor": kubernetes.split(".")[1], "gitVersion": f"v{kubernetes}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [version.split("/") for version in KINDS if "/" in version]
        found = [{"name": g, "versions": [{"groupVersion": f"{g}/{v}", "version": v}]} for g, v in groups]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in KINDS:
        resources = [
            {"name": plural(kind), "kind": kind, "namespaced": not WITHOUT_NAMESPACE.fullmatch(kind), "verbs": ["get"]}
            for kind in KINDS[version].split()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    match = OBJECT.match(path)
    return match and objects.get((match["plural"], match["namespace"] or "", match["name"]))


@contextmanager
def serve(objects: Iterable[dict[str, Any]], folder: Path, kubernetes: str = "1.34") -> Iterator[Path]:
    """A kubeconfig, in ``folder``, of a cluster that holds ``objects``."""
    known = {(plural(o["kind"]), o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in objects}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answer(self.path.partition("?")[0], known, kubernetes)
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(missing if found is None else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # helm asks for all groups at once; who does not fit in waits for a second

    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {}}],
    }  # fmt: skip
    try:
        (folder / "kubeconfig").write_text(yaml.safe_dump(config))
        yield folder / "kubeconfig"
    finally:
        server.shutdown()
        server.server_close()
