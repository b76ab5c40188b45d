"""Which stages a run has, and what each of them needs: the one place that says so, for `firm run` and for clusters."""

from __future__ import annotations

from firm.config.auditor import AuditorConfig
from firm.config.bench import BenchConfig
from firm.config.curation import CurationConfig
from firm.config.policy import PolicyConfig
from firm.config.reward import RewardConfig
from firm.config.rl import RLConfig
from firm.config.run import STAGES, RunConfig, StageName
from firm.records import UserError


class CuratedRun(RunConfig):
    """A run with a teacher."""

    curation: CurationConfig


class MeasuredRun(RunConfig):
    """A run whose critic is measured."""

    bench: BenchConfig


class TaughtRun(MeasuredRun):
    """A run whose teacher judges images of a policy for the bench."""

    policy: PolicyConfig
    curation: CurationConfig


class SteeredRun(MeasuredRun):
    """A run with RL."""

    policy: PolicyConfig
    reward: RewardConfig
    rl: RLConfig
    auditor: AuditorConfig


NEEDS: dict[StageName, type[RunConfig]] = {
    "curation": CuratedRun,
    "sft": RunConfig,
    "bench": MeasuredRun,
    "gate": MeasuredRun,
    "rl": SteeredRun,
    "evaluate": SteeredRun,
    "report": RunConfig,
}
"""How each stage sees the run."""


def stages_of(config: RunConfig) -> tuple[StageName, ...]:
    """The stages of a whole run, left to right: those whose sections the configuration has.

    Raises:
        UserError: There is none, or one has nothing to work on: the critic nothing to learn from, or the bench no
            examples.
    """
    curates = config.curation is not None and bool(config.curation.sources)
    if config.critic.kind == "trained" and not curates:
        fix = "add curation with sources, or say what there is already with critic.kind: existing or endpoint"
        raise UserError("there is nothing from which the critic could learn", "curation", fix, usage=True)
    if config.bench is not None and not curates and not config.bench.sources:
        fix = "give bench.sources, or curation with sources"
        raise UserError("there is nothing on which the critic could be measured", "bench.sources", fix, usage=True)
    described = {
        "curation": curates,
        "sft": curates,
        "bench": config.bench is not None,
        "gate": config.bench is not None,
        "rl": config.rl is not None,
        "evaluate": config.rl is not None,
    }
    if not any(described.values()):
        fix = "add bench to measure the critic, or curation with sources to train one"
        raise UserError("the configuration describes no stage", "curation, bench", fix, usage=True)
    return tuple(stage for stage in STAGES if described.get(stage, True))


def for_stage(config: RunConfig, stage: StageName) -> RunConfig:
    """The run as a stage sees it.

    Raises:
        UserError: It lacks a section that the stage needs; stage and section are named.
    """
    return config.having(NEEDS[stage], f"the stage {stage}")
