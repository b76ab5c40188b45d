"""Suites: what a policy is evaluated on, from prompts through scores of images to their aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from firm.chat.journal import OpenChat
from firm.config import SteeredRun
from firm.locate import load_named
from firm.records import Prompt, Sample, Summary

Scores = dict[str, Any]
"""A suite's results on one image, as JSON; they need not be judgements from 1 to 5."""


class Suite(Protocol):
    """A benchmark of policies."""

    def __init__(self, config: SteeredRun, critic: Path | None, device: torch.device, open_chat: OpenChat) -> None:
        """``critic``: folder of the trained one, if any; ``open_chat`` opens judges that remember their answers."""

    def prompts(self) -> list[Prompt]:
        """Prompts to sample, one image each; the same before and after RL."""

    def score(self, prompts: Sequence[Prompt], images: Sequence[bytes]) -> list[Scores]:
        """Score PNG images of these prompts, in order."""

    def summary(self, samples: Sequence[Sample]) -> Summary:
        """Aggregate all samples, of the base and of the final policy."""


SUITES: dict[str, str] = {
    "held_out": "firm.evaluate.held_out:HeldOut",
}


def find_suite(name: str) -> type[Suite]:
    """The class of a suite.

    Raises:
        UserError: The name is unknown (exit code 2).
    """
    found: type[Suite] = load_named(SUITES, name, "evaluate.suite")
    return found
