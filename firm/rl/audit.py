"""The auditor's stop rule: RL ends when the reward keeps rising while a judge it does not optimise falls."""

from __future__ import annotations

from collections.abc import Sequence

from firm.config import AuditorConfig
from firm.records import Record


class Audit(Record):
    """One check on fixed prompts and noise.

    Attributes:
        epoch: After this many epochs; 0 is the base.
        reward: Mean reward by the critic, in [0, 1].
        critic: Mean base score by the critic, 1..5.
        auditor: Mean base score by the auditor, 1..5.
        agreement: Spearman correlation of critic and auditor on these images, None where undefined.
        invalid: Failed judgements of either.
    """

    epoch: int
    reward: float
    critic: float
    auditor: float
    agreement: float | None
    invalid: int


def best(audits: Sequence[Audit]) -> Audit:
    """The audit with the highest auditor score; the earliest of equals."""
    return max(audits, key=lambda a: (a.auditor, -a.epoch))


def over_optimised(audits: Sequence[Audit], config: AuditorConfig) -> bool:
    """True when each of the last ``patience`` checks has a reward above the best audit's and a lower auditor score.

    That is what reward hacking looks like: the critic likes what an independent judge does not.
    """
    recent = audits[-config.patience :]
    top = best(audits)
    return len(recent) == config.patience and all(
        a.epoch > top.epoch and a.reward >= top.reward and a.auditor < top.auditor - config.tolerance for a in recent
    )
