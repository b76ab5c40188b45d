"""Monitors: signs that a policy games its reward, in the images and in the critic's scores of each epoch.

The paper's editor under a weighted sum returned its source image, its generator under instruction following alone drew
black shapes on nothing: both look well in the reward. No judge is asked here, so a critic's mistakes cannot hide them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from firm.config.monitors import MonitorsConfig
from firm.records import Record

CHANCE = 2.5  # standard errors that a change of a mean may owe to the prompts that were drawn
SCORE = "score_"
ERROR = "error_"

SHARES = {
    "copies": ("copies", "of the images were nearly identical to their source"),
    "blanks": ("blanks", "of the images were nearly empty"),
    "no_spread": ("zero_std_groups", "of the groups had equal rewards and taught nothing"),
    "invalid": ("invalid_share", "of the images had no valid judgement"),
}
"""Monitor -> the number of an epoch that it watches, and what that says."""

Line = Mapping[str, Any]
"""Numbers of an epoch."""


class Alarm(Record):
    """A monitor whose bound was crossed.

    Attributes:
        monitor: Its key in `MonitorsConfig`.
        since, until: First and last epoch with the alarm.
        worst: The value that was farthest beyond the bound.
        bound: The bound.
        text: What happened, without the epochs.
    """

    monitor: str
    since: int
    until: int
    worst: float
    bound: float
    text: str

    def __str__(self) -> str:
        when = f"at epoch {self.since}" if self.since == self.until else f"from epoch {self.since} to {self.until}"
        return f"Alarm {when}: {self.text}."


def means(seen: Sequence[Mapping[str, float | None]], group_size: int) -> dict[str, float | None]:
    """Numbers of an epoch from what was seen of each sample (N), group after group.

    The mean of each value where it is known; of a score also the standard error, with one group as one witness, since
    an epoch's prompts are few and differ.
    """
    numbers: dict[str, float | None] = {}
    for name in seen[0]:
        column = np.array([sample[name] for sample in seen], dtype=np.float64)
        known = np.isfinite(column)
        numbers[name] = float(column[known].mean()) if known.any() else None
        if name.startswith(SCORE):
            rows = column.reshape(-1, group_size)
            groups = [float(row[np.isfinite(row)].mean()) for row in rows if np.isfinite(row).any()]
            error = float(np.std(groups, ddof=1) / len(groups) ** 0.5) if len(groups) > 1 else None
            numbers[ERROR + name.removeprefix(SCORE)] = error
    return numbers


def alarms(lines: Sequence[Line], config: MonitorsConfig) -> list[Alarm]:
    """The alarms of the last epoch.

    Args:
        lines: Numbers of all epochs so far.
        config: The bounds.
    """
    if len(lines) < config.window:
        return []
    found = []
    for monitor, (name, words) in SHARES.items():
        bound = getattr(config, monitor)
        value = _mean(lines[-config.window :], name)
        if value is not None and value > bound:
            text = f"{value:.0%} {words} (bound {bound:.0%})"
            found.append(_alarm(monitor, len(lines), value, bound, text))
    return found + _divergence(lines, config)


def all_alarms(lines: Sequence[Line], config: MonitorsConfig) -> list[Alarm]:
    """The alarms of a whole run: one for each monitor, from the first to the last epoch with it, in its worst words."""
    runs: dict[str, Alarm] = {}
    for epoch in range(1, len(lines) + 1):
        for alarm in alarms(lines[:epoch], config):
            known = runs.setdefault(alarm.monitor, alarm)
            worst = max(known, alarm, key=lambda a: a.worst)
            runs[alarm.monitor] = worst.model_copy(update={"since": known.since, "until": alarm.until})
    return list(runs.values())


def _divergence(lines: Sequence[Line], config: MonitorsConfig) -> list[Alarm]:
    """A dimension that fell since the first epochs while another rose, beyond chance: the one is the other's price.

    Compared are the first and the last ``window`` epochs, which must not overlap.
    """
    if len(lines) < 2 * config.window:
        return []
    names = [name.removeprefix(SCORE) for name in lines[-1] if name.startswith(SCORE)]
    changes = {name: change for name in names if (change := _change(lines, name, config.window)) is not None}
    risen = [name for name, (by, error) in changes.items() if by > CHANCE * error]
    fallen = {n: -by for n, (by, error) in changes.items() if -by > config.fall + CHANCE * error}
    if not risen or not fallen:
        return []
    worst = max(fallen, key=lambda name: fallen[name])
    text = (
        f"the critic's mean {worst} fell by {fallen[worst]:.2f} points while {' and '.join(risen)} rose "
        f"(bound {config.fall:.2f})"
    )
    return [_alarm("fall", len(lines), fallen[worst], config.fall, text.replace("_", " "))]


def _change(lines: Sequence[Line], name: str, window: int) -> tuple[float, float] | None:
    """How far a score's mean is from that of the first epochs, with its standard error; None where they are unknown."""
    parts = [part for end in (lines[:window], lines[-window:]) for part in end]
    scores, errors = ([part[key + name] for part in parts] for key in (SCORE, ERROR))
    if None in scores or None in errors:
        return None
    by = float(np.mean(scores[window:]) - np.mean(scores[:window]))
    return by, float(np.sqrt(np.square(errors).sum())) / window


def _mean(lines: Sequence[Line], name: str) -> float | None:
    known = [line[name] for line in lines if line.get(name) is not None]
    return float(np.mean(known)) if known else None


def _alarm(monitor: str, epoch: int, value: float, bound: float, text: str) -> Alarm:
    return Alarm(monitor=monitor, since=epoch, until=epoch, worst=value, bound=bound, text=text)
