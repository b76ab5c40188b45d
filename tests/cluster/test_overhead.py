"""What a step of Kubeflow Pipelines costs besides its own work, with the chart's settings and with KFP's defaults."""

import sys
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from cluster import kubeflow
from kfp import compiler, dsl

pytestmark = [pytest.mark.kfp, pytest.mark.bench]
DEFAULTS = ("argo.requeueTime=10s", "argo.informerWriteBack=false", "argo.workflow.podSpecPatch=")
TASKS = 4


def compile_chain(image: str, path: Path) -> Path:
    """A pipeline of small tasks, one after the other, each with a new result."""

    @dsl.component(base_image=image, install_kfp_package=False)
    def step(text: str) -> str:
        return text + "."

    @dsl.pipeline(name="overhead")
    def chain(text: str) -> None:
        for _ in range(TASKS):
            task = step(text=text).set_caching_options(False)
            task.set_cpu_request("50m").set_cpu_limit("1").set_memory_request("128Mi").set_memory_limit("512Mi")
            text = task.output

    compiler.Compiler().compile(chain, str(path))
    return path


def seconds_a_step(kind: Any, package: Path) -> list[float]:
    """From the start of a task's driver to that of the next one's."""
    with kind.forward("ml-pipeline", 8888) as api:
        kind.wait_for("the API", lambda: kubeflow.call(api, "healthz"), 120)
        run_id = kubeflow.submit(kind, api, package, "overhead", "text=a")
        kubeflow.finish(kind, api, run_id, seconds=400)
    [workflow] = kind.get("workflows", "-l", f"pipeline/runid={run_id}")
    nodes = [n for n in workflow["status"]["nodes"].values() if n["type"] == "Pod"]
    drivers = sorted(_time(n["startedAt"]) for n in nodes if "container-driver" in n["displayName"] + n["templateName"])
    ends = [*drivers[1:], _time(workflow["status"]["finishedAt"])]
    return [round(end - start, 1) for start, end in zip(drivers, ends, strict=True)]


def _time(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


@pytest.mark.usefixtures("backend")
def test_a_step_costs_less_than_with_the_defaults(kind: Any, tmp_path: Path) -> None:
    slim = kind.get("cronjobs")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["image"]
    package = compile_chain(slim, tmp_path / "chain.yaml")
    values = tmp_path / "values.yaml"
    values.write_text(kind.run("helm", "get", "values", "platform", "-n", kind.namespace, "-o", "yaml"))
    found: dict[str, list[float]] = {}
    for name, settings in (("defaults", DEFAULTS), ("ours", ())):
        flags = [x for s in settings for x in ("--set", s)]
        kind.run("helm", "upgrade", "platform", "charts/platform", "-n", kind.namespace, "-f", str(values), *flags)
        kind.kubectl("rollout", "status", "deployment/workflow-controller", "--timeout=120s")
        found[name] = seconds_a_step(kind, package)
        sys.stderr.write(f"\n{name}: seconds a step {found[name]}, median {median(found[name]):.1f}\n")
    assert median(found["ours"]) < 0.75 * median(found["defaults"])
