"""Labellers turn candidates into judgements: one class and one file each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from firm.chat.journal import Journals, OpenChat
from firm.config import CurationConfig
from firm.locate import load_named
from firm.records import Candidate, JudgedCandidate


class Labeller(Protocol):
    """Judges candidates, with the help of material that the critic will not be given.

    The material has a name, such as ``plan``, under which rubrics of the teacher ask for it and `JudgedCandidate` keeps
    it.
    """

    def __init__(self, config: CurationConfig, open_chat: OpenChat) -> None:
        """Open the teachers."""

    def label(self, candidates: Sequence[Candidate]) -> list[JudgedCandidate]:
        """Judge candidates on every dimension, in order; a failed judgement is `Invalid`."""

    @staticmethod
    def difficulty(judged: JudgedCandidate, config: CurationConfig) -> str:
        """How hard the candidate is to judge, for the tables of the bench."""


LABELLERS: dict[str, str] = {
    "plan_then_score": "firm.critics.plan_then_score:PlanThenScore",
    "difference_first": "firm.critics.difference_first:DifferenceFirst",
}


def find_labeller(name: str) -> type[Labeller]:
    """The class of a labeller.

    Raises:
        UserError: The name is unknown (exit code 2).
    """
    found: type[Labeller] = load_named(LABELLERS, name, "curation.labeller")
    return found


@contextmanager
def open_labeller(config: CurationConfig, folder: Path) -> Iterator[Labeller]:
    """The labeller of a configuration; ``folder`` keeps its teachers' answers."""
    with Journals(folder) as open_teacher:
        yield find_labeller(config.labeller)(config, open_teacher)
