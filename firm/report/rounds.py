"""What the report of a round knows of the rounds before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firm.config import SteeredRun
from firm.config.reward import REWARD
from firm.records import Summary
from firm.report.headlines import gains

DATA = "data.json"
Rows = list[dict[str, Any]]


def earlier_rounds(last_report: Path | None) -> Rows:
    """The rows of `this_round` of all rounds before this one, from the last one's report."""
    if last_report is None:
        return []
    rows: Rows = json.loads((last_report / DATA).read_text())["rounds"]
    return rows


def this_round(summaries: Mapping[str, Summary], config: SteeredRun, lineage: Rows) -> dict[str, Any]:
    """One row: how good the critic was before RL and on what RL made of the policy, and what RL gained.

    ``before``, ``after`` and ``gain`` are of the reward by the auditor's scores and ``gains`` of its dimensions, over
    the policy before the first round, on the same prompts and noise in every round. ``pairwise`` is the critic's
    accuracy within a prompt: on images of the policy that this round's RL started from, against the reference scores,
    and on the samples of the evaluation, against the auditor's.
    """
    measured = gains(config, summaries["samples"])
    metrics = summaries["samples"].metrics
    rows = measured.pop(REWARD, {})
    gain = rows.get("gain", {})
    return {
        "before": rows["base"]["mean"] if rows else None,
        "after": rows["final"]["mean"] if rows else None,
        **{f"gain{end}": gain.get(key) for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))},
        "gains": {d: measured[d]["gain"]["mean"] if d in measured else None for d in config.reward.dimensions},
        "pairwise": {
            d: {which: metrics.get(f"critic_{d}_pairwise_{which}") for which in ("base", "final")}
            | {"start": _at_the_start(summaries["bench"], config, d)}
            for d in config.reward.dimensions
        },
        "kept_epoch": summaries["policy"].metrics["kept_epoch"],
        "lineage": lineage,
    }


def _at_the_start(bench: Summary, config: SteeredRun, dimension: str) -> float | None:
    for row in bench.tables.get("agreement", []):
        own = row["by"] == "source" and row["value"] in config.bench.policy_sources
        if own and (row["judge"], row["dimension"]) == ("critic", dimension):
            value: float | None = row["pairwise"]
            return value
    return None
