"""Monitors of reward hacking."""

from __future__ import annotations

from pydantic import PositiveInt

from firm.config.section import Positive, Section, Share


class MonitorsConfig(Section):
    """When RL raises an alarm (firm.rl.monitors). Alarms are shown; it is the auditor that stops a run.

    A bound is crossed by the mean of the last ``window`` epochs. A share of 1 cannot be crossed.
    """

    window: PositiveInt = 5
    copies: Share = 0.5  # share of outputs that are nearly identical to their source image
    blanks: Share = 0.5  # share of images that are nearly empty
    no_spread: Share = 0.5  # share of groups in which all rewards are equal: they teach nothing
    invalid: Share = 0.1  # share of images without a valid judgement
    fall: Positive = 0.5  # points that a dimension's mean may lose by the critic, beyond chance, while another's rises
