"""Kubeflow Pipelines, as tests talk to it: compile, submit with the kfp command line, wait."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any


def call(api: str, path: str) -> dict[str, Any]:
    """Answer of the API at an address; empty while it cannot be reached."""
    try:
        with urllib.request.urlopen(f"{api}/apis/v2beta1/{path}", timeout=20) as answer:
            return dict(json.load(answer))
    except OSError:
        return {}  # being restarted


def state(api: str, run_id: str) -> str:
    """State of a run."""
    return str(call(api, f"runs/{run_id}").get("state", ""))


def finish(kind: Any, api: str, run_id: str, expected: str = "SUCCEEDED", seconds: float = 900) -> None:
    """Wait for a run's end, which is to be as expected."""
    ended = ("SUCCEEDED", "FAILED", "CANCELED")
    assert kind.wait_for("the run's end", lambda: (s := state(api, run_id)) in ended and s, seconds) == expected


def package(kind: Any, pipeline: Path, *options: str) -> Path:
    """Compile a pipeline into the file, with the images of the installation."""
    kind.run("kfp", "dsl", "compile", *options, "--output", str(pipeline))
    runtime = kind.kubectl("get", "configmap", "firm", "-o", "jsonpath={.data.FIRM_IMAGE}")
    slim = kind.get("cronjobs")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["image"]
    text = pipeline.read_text()
    for target, image in (("runtime", runtime), ("slim", slim)):
        text = re.sub(rf"image: firm/{target}:\S+", f"image: {image}", text)
    pipeline.write_text(text)
    return pipeline


def submit(kind: Any, api: str, pipeline: Path, name: str, *parameters: str) -> str:
    """Start a run of a compiled pipeline with parameters such as ``config={...}``; returns its id."""
    said = kind.run(
        "kfp", "--endpoint", api, "--output", "json", "run", "create", "-e", "firm", "-r", name,
        "-f", str(pipeline), *parameters,
    )  # fmt: skip
    found = re.search(r"runs/details/([0-9a-f-]{36})", said)
    assert found, said
    return found[1]
