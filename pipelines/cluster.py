"""What a task needs on a cluster beyond its code; a local run ignores all of it."""

from __future__ import annotations

from kfp import dsl, kubernetes

from firm.launch.k8s.names import CONFIG_MAP, ENDPOINTS_KEYS, ENDPOINTS_SECRET, GPU, STORE_KEYS, STORE_SECRET


def step(task: dsl.PipelineTask, name: str, cached: bool = False, retries: int = 2) -> dsl.PipelineTask:
    """Name a task, give it the object store and the endpoints' key, and retry it: a stage resumes where it was.

    Args:
        task: The task.
        name: Shown in the UI.
        cached: Whether KFP may take the result of an equal task. A stage finds its own artifact again in any case.
        retries: How often a failed task is tried again.
    """
    task.set_display_name(name)
    task.set_caching_options(cached)
    if retries:
        task.set_retry(retries, backoff_duration="10s", backoff_factor=2, backoff_max_duration="300s")
    kubernetes.use_config_map_as_env(
        task, CONFIG_MAP, {"FIRM_S3_ENDPOINT": "FIRM_S3_ENDPOINT", "AWS_REGION": "AWS_REGION"}
    )
    kubernetes.use_secret_as_env(task, STORE_SECRET, STORE_KEYS)
    for key, variable in ENDPOINTS_KEYS.items():
        kubernetes.use_secret_as_env(task, ENDPOINTS_SECRET, {key: variable}, optional=True)
    return task


def model_step(task: dsl.PipelineTask, name: str, gpus: str, memory: str, cached: bool = False) -> dsl.PipelineTask:
    """A task that runs a model itself: memory as given, and GPUs where there are any."""
    task.set_cpu_request("250m").set_cpu_limit("8").set_memory_request(memory).set_memory_limit(memory)
    task.set_accelerator_type(GPU).set_accelerator_limit(gpus)
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    return step(task, name, cached)


def small_step(task: dsl.PipelineTask, name: str, retries: int = 2) -> dsl.PipelineTask:
    """A task that reads numbers and writes a page, without torch."""
    task.set_cpu_request("100m").set_cpu_limit("1").set_memory_request("256Mi").set_memory_limit("1Gi")
    return step(task, name, retries=retries)
