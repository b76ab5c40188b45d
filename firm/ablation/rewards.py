"""The rewards that are compared, and the configuration of each run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from firm.config import RewardConfig, RunConfig, SteeredRun
from firm.config.loading import parse_config
from firm.config.reward import NAMED
from firm.records import UserError

# By the named reward of the task, in the order of the table: those of the paper's table 5, and for generation its QMA
# against instruction following alone.
COMPARED = {
    "cme": ("weighted-sum-0.5-0.5", "weighted-sum-0.6-0.4", "base-only", "cme"),
    "qma": ("base-only", "qma"),
}
BASE_ONLY = "base-only"
_SUM = re.compile(r"weighted-sum-(\d*\.?\d+)-(\d*\.?\d+)")


@dataclass(frozen=True)
class Planned:
    """One run of an ablation.

    Attributes:
        reward: Name of its reward: the task's own, base-only or weighted-sum-A-B.
        label: The reward in words.
        config: The run: the auditor looks on and stops nothing, so that all runs have equally many epochs.
    """

    reward: str
    label: str
    config: SteeredRun

    @property
    def folder(self) -> str:
        """Name of the folder of its log and report."""
        return f"{self.reward}-seed-{self.config.seed}"

    def at(self, store: str) -> Planned:
        """The same run with its artifacts in another store, or by an absolute path."""
        return replace(self, config=self.config.model_copy(update={"store": store}))


def plan(run: RunConfig, seeds: Sequence[int], names: Sequence[str] = ()) -> list[Planned]:
    """The runs, seed after seed, so that the data and the critic of a seed are made once and every reward has them.

    Args:
        run: A run with the task's own reward, or another one of the same dimensions.
        seeds: A run of each reward has each of these.
        names: Of the rewards; default: those of `COMPARED`.

    Raises:
        UserError: The run has no RL or several rounds, the task no rewards to compare, a reward is unknown, or there is
            no seed.
    """
    config = run.having(SteeredRun, "an ablation of rewards")
    if not seeds:
        raise UserError("an ablation needs a seed", "--seed", "give at least one, such as --seed 0", usage=True)
    if config.rounds != 1:
        fix = "set rounds=1: further rounds would train the critic on what each reward has made"
        raise UserError("rewards are compared in runs of one round", "rounds", fix, usage=True)
    task = _task(config)
    formulas = {name: _formula(name, task) for name in names or COMPARED[task]}
    chosen = {_name(formula): formula for formula in formulas.values()}
    order = sorted(chosen, key=lambda name: (name == task, name == BASE_ONLY))
    return [_planned(config, name, chosen[name], task, seed) for seed in dict.fromkeys(seeds) for name in order]


def _formula(name: str, task: str) -> dict[str, Any]:
    """What a reward's name says."""
    if name == task:
        return {"formula": task}
    if name == BASE_ONLY:
        return {"formula": "base_only", "weights": [1.0]}
    if found := _SUM.fullmatch(name):
        weights = [float(weight) for weight in found.groups()]
        if math.isclose(sum(weights), 1):
            return {"formula": "weighted_sum", "weights": weights}
    fix = f"use {task}, {BASE_ONLY} or weighted-sum-A-B with weights that add up to 1, such as weighted-sum-0.4-0.6"
    raise UserError(f"there is no reward {name!r} for this task", "--reward", fix, usage=True)


def _name(formula: dict[str, Any]) -> str:
    """The name of a formula, the same however its weights are written."""
    match formula["formula"]:
        case "base_only":
            return BASE_ONLY
        case "weighted_sum":
            return "-".join(["weighted-sum", *(f"{weight:g}" for weight in formula["weights"])])
    return str(formula["formula"])


def _task(config: SteeredRun) -> str:
    """The named reward that has the dimensions of the configuration's."""
    for name, named in NAMED.items():
        if (config.reward.base, config.reward.bonuses) == (named["base"], named["bonuses"]):
            return name
    tasks = " or ".join(f"base {n['base']} and bonuses {n['bonuses']} ({name})" for name, n in NAMED.items())
    what = f"no rewards are known for base {config.reward.base} and bonuses {config.reward.bonuses}"
    raise UserError(what, "reward", f"use a configuration whose reward has {tasks}", usage=True)


def _planned(config: SteeredRun, name: str, formula: dict[str, Any], task: str, seed: int) -> Planned:
    given = {**formula, "soft": config.reward.soft}
    reward = RewardConfig.model_validate({"base": config.reward.base, "bonuses": config.reward.bonuses, **given})
    if config.reward.formula == reward.formula == task:
        reward = config.reward  # with weights of its own
    plain = config.model_dump(mode="json")
    gate = plain["bench"]["gate"]
    gaps = config.bench.gaps(reward.dimensions)
    gate["accept_gaps"] = [gap for gap in gate["accept_gaps"] if gap in gaps]
    plain |= {"reward": reward.model_dump(mode="json"), "seed": seed}
    plain["auditor"]["stops"] = False
    planned = parse_config(plain, f"{config.name} with {name}")
    return Planned(name, _label(reward), planned.having(SteeredRun, name))


def _label(reward: RewardConfig) -> str:
    match reward.formula:
        case "base_only":
            return f"{reward.base.replace('_', ' ')} only"
        case "weighted_sum":
            return f"weighted sum {'/'.join(f'{weight:g}' for weight in reward.weights)}"
    return reward.formula.upper()
