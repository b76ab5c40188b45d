"""The rl stage: describes the training job, launches it, reads its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from firm.config import SteeredRun
from firm.config.bench import PROOFS
from firm.config.reward import REWARD
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.metrics import read_metrics
from firm.records import Curve, Stage, Summary, UserError, Verdict
from firm.rl.audit import Audit, Fall, Who, band, change, first_fall, num_looks, over_optimised
from firm.rl.monitors import SHARES, all_alarms
from firm.stats import pairwise_accuracy, spearman
from firm.storage.artifacts import Output
from firm.storage.inputs import Inputs

WORKER = "firm.rl.train"
VERDICT = "verdict.json"
STAGE = Stage(name="rl", sections=("seed", "prompts", "policy", "critic", "reward", "rl", "auditor"), worker=WORKER)
ERROR = 0.05  # of the interval of the gain that the report sample shows


def run(config: SteeredRun, inputs: Inputs, out: Output) -> Summary:
    """Train the policy with the critic; ``inputs["verdict"]`` is the gate's permission.

    A critic that was trained is in ``inputs["critic"]``. A further round starts from the policy in
    ``inputs["last_policy"]``.

    Raises:
        UserError: The gate has not looked at all that RL needs, or at another critic.
    """
    verdict = Verdict.model_validate_json((inputs["verdict"] / VERDICT).read_text())
    _check_verdict(config, verdict)
    _check_critic(verdict, inputs.refs["critic"].sha256 if config.critic.kind == "trained" else "")
    request = {"config": config.model_dump(mode="json")}
    launch(TrainingJob(config.name, "rl", WORKER, request, inputs.refs), out, config.launch)
    lines = read_metrics(out.folder / "metrics.jsonl")
    audits = [Audit.model_validate(line) for line in read_metrics(out.folder / "audits.jsonl")]
    return summary(config, audits, lines)


def _check_verdict(config: SteeredRun, verdict: Verdict) -> None:
    """Of a run without RL, or with another reward, the gate need not have looked at all that this one needs."""
    ruled = {check.dimension for check in verdict.checks}
    needed = [f"{dimension}.{what}" for dimension in config.reward.dimensions for what in PROOFS]
    lacking = [gap for gap in needed if gap in verdict.gaps or gap.rpartition(".")[0] not in ruled]
    gaps = [gap for gap in lacking if gap not in config.bench.gate.accept_gaps]
    if gaps or not verdict.trusted:
        what = f"has passed no rule for {', '.join(gaps)} on images of the policy" if gaps else "is not trusted"
        fix = "measure it with this configuration, which has rl"
        raise UserError(f"the critic {what}, so it will not steer RL", "verdict", fix, usage=True)


def _check_critic(verdict: Verdict, critic: str) -> None:
    """The critic that steers RL is the one that was measured; ``critic`` is the hash of its manifest, if trained."""
    if verdict.critic != critic:
        measured, mine = (found[:12] or "none that was trained" for found in (verdict.critic, critic))
        what = f"the verdict is on another critic ({measured}) than the one that is to steer RL ({mine})"
        raise UserError(what, "verdict", "measure this critic: give RL the verdict of its own bench", usage=True)


def summary(config: SteeredRun, audits: Sequence[Audit], lines: Sequence[dict[str, Any]]) -> Summary:
    """What the audits show; the gain is that of the fresh sample that had no part in choosing the kept policy.

    Args:
        config: The run.
        audits: Its checks in order, then those of the sample "choice", then base and kept policy on "report".
        lines: Metrics of each epoch.
    """
    checks = [a for a in audits if a.sample == "check"]
    base, *others = (a for a in audits if a.sample == "report")
    kept = others[0] if others else base
    fall = over_optimised(checks, config) if config.auditor.stops else first_fall(checks, config)
    gain = _gain(base, kept, ERROR)
    alarms = all_alarms(lines, config.rl.monitors)
    metrics = {
        "epochs": float(checks[-1].epoch),
        "kept_epoch": float(kept.epoch),
        "stopped_by_auditor": float(config.auditor.stops and fall is not None),
        "alarms": float(len(alarms)),
        "invalid_judgements": sum(line["invalid_judgements"] for line in lines),
        **{name: value for name, value in gain.items() if value is not None},
    }
    for who in get_args(Who):
        for when, audit in (("base", base), ("kept", kept)):
            means = audit.means(who).items()
            metrics |= {f"{who}_{measure}_{when}": mean for measure, mean in means if mean is not None}
    tables = {"audits": _rows(config, audits), "stop": [fall.model_dump()] if fall else []}
    tables["alarms"] = [{**alarm.model_dump(), "sentence": str(alarm)} for alarm in alarms]
    x = [a.epoch for a in checks]
    curves = [Curve(name=f"audit_{w}_reward", x=x, y=[a.mean(w, REWARD) for a in checks]) for w in get_args(Who)]
    watched = [name for name, _ in SHARES.values() if any(name in line for line in lines)]
    curves += [_curve(lines, name) for name in ("reward", "loss", "old_deviation", *watched)]
    notes = [_story(metrics, fall, config.auditor.stops), *map(str, alarms)]
    return Summary(stage="rl", metrics=metrics, tables=tables, curves=curves, notes=notes)


def _rows(config: SteeredRun, audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """A row for each audit, compared with the base's of the same sample."""
    error = {"check": config.auditor.false_stops / num_looks(config), "choice": ERROR, "report": ERROR}
    base = {audit.sample: audit for audit in reversed(audits)}
    return [_row(audit, base[audit.sample], error[audit.sample]) for audit in audits]


def _row(audit: Audit, base: Audit, error: float) -> dict[str, Any]:
    """An audit in numbers: means, what was seen, how alike the judges' rewards order the images, gain over the base."""
    critic, auditor = (audit.values(who, REWARD) for who in get_args(Who))
    valid = np.isfinite(critic) & np.isfinite(auditor)
    prompts = [p for p, ok in zip(audit.prompts, valid, strict=True) if ok]
    both = (critic[valid], auditor[valid])
    return {
        "sample": audit.sample,
        "epoch": audit.epoch,
        **{f"{who}_{measure}": mean for who in get_args(Who) for measure, mean in audit.means(who).items()},
        **audit.seen,
        "agreement": spearman(*both) if prompts else None,
        "pairwise": pairwise_accuracy(*both, prompts)[0] if prompts else None,
        "invalid": int((~valid).sum()),
        **_gain(base, audit, error),
    }


def _gain(base: Audit, audit: Audit, error: float) -> dict[str, float | None]:
    """The auditor's mean reward over the base's, with the ends of its interval."""
    differences = change([base], [audit], "auditor", REWARD)
    low, high = band(base, audit, error) or (None, None)
    gain = float(np.nanmean(differences)) if np.isfinite(differences).any() else None
    return {"gain": gain, "gain_low": low, "gain_high": high}


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    known = [(line["step"], line[name]) for line in lines if line[name] is not None]
    return Curve(name=name, x=[step for step, _ in known], y=[value for _, value in known])


def _story(metrics: dict[str, float], fall: Fall | None, stops: bool) -> str:
    kept = f"{metrics['kept_epoch']:.0f}"
    text = (
        "On freshly drawn prompts and noise the reward by the auditor's own scores is "
        f"{metrics['auditor_reward_base']:.3f} for the base and {metrics['auditor_reward_kept']:.3f} for epoch {kept}, "
        "which was kept."
    )
    if metrics["kept_epoch"] == 0:
        text = (
            "On freshly drawn prompts and noise no candidate had a higher reward by the auditor's scores than the base."
        )
    if fall is None:
        return (
            text if stops else f"{text} The auditor saw no over-optimisation, and by configuration could stop nothing."
        )
    end = "RL stopped." if stops else "RL went on: by configuration (auditor.stops) the auditor does not stop it."
    return (
        f"Over-optimisation: from epoch {fall.since} to {fall.until} the auditor's {fall.measure} fell from "
        f"{fall.auditor_before:.3f} to {fall.auditor_after:.3f}, by {fall.at_least:.3f} or more beyond chance, "
        f"while the critic's went from {fall.critic_before:.3f} to {fall.critic_after:.3f}. {end} {text}"
    )
