"""The PyTorchJob of a training job (Training Operator v1), built with the models of kubeflow-training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kubeflow.training import models
from kubernetes import client
from kubernetes.utils.quantity import parse_quantity

from firm.certificates import CA_BUNDLE
from firm.config.launch import PyTorchJobLaunch
from firm.gpus import ASKED
from firm.launch.job import TrainingJob
from firm.launch.k8s import names

_NAME_LENGTH = 28  # of the run's: Services of pods have at most 63 characters


def job_name(job: TrainingJob, uri: str) -> str:
    """Name of the job whose output is at ``uri``: the same for every attempt that goes on there (DNS-1035)."""
    run = job.run.replace(".", "-")[:_NAME_LENGTH].rstrip("-")
    return f"firm-{run}-{job.stage}-{uri.rsplit('-', 1)[-1].replace('/', '-')}"


def manifest(
    job: TrainingJob, uri: str, config: PyTorchJobLaunch, defaults: Mapping[str, str], owner: Mapping[str, str]
) -> dict[str, Any]:
    """The whole object as plain JSON.

    Args:
        job: What to run.
        uri: Output of the job: the worker's one argument.
        config: Resources, scheduling, limits.
        defaults: Data of the ConfigMap `firm`: image, Secrets, authorities, service account, model cache,
            priority class.
        owner: ``name`` and ``uid`` of the step's pod and ``kfp_run``; empty outside KFP.
    """
    replica_specs = {"Master": _replicas(1, job, uri, config, defaults)}
    if config.num_workers > 1:
        replica_specs["Worker"] = _replicas(config.num_workers - 1, job, uri, config, defaults)
    elastic = None
    if config.min_workers is not None:  # torchrun elects its own master
        replica_specs = {"Worker": _replicas(config.num_workers, job, uri, config, defaults)}
        elastic = models.KubeflowOrgV1ElasticPolicy(
            min_replicas=config.min_workers,
            max_replicas=config.num_workers,
            rdzv_backend="c10d",
            max_restarts=config.backoff_limit,
        )
    spec = models.KubeflowOrgV1PyTorchJobSpec(
        nproc_per_node=str(max(config.gpus, 1)),
        elastic_policy=elastic,
        pytorch_replica_specs=replica_specs,
        run_policy=models.KubeflowOrgV1RunPolicy(
            active_deadline_seconds=config.deadline_s,
            ttl_seconds_after_finished=config.ttl_s,
            backoff_limit=config.backoff_limit,
            clean_pod_policy="Running",
        ),
    )
    plain: dict[str, Any] = client.ApiClient().sanitize_for_serialization(spec)
    for replicas in plain["pytorchReplicaSpecs"].values():
        replicas["template"] = merged(replicas["template"], config.pod)
    labels = {names.PART_OF: names.PROJECT, names.RUN: job.run, names.STAGE: job.stage}
    if config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    if owner.get("kfp_run"):
        labels[names.KFP_RUN] = owner["kfp_run"]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    metadata: dict[str, Any] = {"name": job_name(job, uri), "labels": labels, "annotations": {names.SPEC: digest}}
    if owner.get("uid"):
        metadata["ownerReferences"] = owner_references(owner)
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": plain}


def merged(base: Any, change: Any) -> Any:
    """A change merged into plain JSON, like a strategic merge patch of Kubernetes.

    Mappings are merged by key, and null removes one; lists of things with names are merged by name; anything else is
    replaced.
    """
    if isinstance(base, dict) and isinstance(change, dict):
        both = base | {key: merged(base.get(key), value) for key, value in change.items()}
        return {key: value for key, value in both.items() if value is not None}
    if isinstance(base, list) and isinstance(change, list) and all(map(_is_named, (*base, *change))):
        there = {item["name"]: item for item in base}
        return list((there | {item["name"]: merged(there.get(item["name"]), item) for item in change}).values())
    return change


def _is_named(item: Any) -> bool:
    return isinstance(item, dict) and "name" in item


def owner_references(owner: Mapping[str, str]) -> list[dict[str, Any]]:
    """Lets the garbage collector remove the job when the step's pod is gone."""
    return [{"apiVersion": "v1", "kind": "Pod", "name": owner["name"], "uid": owner["uid"]}] if owner else []


def _replicas(
    number: int, job: TrainingJob, uri: str, config: PyTorchJobLaunch, defaults: Mapping[str, str]
) -> models.KubeflowOrgV1ReplicaSpec:
    return models.KubeflowOrgV1ReplicaSpec(
        replicas=number, restart_policy="OnFailure", template=_pod(job, uri, config, defaults)
    )


def _pod(job: TrainingJob, uri: str, config: PyTorchJobLaunch, defaults: Mapping[str, str]) -> client.V1PodTemplateSpec:
    volumes = _volumes(config, defaults)
    requests = {"cpu": config.cpu, "memory": config.memory} | ({names.GPU: str(config.gpus)} if config.gpus else {})
    limits = requests | {"cpu": config.cpu_limit or config.cpu}
    config_map = config.config_map or names.CONFIG_MAP
    container = client.V1Container(
        name=names.CONTAINER,
        image=config.image or defaults.get("FIRM_IMAGE") or names.IMAGE,
        command=_command(job, uri, config),
        env=_environment(config, defaults, names.MODELS in volumes),
        env_from=[client.V1EnvFromSource(config_map_ref=client.V1ConfigMapEnvSource(name=config_map))],
        resources=client.V1ResourceRequirements(requests=requests, limits=limits),
        volume_mounts=[client.V1VolumeMount(name=v.name, mount_path=path) for path, v in volumes.items()],
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=client.V1Capabilities(drop=["ALL"]),
        ),
    )
    spec = client.V1PodSpec(
        containers=[container],
        volumes=list(volumes.values()),
        service_account_name=config.service_account or defaults.get("FIRM_SERVICE_ACCOUNT") or names.SERVICE_ACCOUNT,
        automount_service_account_token=False,
        node_selector=config.node_selector or None,
        tolerations=_tolerations(config) or None,
        priority_class_name=config.priority_class or defaults.get("FIRM_PRIORITY_CLASS") or None,
        security_context=client.V1PodSecurityContext(
            run_as_non_root=True, fs_group=65532, seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault")
        ),
    )
    labels = {names.PART_OF: names.PROJECT, names.RUN: job.run, names.STAGE: job.stage}
    return client.V1PodTemplateSpec(
        metadata=client.V1ObjectMeta(labels=labels, annotations={"sidecar.istio.io/inject": "false"}), spec=spec
    )


def _volumes(config: PyTorchJobLaunch, defaults: Mapping[str, str]) -> dict[str, client.V1Volume]:
    """What a pod mounts, by path."""
    memory = client.V1EmptyDirVolumeSource(medium="Memory", size_limit=config.shm)
    volumes = {
        "/tmp": client.V1Volume(name="tmp", empty_dir=client.V1EmptyDirVolumeSource()),
        "/dev/shm": client.V1Volume(name="shm", empty_dir=memory),
    }
    if claim := defaults.get("FIRM_MODEL_CACHE"):
        cache = client.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        volumes[names.MODELS] = client.V1Volume(name="models", persistent_volume_claim=cache)
    if secret := defaults.get(names.CA_SECRET_KEY):
        file = PurePosixPath(defaults[CA_BUNDLE])  # nothing else of the Secret is shown to users' code
        items = [client.V1KeyToPath(key=file.name, path=file.name)]
        authorities = client.V1SecretVolumeSource(secret_name=secret, items=items)
        volumes[str(file.parent)] = client.V1Volume(name="ca", secret=authorities)
    return volumes


def _command(job: TrainingJob, uri: str, config: PyTorchJobLaunch) -> list[str]:
    """One process needs no torchrun: the operator sets the rank; torchrun reads the PET_ variables it sets."""
    torchrun = ["-m", "torch.distributed.run"] if config.gpus > 1 or config.min_workers is not None else []
    return ["python3", *torchrun, "-m", job.module, uri]


def _tolerations(config: PyTorchJobLaunch) -> list[dict[str, Any]]:
    gpu = [names.GPU_TOLERATION] if config.gpus and names.GPU_TOLERATION not in config.tolerations else []
    return [*config.tolerations, *gpu]


def _environment(config: PyTorchJobLaunch, defaults: Mapping[str, str], has_models: bool) -> list[client.V1EnvVar]:
    threads = str(max(math.floor(parse_quantity(config.cpu_limit or config.cpu)) // max(config.gpus, 1), 1))
    plain = {"OMP_NUM_THREADS": threads}
    plain |= {ASKED: str(config.gpus)} if config.gpus else {}
    plain |= {"HF_HOME": names.MODELS} if has_models else {}
    plain |= config.env
    store = config.secret or defaults.get(names.STORE_SECRET_KEY) or names.STORE_SECRET
    endpoints = defaults.get(names.ENDPOINTS_SECRET_KEY) or names.ENDPOINTS_SECRET
    secret = {variable: (store, key) for key, variable in names.STORE_KEYS.items()}
    optional = {variable: (endpoints, key) for key, variable in names.ENDPOINTS_KEYS.items()}
    return [
        *(client.V1EnvVar(name=name, value=value) for name, value in plain.items()),
        *(
            client.V1EnvVar(
                name=name,
                value_from=client.V1EnvVarSource(
                    secret_key_ref=client.V1SecretKeySelector(name=of, key=key, optional=name in optional)
                ),
            )
            for name, (of, key) in {**secret, **optional}.items()
        ),
    ]
