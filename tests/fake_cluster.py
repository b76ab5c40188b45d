"""A Kubernetes API server with what a test puts into it: real HTTP, no controllers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from shared import HTTPRequest, serving

NAMESPACE = "team"
Object = dict[str, Any]
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v[^/]+(?:/namespaces/(?P<ns>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?"
)


def stamp(age_s: float = 0) -> str:
    """A time so long ago, as in Kubernetes."""
    return (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class FakeCluster:
    """The objects of a namespace by plural.

    Attributes:
        forbidden: Plurals that this user may not read.
        kfp: Path below /apis/v2beta1/ -> what a backend of Kubeflow Pipelines on the same port answers.
        created: Jobs that were created, in turn.
        tried: The same, with what was sent in dry runs.
        logs: Name of a pod -> its log.
        refusal: Why no object may be made, if none may.
    """

    objects: dict[str, list[Object]] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    kfp: dict[str, Object] = field(default_factory=dict)
    created: list[Object] = field(default_factory=list)
    tried: list[Object] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    address: str = ""

    def add(self, plural: str, name: str, age_s: float = 0, **rest: Any) -> Object:
        metadata = {"name": name, "namespace": NAMESPACE, "creationTimestamp": stamp(age_s), "uid": f"uid-{name}"}
        metadata |= rest.pop("metadata", {})
        body = {"metadata": metadata, **rest}
        self.objects.setdefault(plural, []).append(body)
        return body

    def add_pod(self, name: str, age_s: float = 0, labels: dict[str, str] | None = None, **status: Any) -> Object:
        status = {"phase": "Pending", **status}
        return self.add("pods", name, age_s, metadata={"labels": labels or {}}, status=status, spec={"containers": []})

    def warn(self, name: str, reason: str, message: str, age_s: float = 0, uid: str = "") -> None:
        """An event of the object with this name."""
        involved = {"name": name, "namespace": NAMESPACE, "uid": uid or f"uid-{name}"}
        rest = {"involvedObject": involved, "type": "Warning", "reason": reason, "message": message}
        self.add("events", f"{name}.{len(self.objects.get('events', []))}", age_s, lastTimestamp=stamp(age_s), **rest)

    def answer(self, request: HTTPRequest) -> None:
        url = urlsplit(request.path)
        if url.path.endswith("/log"):
            log = self.logs.get(url.path.split("/")[-2])
            request.reply(200 if log else 404, (log or "").encode(), Content_Type="text/plain")
            return
        status, body = self._answer(request.command, url.path.rstrip("/"), parse_qs(url.query), request.body)
        request.reply(status, json.dumps(body, ensure_ascii=False).encode(), Content_Type="application/json")

    def _answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Object]:
        if path == "/version":
            names = ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "major", "minor", "platform")
            return 200, {"gitVersion": "v1.34.4", **dict.fromkeys(names, "")}
        if path.startswith("/apis/v2beta1/"):
            found = self.kfp.get(path.removeprefix("/apis/v2beta1/"))
            return (200, found) if found is not None else (404, {})
        if path.startswith("/apis/") and path.count("/") == 3:
            names = {"kubeflow.org": "pytorchjobs", "argoproj.io": "workflows"}
            listed = [{"name": names[group], "singularName": "", "namespaced": True, "kind": "", "verbs": []}
                      for group in names if f"/{group}/" in path]  # fmt: skip
            return 200, {"groupVersion": path.removeprefix("/apis/"), "resources": listed}
        match = _PATH.fullmatch(path)
        if not match:
            return 404, {"message": path}
        if match["plural"] == "selfsubjectaccessreviews":
            return 201, {"spec": {}, "status": {"allowed": True}}
        if match["plural"] in self.forbidden:
            return 403, {"message": f"{match['plural']} is forbidden"}
        return self._objects(method, match, query, body)

    def _objects(
        self, method: str, match: re.Match[str], query: dict[str, list[str]], body: bytes
    ) -> tuple[int, Object]:
        there, name = self.objects.setdefault(match["plural"], []), match["name"]
        if method == "POST" and self.refusal:
            return 400, {"message": self.refusal}
        if method == "POST":
            made = json.loads(body)
            self.tried.append(made)
            if "dryRun" not in query:
                name = made["metadata"]["name"]
                made["metadata"] |= {"creationTimestamp": stamp(), "namespace": match["ns"], "uid": f"uid-{name}"}
                there.append(made)
                self.created.append(made)
            return 201, made
        if name is None:
            labels, fields = (_pairs(query.get(f"{kind}Selector", [""])[0]) for kind in ("label", "field"))
            found = [o for o in there if _has(o["metadata"].get("labels") or {}, labels) and _at(o, fields)]
            return 200, {"items": found, "metadata": {}}
        [one] = [o for o in there if o["metadata"]["name"] == name] or [None]
        if one is None:
            return 404, {"message": f"{match['plural']} {name!r} not found"}
        if method == "DELETE":
            there.remove(one)
        return 200, one


def _pairs(selector: str) -> dict[str, str]:
    return {key: value for key, _, value in (pair.partition("=") for pair in selector.split(",") if pair)}


def _has(labels: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(key in labels and value in ("", labels[key]) for key, value in wanted.items())


def _at(thing: Any, wanted: dict[str, str]) -> bool:
    for path, value in wanted.items():
        found = thing
        for key in path.split("."):
            found = found[key]
        if found != value:
            return False
    return True


@contextmanager
def fake_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A server that is the current context of the kubeconfig, and of which the namespace is `NAMESPACE`."""
    cluster = FakeCluster()
    with serving(cluster.answer) as address:
        cluster.address = address
        named = {"name": "fake"}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{**named, "cluster": {"server": address}}], "users": [{**named, "user": {}}],
            "contexts": [{**named, "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
        }  # fmt: skip
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config))
        monkeypatch.setattr("firm.launch.k8s.cluster.PATIENCE_S", 3.0)
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield cluster
