"""The rl stage: describes the training job, launches it, reads its curves."""

from __future__ import annotations

from typing import Any

from firm.config import RunConfig
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.metrics import read_metrics
from firm.records import Curve, Stage, Summary
from firm.rl.audit import Audit, best, over_optimised
from firm.storage.artifacts import Output
from firm.storage.inputs import Inputs

WORKER = "firm.rl.train"
STAGE = Stage(name="rl", sections=("seed", "prompts", "policy", "critic", "reward", "rl", "auditor"), worker=WORKER)


def run(config: RunConfig, inputs: Inputs, out: Output) -> Summary:
    """Train the policy with the critic in ``inputs["critic"]``; ``inputs["verdict"]`` is the gate's permission.

    A further round starts from the policy in ``inputs["last_policy"]``.
    """
    request = {"config": config.model_dump(mode="json")}
    launch(TrainingJob(config.name, "rl", WORKER, request, inputs.refs), out, config.launch)
    lines = read_metrics(out.folder / "metrics.jsonl")
    audits = [Audit.model_validate(line) for line in read_metrics(out.folder / "audits.jsonl")]
    base = audits[0]
    kept = best(audits)
    stopped = over_optimised(audits, config.auditor)
    return Summary(
        stage="rl",
        metrics={
            "epochs": float(audits[-1].epoch),
            "kept_epoch": float(kept.epoch),
            "stopped_by_auditor": float(stopped),
            "auditor_base": base.auditor,
            "auditor_kept": kept.auditor,
            "auditor_last": audits[-1].auditor,
            "reward_base": base.reward,
            "reward_kept": kept.reward,
            "reward_last": audits[-1].reward,
            "invalid_judgements": sum(line["invalid_judgements"] for line in lines),
        },
        tables={"audits": [a.model_dump() for a in audits]},
        curves=[
            *(
                Curve(name=f"audit_{name}", x=[a.epoch for a in audits], y=[getattr(a, name) for a in audits])
                for name in ("reward", "critic", "auditor")
            ),
            *(_curve(lines, name) for name in ("reward", "loss", "old_deviation")),
        ],
        notes=[_story(audits, stopped)],
    )


def _curve(lines: list[dict[str, Any]], name: str) -> Curve:
    known = [(line["step"], line[name]) for line in lines if line[name] is not None]
    return Curve(name=name, x=[step for step, _ in known], y=[value for _, value in known])


def _story(audits: list[Audit], stopped: bool) -> str:
    base = audits[0]
    kept = best(audits)
    last = audits[-1]
    gain = f"The auditor's score rose from {base.auditor:.2f} to {kept.auditor:.2f} at epoch {kept.epoch}."
    if kept.epoch == 0:
        gain = f"The auditor's score never rose above the base's {base.auditor:.2f}, so the base was kept."
    if not stopped:
        return gain
    return (
        f"{gain} After that the reward went on from {kept.reward:.3f} to {last.reward:.3f} while the auditor fell to "
        f"{last.auditor:.2f}: over-optimisation. RL stopped at epoch {last.epoch} and kept epoch {kept.epoch}."
    )
