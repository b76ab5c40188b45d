"""Where training jobs run: this machine, or a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from firm.config.section import Section


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


Quantity = Annotated[str, BeforeValidator(_text), Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$")]


def _is_template(pod: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(pod) - {"metadata", "spec"}):
        raise ValueError(f"a pod template has metadata and spec, and no {', '.join(unknown)}")
    return pod


PodTemplate = Annotated[dict[str, Any], AfterValidator(_is_template)]


class LocalLaunch(Section):
    """torchrun on this machine."""

    kind: Literal["local"] = "local"
    num_workers: PositiveInt = 1  # processes
    gpus: NonNegativeInt = 0  # that this machine must have, one a process at least; 0: those that are there, if any
    gpu_memory_gb: PositiveFloat | None = (
        None  # 10^9 bytes of each, if a plan must fit; default: what the first one has
    )

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> LocalLaunch:
        if 0 < self.gpus < self.num_workers:
            raise ValueError("gpus must not be fewer than num_workers: each process has one")
        return self


class PyTorchJobLaunch(Section):
    """A PyTorchJob of the Kubeflow Training Operator (v1), in the namespace of the chart `firm`."""

    kind: Literal["pytorchjob"] = "pytorchjob"
    num_workers: PositiveInt = 1  # pods
    min_workers: PositiveInt | None = None  # elastic: continues with as few pods as this
    gpus: NonNegativeInt = 0  # per pod; also its number of processes (one without GPUs)
    gpu_memory_gb: PositiveFloat | None = None  # 10^9 bytes of each; a run whose plan does not fit is refused
    cpu: Quantity = "4"  # per pod, request
    cpu_limit: Quantity | None = None  # default: as many as requested
    memory: Quantity = "16Gi"  # per pod, request and limit, /dev/shm included
    shm: Quantity = "2Gi"  # /dev/shm
    image: str | None = None  # default: FIRM_IMAGE of the ConfigMap
    namespace: str | None = None  # default: that of the step, or of the current context
    config_map: str | None = None  # environment of the pods; default: that of the chart
    secret: str | None = None  # with keys accesskey and secretkey; default: that of the chart
    service_account: str | None = None  # default: that of the chart
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    queue: str | None = None  # Kueue LocalQueue
    priority_class: str | None = None  # default: FIRM_PRIORITY_CLASS of the ConfigMap
    env: dict[str, str] = {}  # for example NCCL_SOCKET_IFNAME
    pod: PodTemplate = {}  # any other field, merged into the pods' template: affinity, RDMA, labels
    deadline_s: PositiveInt = 604800  # the job is ended after this time
    pending_s: PositiveInt = 900  # how long a pod may wait for a node or its image
    ttl_s: NonNegativeInt = 3600  # how long a finished job is kept
    backoff_limit: NonNegativeInt = 5  # restarts of pods before the job fails

    @model_validator(mode="after")
    def _elastic_shrinks(self) -> PyTorchJobLaunch:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("min_workers must not exceed num_workers")
        return self


def _kind(value: Any) -> Any:
    return value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", None)


LaunchConfig = Annotated[
    Annotated[LocalLaunch, Tag("local")] | Annotated[PyTorchJobLaunch, Tag("pytorchjob")], Discriminator(_kind)
]


def for_pod(launch: LocalLaunch | PyTorchJobLaunch, pod: Mapping[str, Any]) -> LocalLaunch | PyTorchJobLaunch:
    """A job's configuration with what was requested of KFP for the task (`kfp.dsl.TaskConfig`, all of it optional).

    Args:
        launch: The run's configuration.
        pod: ``resources`` (limits and requests as in Kubernetes), ``node_selector``, ``tolerations``.
    """
    if isinstance(launch, LocalLaunch):
        return launch
    resources = pod.get("resources") or {}
    limits = resources.get("limits") or {}
    requests = resources.get("requests") or {}
    found = {
        "cpu": requests.get("cpu") or limits.get("cpu"),
        "cpu_limit": limits.get("cpu"),
        "memory": limits.get("memory"),
        "gpus": next((int(n) for name, n in limits.items() if name.endswith("/gpu")), None),
        "node_selector": pod.get("node_selector"),
        "tolerations": pod.get("tolerations"),
    }
    return PyTorchJobLaunch.model_validate(launch.model_dump() | {k: v for k, v in found.items() if v})
