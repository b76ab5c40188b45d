"""Difference-first (paper section 3.1, appendix C): describe what changed, then judge each dimension of the edit."""

from __future__ import annotations

from collections.abc import Sequence

from firm.chat.journal import OpenChat
from firm.config import CurationConfig
from firm.critics import material
from firm.critics.answers import parse_report
from firm.critics.judge import JudgeInput
from firm.critics.rubrics import load_rubric
from firm.records import Candidate, Invalid, JudgedCandidate

REPORT = "report"
"""Name of the material."""


class DifferenceFirst:
    """Judges edits with a report of their differences that the critic will never see; a `labeller.Labeller`.

    Models describe differences better than they judge edits. The reporter is asked by each of its rubrics, about the
    two images alone: the report cannot depend on what was asked for.
    """

    def __init__(self, config: CurationConfig, open_chat: OpenChat) -> None:
        """Open reporter and evaluator."""
        self._rubrics = [load_rubric(name) for name in config.reporter_rubrics]
        reporter = config.reporter or config.evaluator
        self._reporter = material.Helper(open_chat("reporter", reporter), reporter, config.attempts)
        self._evaluator = material.Evaluator(config, open_chat, {r.name: r.version for r in self._rubrics})

    def label(self, candidates: Sequence[Candidate]) -> list[JudgedCandidate]:
        """Report the differences of each pair, then judge it on every dimension, each in a call of its own."""
        return self._evaluator.label(candidates, REPORT, self._reporter.each(self._report, candidates))

    @staticmethod
    def difficulty(judged: JudgedCandidate, config: CurationConfig) -> str:
        """A pair with a long report is hard."""
        return material.difficulty(judged, REPORT, config.hard_from)

    def _report(self, candidate: Candidate) -> list[str] | Invalid:
        """All answers merged into one report, or why one of them is missing: half a report would mislead."""
        report: list[str] = []
        for rubric in self._rubrics:
            lines = self._reporter.ask(rubric, JudgeInput(candidate.prompt, candidate.images), parse_report)
            if isinstance(lines, Invalid):
                return lines
            report += lines
        return list(dict.fromkeys(report))
