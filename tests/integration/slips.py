"""The command line in another process, and what it must say of what users do wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared import python_path

from firm.config.loading import load_config

# Runs stages in one process, as the components of the pipeline do.
STAGES = """
import json, sys
from firm.stage import execute
inputs = {"curation": {}, "sft": {"data": "curation"}, "bench": {"data": "curation", "critic": "sft"},
          "gate": {"bench": "bench"}}
for stage in sys.argv[2:]:
    execute(stage, json.loads(sys.argv[1]), inputs[stage], stage)
"""
Case = tuple[dict[str, str | bytes], list[str], list[str]]
"""Files to write, assignments, what the message must name."""
Result = subprocess.CompletedProcess[str]


def call(folder: Path, *arguments: str, **options: Any) -> Result:
    env = {**os.environ, "PYTHONPATH": python_path(folder), "AWS_REGION": "us-east-1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", 60),
        check=False,
        **options,
    )


def run(source: str, *assignments: str) -> list[str]:
    """Words of the command line."""
    return ["run", source, *(word for assignment in assignments for word in ("--set", assignment))]


def firm(folder: Path, *arguments: str, source: str = "small.yaml", **options: Any) -> Result:
    return call(folder, "-m", "firm.cli", *run(source, *arguments), **options)


def stages(folder: Path, names: str, *arguments: str, **options: Any) -> Result:
    config = load_config(str(folder / "small.yaml"), arguments).model_dump(mode="json", exclude_none=True)
    return call(folder, "-c", STAGES, json.dumps(config), *names.split(), **options)


def complains(result: Result, code: int, *words: str) -> None:
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in said, said
    assert [line[:7] for line in result.stderr.splitlines()].count("error: ") == 1, said
    assert "\n  -> " in result.stderr, f"no next step: {result.stderr}"
    for word in words:
        assert word in result.stderr, f"{word!r} is not in: {result.stderr}"


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
