"""The sft stage: describes the training job, launches it, packs the critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from firm.config import RunConfig
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.metrics import read_metrics
from firm.records import Curve, Stage, Summary
from firm.storage.artifacts import Output
from firm.storage.inputs import Inputs

WORKER = "firm.sft.train"
STAGE = Stage(name="sft", sections=("seed", "critic", "sft"), reads={"data": ("train/", "test/")}, worker=WORKER)
CRITIC = "critic"
METRICS = "metrics.jsonl"
EVAL = "eval/"
"""Start of the names of what held-out examples show."""


def run(config: RunConfig, inputs: Inputs, out: Output) -> Summary:
    """Train the critic on ``inputs["data"]``, from the last round's in ``inputs["last_critic"]`` where there is one.

    A critic that is there already needs no training.
    """
    if config.critic.kind != "trained":
        where = "served at an endpoint" if config.critic.kind == "endpoint" else "used as it is"
        return Summary(stage="sft", notes=[f"The critic is {where}: nothing was trained."])
    request = {
        "seed": config.seed,
        "critic": config.critic.model_dump(mode="json"),
        "sft": config.sft.model_dump(mode="json"),
    }
    job = TrainingJob(config.name, "sft", WORKER, request, inputs.refs, STAGE.reads, streams=("data",))
    launch(job, out, config.launch)
    lines = read_metrics(out.folder / METRICS)
    names = dict.fromkeys(name for line in lines for name in line if name == "loss" or name.startswith(EVAL))
    curves = [_curve(name, [line for line in lines if name in line]) for name in names]
    last = lines[-1]
    return Summary(stage="sft", metrics={"loss": last["loss"], "steps": float(last["step"])}, curves=curves)


def _curve(name: str, lines: Sequence[Mapping[str, float]]) -> Curve:
    return Curve(name=name, x=[line["step"] for line in lines], y=[line[name] for line in lines])
