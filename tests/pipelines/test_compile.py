"""The pipelines compile, always to the same text, and to the structure kept in golden/."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.dsl.executor import Executor

from firm import __version__
from firm.config import STAGES
from firm.launch.k8s.names import MODELS
from firm.submission import Installation
from pipelines import components
from pipelines.cluster import MODEL_CACHE

MODULES = {
    "full": ("full",),
    "rounds": ("two",),
    "parts": ("critic", "proof", "served"),
    "stages": ("curation", "sft", "bench", "rl"),
}
PIPELINES = [name for names in MODULES.values() for name in names]
COMPILE = """
import sys
from importlib import import_module
from kfp import compiler
for path in sys.argv[1:]:
    module, name = path.split(".")
    compiler.Compiler().compile(getattr(import_module(f"pipelines.{module}"), name), f"{name}.yaml")
"""


def compiled(folder: Path, *paths: str, **environment: str) -> dict[str, str]:
    """Pipelines by name, in a process without torch: kfp looks through all modules at each call of a task."""
    command = [sys.executable, "-c", COMPILE, *paths]
    subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=True)
    return {file.stem: file.read_text() for file in folder.glob("*.yaml")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = [f"{module}.{name}" for module, names in MODULES.items() for name in names]
    return compiled(tmp_path_factory.mktemp("pipelines"), *paths)


def structure(text: str) -> dict[str, Any]:
    """Tasks, edges, images and inputs: what a change of the pipeline means, without the SDK's boilerplate."""
    spec, *platform = yaml.safe_load_all(text)
    executors = spec["deploymentSpec"]["executors"]
    kubernetes = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    tasks = {}
    for name, task in spec["root"]["dag"]["tasks"].items():
        label = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        executor, pod = executors[label], kubernetes.get(label, {})
        inputs = task.get("inputs", {})
        artifacts = {k: v.get("taskOutputArtifact") for k, v in inputs.get("artifacts", {}).items()}
        tasks[name] = {
            "image": executor.get("container", {}).get("image", "(importer)").replace(__version__, "VERSION"),
            "after": sorted(task.get("dependentTasks", [])),
            "artifacts": {k: f"{a['producerTask']}.{a['outputArtifactKey']}" for k, a in artifacts.items() if a},
            "parameters": sorted(inputs.get("parameters", {})),
            "cached": task.get("cachingOptions", {}).get("enableCache", False),
            "retries": task.get("retryPolicy", {}).get("maxRetryCount", 0),
            "resources": sorted(executor.get("container", {}).get("resources", {})),
            "environment": sorted(
                entry["envVar"]
                for kind, keys in (("secretAsEnv", "keyToEnv"), ("configMapAsEnv", "keyToEnv"))
                for source in pod.get(kind, [])
                for entry in source[keys]
            ),
        }
    return {"inputs": sorted(spec["root"]["inputDefinitions"]["parameters"]), "tasks": tasks}


def test_compiles_to_the_same_text_every_time(texts: dict[str, str], tmp_path: Path) -> None:
    assert compiled(tmp_path, "full.full", "rounds.two") == {name: texts[name] for name in ("full", "two")}


def executors(text: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each task with a container: its name, what the SDK's own part says of it, and what Kubernetes' says."""
    spec, platform = yaml.safe_load_all(text)
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for task, body in spec["root"]["dag"]["tasks"].items():
        label = spec["components"][body["componentRef"]["name"]]["executorLabel"]
        if "container" in spec["deploymentSpec"]["executors"][label]:
            yield task, body, pods[label]


def of_check(output: str) -> dict[str, Any]:
    return {"taskOutputParameter": {"producerTask": "check", "outputParameterKey": output}}


@pytest.mark.parametrize("name", PIPELINES)
def test_what_an_installation_calls_its_secrets_is_asked_of_the_first_step(name: str, texts: dict[str, str]) -> None:
    for task, body, pod in executors(texts[name]):
        used = [source["secretNameParameter"] for source in pod.get("secretAsEnv", [])]
        if task == "check":
            assert not used and not body.get("dependentTasks") and not body.get("retryPolicy")
            continue
        runs_model = task.rstrip("-0123456789") in ("curation", "bench", "evaluate")
        has_keys = runs_model or task == "reach"
        assert used == [of_check("store_secret"), *[of_check("endpoints_secret")] * (2 if has_keys else 0)], task
        tolerations = [t["tolerationJson"] for t in pod.get("tolerations", [])]
        assert tolerations == ([of_check("tolerations")] if runs_model else []), task
        assert ({"check"} if task == "reach" else {"check", "reach"}) <= set(body["dependentTasks"]), task
    assert "object-store" not in texts[name]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_step_knows_how_many_gpus_its_pod_asks_for(name: str, texts: dict[str, str]) -> None:
    for task, body, _ in executors(texts[name]):
        runs_model = task.rstrip("-0123456789") in ("curation", "bench", "evaluate")
        given = body["inputs"].get("parameters", {}).get("gpus") if task != "check" else None
        assert given == ({"componentInputParameter": "gpus"} if runs_model else None), task


@pytest.mark.parametrize("claim", ["", "firm-model-cache"])
def test_steps_that_load_models_mount_the_cache_that_the_pipeline_was_compiled_with(claim: str, tmp_path: Path) -> None:
    text = compiled(tmp_path, "full.full", **{MODEL_CACHE: claim})["full"]
    spec, platform = yaml.safe_load_all(text)
    mounts = {
        name.removeprefix("exec-"): (mount["constant"], mount["mountPath"])
        for name, pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items()
        for mount in pod.get("pvcMount", [])
    }
    homes = {
        name.removeprefix("exec-"): variable["value"]
        for name, executor in spec["deploymentSpec"]["executors"].items()
        for variable in executor["container"].get("env", [])
        if variable["name"] == "HF_HOME"
    }
    with_models = ("check", "reach", "curation", "bench", "evaluate") if claim else ()
    assert mounts == dict.fromkeys(with_models, (claim, MODELS)) and homes == dict.fromkeys(with_models, MODELS)


@pytest.mark.parametrize("name", PIPELINES)
def test_only_stages_themselves_find_what_is_there(name: str, texts: dict[str, str]) -> None:
    assert not any(body.get("cachingOptions", {}).get("enableCache") for _, body, _ in executors(texts[name]))


def test_the_first_step_gives_what_the_others_ask_for() -> None:
    assert tuple(components.check.component_spec.outputs) == Installation._fields


@pytest.mark.golden
def test_structure(texts: dict[str, str], golden: Callable[[str, str], None]) -> None:
    found = {name: structure(texts[name]) for name in PIPELINES}
    golden("structure.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", PIPELINES)
def test_component_bodies_are_an_import_and_one_call(name: str, texts: dict[str, str]) -> None:
    spec = next(yaml.safe_load_all(texts[name]))
    for executor in spec["deploymentSpec"]["executors"].values():
        if "container" not in executor:
            continue
        code = executor["container"]["command"][-1]
        body = [line for line in code.split("def ", 1)[1].splitlines() if line.startswith("    ")]
        assert sum("import" in line for line in body) == 1
        assert sum("execute(" in line for line in body) == 1
        assert "pip install" not in " ".join(executor["container"]["command"][:3])


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_takes_artifacts_from_a_backend_that_does_not_say_their_type(stage: str) -> None:
    component = getattr(components, stage)
    types = {name: spec.type for name, spec in component.component_spec.inputs.items() if "@" in spec.type}
    artifact = {"name": "1", "uri": "s3://bucket/pointer", "type": {"instanceSchema": ""}, "metadata": {}}
    inputs = {"artifacts": {name: {"artifacts": [artifact]} for name in types}}
    executor = Executor({"inputs": inputs, "outputs": {"outputFile": "/nowhere"}}, component.python_func)
    found = executor.input_artifacts
    assert types == {name: f"{made.schema_title}@{made.schema_version}" for name, made in found.items()}
