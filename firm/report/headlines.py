"""Headlines: a run's numbers in sentences that claim no more than the numbers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firm.config import RunConfig
from firm.records import Summary

Headline = dict[str, str]
"""``tone`` (good, note or bad), ``title`` (one sentence) and ``text`` (what it means)."""


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number for readers: a typographic minus, but not on a rounded zero, and a dash for None."""
    if value is None:
        return "–"
    text = f"{value:{sign},.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def signed(value: float, digits: int = 2) -> str:
    """A number that always has its sign, but for zero."""
    return number(value, digits, "+")


def words(name: str) -> str:
    """``instruction_following`` as words."""
    return name.replace("_", " ")


def headlines(config: RunConfig, summaries: Mapping[str, Summary]) -> list[Headline]:
    """Whether the critic is trusted, what RL gained, and whether it went too far."""
    return [
        _trust(config, summaries["bench"]),
        _gain(config.reward.base, summaries["samples"]),
        _stop(summaries["policy"]),
    ]


def _trust(config: RunConfig, bench: Summary) -> Headline:
    metrics = bench.metrics
    base = config.reward.base
    trusted = bool(metrics.get("trusted"))
    head = "The critic is trusted" if trusted else "The critic is not trusted"
    mae = metrics.get(f"{base}_mae")
    constant = metrics.get(f"{base}_constant_mae")
    if mae is None or constant is None:
        text = f"Its error on {words(base)} is not known: there are no such judgements."
        return {"tone": "note", "title": f"{head}.", "text": text}
    n = metrics[f"{base}_n"]
    score = metrics[f"{base}_constant_score"]
    text = (
        f"On {n:,.0f} test examples, from prompts that it was not trained on, its scores for "
        f"{words(base)} are off the teacher's by {mae:.2f} points on average, on a scale from 1 to 5. "
        f"Always answering {score:.0f} would be off by {constant:.2f}."
    )
    better = mae < constant
    for bonus in config.reward.dimensions[1:]:
        # The gate may have no rule for these, and the reward is made of them, too.
        mine = metrics.get(f"{bonus}_mae")
        other = metrics.get(f"{bonus}_constant_mae")
        if mine is not None and other is not None:
            text += f" For {words(bonus)}: {mine:.2f} against {other:.2f}."
            better = better and mine < other
    title = f"{head}: MAE {mae:.2f} against {constant:.2f} for the best constant."
    return {"tone": ("good" if better else "note") if trusted else "bad", "title": title, "text": text}


def _gain(dimension: str, evaluation: Summary) -> Headline:
    rows: dict[str, dict[str, Any]] = {
        row["policy"]: row
        for row in evaluation.tables.get("scores", [])
        if row["judge"] == "auditor" and row["dimension"] == dimension
    }
    if not rows:
        title = "RL's effect is not known: the auditor gave no valid judgement."
        return {"tone": "bad", "title": title, "text": "See the failed judgements below."}
    gain = rows["gain"]
    interval = f"gain {signed(gain['mean'])}, 95% CI {signed(gain['low'])} to {signed(gain['high'])}"
    scores = f"from {rows['base']['mean']:.2f} to {rows['final']['mean']:.2f} ({interval})"
    where = "the auditor's score on held-out prompts"
    if gain["low"] > 0:
        tone = "good"
        title = f"RL raised {where} {scores}."
    elif gain["high"] < 0:
        tone = "bad"
        title = f"RL lowered {where} {scores}."
    else:
        tone = "note"
        title = f"RL did not measurably change {where}: {scores}."
    text = (
        f"The auditor is a judge that RL does not optimise. It compared {gain['n']:,} pairs of images of prompts that "
        "RL never saw, each pair from the same noise."
    )
    full = {w: evaluation.metrics.get(f"auditor_{dimension}_full_marks_{w}") for w in ("base", "final")}
    if full["base"] is not None and full["final"] is not None:
        text += f" Images with full marks: {full['base']:.0%} before, {full['final']:.0%} after."
    if guided := rows.get("guided"):
        text += f" The policy before RL, but sampled with guidance as users do, has {guided['mean']:.2f}."
    return {"tone": tone, "title": title, "text": text}


def _stop(rl: Summary) -> Headline:
    m = rl.metrics
    kept = f"{m['kept_epoch']:.0f}"
    interval = f", 95% CI {signed(m['gain_low'], 3)} to {signed(m['gain_high'], 3)}" if "gain_low" in m else ""
    text = (
        "On fresh prompts and noise, which had no part in the choice, the reward by the auditor's own scores went from "
        f"{m['auditor_reward_base']:.3f} before RL to {m['auditor_reward_kept']:.3f} at epoch {kept}{interval}."
    )
    if m["kept_epoch"] == 0:
        text = "On fresh prompts and noise no candidate had a higher reward by the auditor's scores than the base."
    for fall in rl.tables.get("stop", []):
        what = words(fall["measure"])
        title = (
            f"Over-optimisation was caught at epoch {m['epochs']:.0f}: {what} fell for the auditor, not for the critic."
        )
        digits = 3 if what == "reward" else 2
        by_judge = {
            who: f"{fall[f'{who}_before']:.{digits}f} to {fall[f'{who}_after']:.{digits}f}"
            for who in ("auditor", "critic")
        }
        text = (
            f"From the checks up to epoch {fall['since']} to the last ones the auditor's mean went from "
            f"{by_judge['auditor']}; the interval that holds at every check excludes no fall. The critic's went from "
            f"{by_judge['critic']}. Epoch {kept} was kept. {text}"
        )
        return {"tone": "note", "title": title, "text": text}
    title = f"No over-optimisation was caught in {m['epochs']:.0f} epochs of RL; kept epoch {kept}."
    return {"tone": "good" if m.get("gain_low", 0) > 0 else "note", "title": title, "text": text}
