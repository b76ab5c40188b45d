"""The pipelines compile, always to the same text, and to the structure kept in golden/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from firm import __version__
from pipelines import rounds, stages
from pipelines.full import full

PIPELINES = {
    "full": full,
    "two": rounds.two,
    **{name: getattr(stages, name) for name in ("curation", "sft", "bench", "rl")},
}


def compiled(name: str, folder: Path) -> str:
    path = folder / f"{name}.yaml"
    compiler.Compiler().compile(PIPELINES[name], str(path))
    return path.read_text()


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


@pytest.mark.parametrize("name", PIPELINES)
def test_compiles_to_the_same_text_every_time(name: str, tmp_path: Path) -> None:
    assert compiled(name, tmp_path) == compiled(name, tmp_path)


@pytest.mark.golden
def test_structure(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    found = {name: structure(compiled(name, tmp_path)) for name in PIPELINES}
    golden("structure.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", PIPELINES)
def test_component_bodies_are_an_import_and_one_call(name: str, tmp_path: Path) -> None:
    spec = next(yaml.safe_load_all(compiled(name, tmp_path)))
    for executor in spec["deploymentSpec"]["executors"].values():
        if "container" not in executor:
            continue
        code = executor["container"]["command"][-1]
        body = [line for line in code.split("def ", 1)[1].splitlines() if line.startswith("    ")]
        assert sum("import" in line for line in body) == 1
        assert sum("execute(" in line for line in body) == 1
        assert "pip install" not in " ".join(executor["container"]["command"][:3])
