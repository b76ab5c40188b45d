"""Runs a pipeline's stages, and their workers, in this process: starting Python for each would take longer."""

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from firm.config import RunConfig, stages_of
from firm.launch.job import TrainingJob
from firm.lifeline import LIFELINE
from firm.progress import ROUND
from firm.stage import execute
from firm.storage.artifacts import Output
from firm.storage.inputs import open_input
from pipelines.local import StageFailed

# Stage -> name of its output, and of its inputs with the stages that they come from.
STAGES: dict[str, tuple[str, Mapping[str, str]]] = {
    "curation": ("data", {}),
    "sft": ("critic", {"data": "curation"}),
    "bench": ("agreement", {"data": "curation", "critic": "sft"}),
    "gate": ("verdict", {"bench": "bench"}),
    "rl": ("policy", {"critic": "sft", "verdict": "gate"}),
    "evaluate": ("samples", {"critic": "sft", "policy": "rl"}),
    "report": (
        "report",
        {"data": "curation", "critic": "sft", "bench": "bench", "verdict": "gate", "policy": "rl",
         "samples": "evaluate"},
    ),
}  # fmt: skip


def run_stages(config: RunConfig, folder: Path, without: Collection[str] = ()) -> Path:
    """`pipelines.local.run_locally` without KFP; the tests that call it also want `stay_here`."""
    pointers: dict[str, str] = {}
    for stage in stages_of(config):
        output, inputs = STAGES[stage]
        if stage in without:
            continue
        path = folder / "kfp" / "firm-1" / stage / output
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            given = {name: pointers[source] for name, source in inputs.items() if source in pointers}
            execute(stage, config.model_dump(mode="json"), given, str(path))
        except SystemExit as end:
            raise StageFailed(stage, f"{stage} has its reasons", "", end.code == 2) from end
        pointers[stage] = str(path)
    return folder / "report.html"


def stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are called instead of started, and what stages set for their own processes is forgotten in the end."""

    def work(job: TrainingJob, out: Output, _: object) -> None:
        inputs = {name: open_input(ref) for name, ref in job.inputs.items()}
        importlib.import_module(job.module).train(job.request, inputs, out)

    for name in (LIFELINE, ROUND):
        monkeypatch.setenv(name, "")
    for stage in ("sft", "rl"):
        monkeypatch.setattr(f"firm.{stage}.run.launch", work)
