"""What the tasks of a pipeline need on a cluster beyond their code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfp import dsl, kubernetes

from firm.config import StageName
from firm.launch.k8s.names import (
    CONFIG_MAP,
    ENDPOINTS_KEYS,
    ENDPOINTS_SECRET_KEY,
    GPU,
    MODELS,
    RUN_ID,
    STORE_KEYS,
    STORE_SECRET_KEY,
)
from firm.storage.notes import KFP_RUN
from pipelines import components

STORE = ("FIRM_S3_ENDPOINT", "AWS_REGION")
NETWORK = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "HF_ENDPOINT")
"""What of the charts' `environment` steps get, too: a compiled pipeline must know a variable by its name."""
MODEL_CACHE = "MODEL_CACHE"
"""Environment variable, while a pipeline is compiled, with the claim of the model cache. Whether there is one cannot be
left to the installation: KFP's driver takes no empty name."""
SECRETS = (STORE_SECRET_KEY, ENDPOINTS_SECRET_KEY)


@dataclass(frozen=True)
class Place:
    """Where the steps of one pipeline run.

    No step is cached by KFP, whose key does not see the files that a configuration names, such as weights in the model
    cache. A stage finds its own artifact by a key that does, and ends at once.

    Attributes:
        gpus: GPUs of each step that runs a model itself.
        memory: Memory of each of these steps.
        found: Outputs of the first step; empty on a laptop, where nothing of the cluster is needed.
        reached: The second step, which all others wait for.
    """

    gpus: Any = "0"
    memory: Any = "4Gi"
    found: Mapping[str, Any] | None = None
    reached: tuple[dsl.PipelineTask, ...] = ()

    @classmethod
    def checked(
        cls, config: Any, stages: Sequence[StageName], gpus: Any = "0", memory: Any = "4Gi", rounds: int = 0
    ) -> Place:
        """A cluster on which two steps check everything once: what is wrong or missing costs a pod, and no stage.

        The first reads the configuration. The second has what the first has found out, the keys to models and judges,
        and looks whether they are in reach.
        """
        task = components.check(config=config, gpus=gpus, rounds=rounds, stages=list(stages))
        _with_cache(_named(task, "check", retries=0))
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, {name: name for name in SECRETS}, optional=True)
        place = cls(gpus, memory, task.outputs)
        reached = place._with_models(
            place.step(components.reach(config=config, stages=list(stages)), "reach", retries=0)
        )
        for first in (task, reached):
            first.set_cpu_request("250m").set_cpu_limit("2").set_memory_request("1Gi").set_memory_limit("2Gi")
        return replace(place, reached=(reached,))

    def step(self, task: dsl.PipelineTask, name: str, retries: int = 2) -> dsl.PipelineTask:
        """Name a task, give it the object store, and retry it: a stage resumes where it was.

        Args:
            task: The task.
            name: Shown in the UI.
            retries: How often a failed task is tried again.
        """
        _named(task, name, retries)
        task.after(*self.reached)
        if self.found:
            kubernetes.use_config_map_as_env(task, CONFIG_MAP, {variable: variable for variable in STORE})
            kubernetes.use_config_map_as_env(task, CONFIG_MAP, {name: name for name in NETWORK}, optional=True)
            kubernetes.use_secret_as_env(task, self.found["store_secret"], STORE_KEYS)
            kubernetes.use_field_path_as_env(task, KFP_RUN, f"metadata.labels['{RUN_ID}']")
        return task

    def model_step(self, task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
        """A task that runs a model or asks an endpoint: memory as given, GPUs where there are any, and keys."""
        self.step(task, name)
        if not self.found:
            return task
        task.set_cpu_request("250m").set_cpu_limit("8").set_memory_request(self.memory).set_memory_limit(self.memory)
        task.set_accelerator_type(GPU).set_accelerator_limit(self.gpus)
        kubernetes.add_toleration_json(task, self.found["tolerations"])
        return self._with_models(task)

    def _with_models(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Give a task the keys to judges and models, and the volume where models are kept that were downloaded."""
        if self.found:
            for key, variable in ENDPOINTS_KEYS.items():
                kubernetes.use_secret_as_env(task, self.found["endpoints_secret"], {key: variable}, optional=True)
        return _with_cache(task)

    def small_step(self, task: dsl.PipelineTask, name: str, retries: int = 2) -> dsl.PipelineTask:
        """A task that reads numbers and writes a page, without torch."""
        if self.found:
            task.set_cpu_request("100m").set_cpu_limit("1").set_memory_request("256Mi").set_memory_limit("1Gi")
        return self.step(task, name, retries)


def _with_cache(task: dsl.PipelineTask) -> dsl.PipelineTask:
    if claim := os.environ.get(MODEL_CACHE):
        kubernetes.mount_pvc(task, claim, MODELS)
        task.set_env_variable("HF_HOME", MODELS)
    return task


def _named(task: dsl.PipelineTask, name: str, retries: int) -> dsl.PipelineTask:
    task.set_display_name(name)
    task.set_caching_options(False)
    if retries:
        task.set_retry(retries, backoff_duration="10s", backoff_factor=2, backoff_max_duration="300s")
    return task
