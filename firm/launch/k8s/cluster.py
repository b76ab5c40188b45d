"""A namespace of a Kubernetes cluster, seen from a pod inside it or from a machine outside."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client
from kubernetes import config as kube_config
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from firm.launch.k8s.names import CONTAINER, GROUP, JOB_NAME, PLURAL, VERSION
from firm.records import UserError

PATIENCE_S = 300.0  # with an API server that does not answer: it may be restarting
NOT_FOUND = 404
CONFLICT = 409
_PASSING = {0, 429, 500, 502, 503, 504}
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """Clients for the objects of one namespace; every call is retried while the API server is away."""

    namespace: str
    api: client.ApiClient

    @classmethod
    def connect(cls, namespace: str | None = None) -> Cluster:
        """Connect as the pod's service account, or as the current context of the kubeconfig.

        Raises:
            UserError: There is no cluster to connect to.
        """
        settings = client.Configuration()
        try:
            if _NAMESPACE.is_file():
                kube_config.load_incluster_config(settings)
                found = _NAMESPACE.read_text().strip()
            else:
                kube_config.load_kube_config(client_configuration=settings)
                _, context = kube_config.list_kube_config_contexts()
                found = context["context"].get("namespace", "default")
        except kube_config.ConfigException as error:
            fix = "set KUBECONFIG, or choose a cluster with `kubectl config use-context`"
            raise UserError(f"no Kubernetes cluster is configured: {error}", "kubeconfig", fix, usage=True) from error
        return cls(namespace or found, client.ApiClient(settings))

    @property
    def core(self) -> client.CoreV1Api:
        """Pods, logs, events, ConfigMaps."""
        return client.CoreV1Api(self.api)

    @property
    def custom(self) -> client.CustomObjectsApi:
        """PyTorchJobs and workflows."""
        return client.CustomObjectsApi(self.api)

    def call(self, action: Callable[[], T]) -> T:
        """Run a request; transient faults are retried for `PATIENCE_S`, others explained.

        Raises:
            UserError: The API server cannot be reached, or refuses.
            ApiException: Not found, or a conflict: for the caller to decide.
        """
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_delay(PATIENCE_S),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            reraise=True,
        )
        try:
            return retrying(action)
        except HTTPError as error:
            raise UserError(f"the Kubernetes API does not answer: {error}", self.host, "check the cluster") from error
        except client.ApiException as error:
            if error.status in (NOT_FOUND, CONFLICT):
                raise
            fix = "`firm doctor` says which rights are missing" if error.status == 403 else "see `firm doctor`"
            what = f"the Kubernetes API refused: {error.status} {error.reason} {_message(error)}"
            raise UserError(what, f"namespace {self.namespace} at {self.host}", fix) from error

    @property
    def host(self) -> str:
        """Address of the API server."""
        return str(self.api.configuration.host)

    # ---- PyTorchJobs

    def job(self, name: str) -> dict[str, Any] | None:
        """A job as plain JSON, None if it does not exist."""
        arguments = (GROUP, VERSION, self.namespace, PLURAL, name)
        found: dict[str, Any] | None = self._or_none(lambda: self.custom.get_namespaced_custom_object(*arguments))
        return found

    def jobs(self, selector: str) -> list[dict[str, Any]]:
        """Jobs with labels, as plain JSON."""
        arguments = (GROUP, VERSION, self.namespace, PLURAL)
        return list(
            self.call(lambda: self.custom.list_namespaced_custom_object(*arguments, label_selector=selector))["items"]
        )

    def create_job(self, body: dict[str, Any]) -> bool:
        """Create a job; False where another of this name is there."""
        try:
            self.call(lambda: self.custom.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, body))
        except client.ApiException as error:
            if error.status != CONFLICT:
                what = "this cluster knows no PyTorchJobs"
                fix = "install the Training Operator: `helm install` the chart platform, or see `firm doctor`"
                raise UserError(what, f"{GROUP}/{VERSION} at {self.host}", fix) from error
            return False
        return True

    def patch_job(self, name: str, patch: dict[str, Any]) -> None:
        """Merge a patch into a job."""
        arguments = (GROUP, VERSION, self.namespace, PLURAL, name, patch)
        self._or_none(lambda: self.custom.patch_namespaced_custom_object(*arguments))

    def delete_job(self, name: str) -> None:
        """Delete a job, if it is there, and its pods after it."""
        arguments = (GROUP, VERSION, self.namespace, PLURAL, name)
        self._or_none(lambda: self.custom.delete_namespaced_custom_object(*arguments, propagation_policy="Background"))

    # ---- what belongs to them

    def pods(self, job: str) -> list[client.V1Pod]:
        """Pods of a job."""
        return self.pods_with(f"{JOB_NAME}={job}")

    def pods_with(self, selector: str = "") -> list[client.V1Pod]:
        """Pods with labels; by default all."""
        return list(self.call(lambda: self.core.list_namespaced_pod(self.namespace, label_selector=selector)).items)

    def last_lines(self, pod: str, number: int = 20, container: str = CONTAINER) -> str:
        """The end of a pod's log, of the container that ended before the present one where there is one."""
        for previous in (True, False):
            try:
                text = self.core.read_namespaced_pod_log(
                    pod, self.namespace, container=container, tail_lines=number, previous=previous
                )
            except (client.ApiException, HTTPError):
                continue
            if text:
                return str(text).rstrip()
        return ""

    def last_warning(self, metadata: Mapping[str, Any]) -> str:
        """The newest warning about an object, and not another of its name; empty if none, or if none may be read."""
        fields = f"involvedObject.uid={metadata['uid']},type=Warning"
        try:
            events = self.call(lambda: self.core.list_namespaced_event(self.namespace, field_selector=fields)).items
        except UserError:
            return ""
        newest = max(events, key=_time_of, default=None)
        return f"{newest.reason}: {newest.message}" if newest else ""

    def config_map(self, name: str) -> dict[str, str]:
        """Data of a ConfigMap, empty if it does not exist."""
        found = self._or_none(lambda: self.core.read_namespaced_config_map(name, self.namespace))
        return dict(found.data or {}) if found else {}

    def secret(self, name: str) -> dict[str, str]:
        """Data of a Secret, empty if it does not exist."""
        found = self._or_none(lambda: self.core.read_namespaced_secret(name, self.namespace))
        return {key: b64decode(value).decode() for key, value in (found.data or {}).items()} if found else {}

    def labels_of_pod(self, name: str) -> dict[str, str]:
        """Labels of a pod, empty if it does not exist."""
        found = self._or_none(lambda: self.core.read_namespaced_pod(name, self.namespace))
        return dict(found.metadata.labels or {}) if found else {}

    def _or_none(self, action: Callable[[], T]) -> T | None:
        try:
            return self.call(action)
        except client.ApiException as error:
            if error.status != NOT_FOUND:
                raise
            return None


def _time_of(event: client.CoreV1Event) -> datetime:
    found: datetime = event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    return found


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, HTTPError) or (isinstance(error, client.ApiException) and error.status in _PASSING)


def _message(error: client.ApiException) -> str:
    return str(error.body or "")[:300]
