"""The API of a Kubeflow Pipelines backend (v2beta1), for what the SDK's command line does not cover."""

from __future__ import annotations

import json
import os
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from firm.launch.k8s.cluster import NOT_FOUND
from firm.records import UserError

IN_CLUSTER = "http://ml-pipeline:8888"
ENDPOINT = "KF_PIPELINES_ENDPOINT"  # what the kfp command line reads
TIMEOUT_S = 10.0


class Backend:
    """A backend at an address."""

    def __init__(self, endpoint: str = "") -> None:
        """``endpoint``: default is the environment's KF_PIPELINES_ENDPOINT, then the Service in this namespace."""
        self.endpoint = (endpoint or os.environ.get(ENDPOINT) or IN_CLUSTER).rstrip("/")
        self._http = urllib3.PoolManager(timeout=urllib3.Timeout(TIMEOUT_S), retries=False)

    def version(self) -> str:
        """Version of the backend, empty if unknown."""
        return str(self._call("GET", "healthz").get("tag_name", ""))

    def run_id(self, run: str) -> str | None:
        """Id of the newest run with this id or name."""
        query = "runs?page_size=100&sort_by=created_at%20desc"
        runs = self._call("GET", query).get("runs", [])
        return next((r["run_id"] for r in runs if run in (r["run_id"], r.get("display_name"))), None)

    def run(self, run_id: str) -> dict[str, Any]:
        """A run as plain JSON."""
        return self._call("GET", f"runs/{run_id}")

    def terminate(self, run_id: str) -> None:
        """End a run; one that ended already is fine."""
        self._call("POST", f"runs/{run_id}:terminate")

    def _call(self, method: str, path: str) -> dict[str, Any]:
        url = f"{self.endpoint}/apis/v2beta1/{path}"
        fix = f"set {ENDPOINT}, for example after `kubectl port-forward svc/ml-pipeline 8888`"
        try:
            response = self._http.request(method, url)
            answer = json.loads(response.data or b"{}")
        except (HTTPError, ValueError) as error:
            raise UserError(f"Kubeflow Pipelines does not answer: {type(error).__name__}", url, fix) from error
        if response.status == NOT_FOUND or response.status >= 500:
            raise UserError(f"Kubeflow Pipelines answers {response.status}: {response.data[:200]!r}", url, fix)
        return dict(answer)
