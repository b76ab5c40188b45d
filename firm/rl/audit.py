"""The auditor's statistics: when RL has gone too far, and which policy is kept.

All audits of a run see the same prompts and noise, so two audits differ image by image, and the images are a sample of
all prompts and noises. A later audit is a new question to that one sample, not new data on an old question: there is no
martingale for a confidence sequence to follow, and what keeps the error at every look is a union bound. The chance of a
false stop is spent evenly over the looks, and within a look over all earlier checks that it is compared with and over
all measures, so that a reference which was only lucky is paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from firm.config import SteeredRun
from firm.config.reward import REWARD
from firm.intervals import Floats, paired_interval
from firm.records import Record

Who = Literal["critic", "auditor"]
SampleName = Literal["check", "choice", "report"]
Values = tuple[float | None, ...]


class Audit(Record):
    """Two judges on a policy's images, N of them. Values are None where a judgement failed.

    Attributes:
        sample: Whose prompts and noise: those of all checks ("check"), or one of the two fresh samples that choose the
            kept policy ("choice") and measure it ("report").
        epoch: After this many epochs; 0 is the base.
        prompts: Number of each image's prompt (N); equal ones are one cluster.
        critic: Values (N) by measure: the reward, in [0, 1], and each dimension of the critic, 1..5.
        auditor: The same by the auditor; its reward is what the formula makes of its own scores.
        seen: Share of the images that are copies of their source, for editing, and that are blank.
    """

    sample: SampleName = "check"
    epoch: int
    prompts: tuple[int, ...]
    critic: dict[str, Values]
    auditor: dict[str, Values]
    seen: dict[str, float] = Field(default_factory=dict)

    def values(self, who: Who, measure: str) -> Floats:
        """Values [N] of a measure, NaN where the judgement failed."""
        return np.array(getattr(self, who)[measure], dtype=np.float64)

    def mean(self, who: Who, measure: str) -> float:
        """Mean of a measure's valid values."""
        return float(np.nanmean(self.values(who, measure)))

    def means(self, who: Who) -> dict[str, float | None]:
        """Mean of every measure; None where no judgement was valid, as of a dimension that is in no reward."""
        known = {measure: np.isfinite(self.values(who, measure)).any() for measure in getattr(self, who)}
        return {measure: self.mean(who, measure) if valid else None for measure, valid in known.items()}


class Fall(Record):
    """Over-optimisation that was caught: what fell for the auditor, but not for the critic.

    Attributes:
        measure: The reward or one of its dimensions.
        since, until: Last epoch of the earlier checks and of the recent ones.
        auditor_before, auditor_after: The auditor's mean in the earlier and in the recent checks.
        critic_before, critic_after: The critic's.
        at_least: The end of the interval that is nearer to 0: the auditor's mean fell by this much or more.
    """

    measure: str
    since: int
    until: int
    auditor_before: float
    auditor_after: float
    critic_before: float
    critic_after: float
    at_least: float


def first_fall(checks: Sequence[Audit], config: SteeredRun) -> Fall | None:
    """The over-optimisation that was caught first, at which the auditor stops RL unless it may not."""
    falls = (over_optimised(checks[:number], config) for number in range(1, len(checks) + 1))
    return next((fall for fall in falls if fall), None)


def num_looks(config: SteeredRun) -> int:
    """Checks of a run after the base's, if nothing stops it."""
    return -(-config.rl.max_epochs // config.auditor.every)


def whole_window(config: SteeredRun) -> int:
    """Checks of a whole window; in a run that is too short for two of ``auditor.window``, as many as half of them."""
    return min(config.auditor.window, (num_looks(config) + 1) // 2)


def change(before: Sequence[Audit], after: Sequence[Audit], who: Who, measure: str) -> Floats:
    """Difference [N] of each image's mean value; NaN for an image with a failed judgement in any of the audits."""
    earlier, later = (np.mean([a.values(who, measure) for a in audits], axis=0) for audits in (before, after))
    return np.asarray(later - earlier)


def best(audits: Sequence[Audit]) -> Audit:
    """The audit with the highest auditor's reward, image against image; the earliest of equals."""
    top = audits[0]
    for audit in audits[1:]:
        if _mean(change([top], [audit], "auditor", REWARD)) > 0:
            top = audit
    return top


def band(base: Audit, audit: Audit, error: float) -> tuple[float, float] | None:
    """Ends of the interval of the auditor's mean reward over the base's; both miss it with a chance of ``error``."""
    return paired_interval(change([base], [audit], "auditor", REWARD), base.prompts, error / 2)


def over_optimised(audits: Sequence[Audit], config: SteeredRun) -> Fall | None:
    """What the last checks show to have fallen for the auditor while the critic did not see it; None if nothing.

    The mean of the last whole window is compared with that of each earlier one: the reward, and each dimension. Shorter
    windows, down to the last check alone, show a fast fall of the reward sooner. A measure has fallen when its interval
    excludes "no fall". It counts when the critic's own fell by less than half as much, and only where the
    auditor's reward is not higher: a dimension may be the price of another as long as that is worth it.
    """
    whole = whole_window(config)
    for window in range(1, whole + 1):
        measures = (REWARD, *config.reward.dimensions) if window == whole else (REWARD,)
        recent = audits[-window:]
        earlier = list(_windows(audits[:-window], window))
        looks = num_looks(config) + 2 - 2 * window  # the first ones have nothing to compare with
        for before in earlier:
            error = config.auditor.false_stops / (whole * looks * len(earlier) * len(measures))
            falls = [fall for measure in measures if (fall := _fall(before, recent, measure, error))]
            if falls and _mean(change(before, recent, "auditor", REWARD)) <= 0:
                return falls[0]
    return None


def _windows(audits: Sequence[Audit], window: int) -> Iterator[Sequence[Audit]]:
    """Whole windows, the latest first."""
    for stop in range(len(audits), window - 1, -window):
        yield audits[stop - window : stop]


def _fall(before: Sequence[Audit], recent: Sequence[Audit], measure: str, error: float) -> Fall | None:
    auditor = change(before, recent, "auditor", measure)
    interval = paired_interval(auditor, recent[0].prompts, error)
    if interval is None or interval[1] >= 0:
        return None
    if _mean(change(before, recent, "critic", measure)) <= _mean(auditor) / 2:
        return None
    means = {
        f"{who}_{when}": float(np.mean([a.mean(who, measure) for a in audits]))
        for who in ("auditor", "critic")
        for when, audits in (("before", before), ("after", recent))
    }
    return Fall(measure=measure, since=before[-1].epoch, until=recent[-1].epoch, at_least=-interval[1], **means)


def _mean(differences: Floats) -> float:
    """Mean of the valid differences; 0 if there are none."""
    valid = differences[np.isfinite(differences)]
    return float(valid.mean()) if valid.size else 0.0
