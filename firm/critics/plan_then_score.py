"""Plan-then-score (paper section 3.2, appendix D): plan from the prompt, judgement from image, prompt and plan."""

from __future__ import annotations

from collections.abc import Sequence

from firm.chat.journal import OpenChat
from firm.config import CurationConfig
from firm.critics import material
from firm.critics.answers import parse_plan
from firm.critics.judge import JudgeInput
from firm.critics.rubrics import load_rubric
from firm.records import Candidate, Invalid, JudgedCandidate, Prompt

PLAN = "plan"
"""Name of the material."""


class PlanThenScore:
    """Judges candidates with a plan that the critic will never see; a `firm.critics.labeller.Labeller`."""

    def __init__(self, config: CurationConfig, open_chat: OpenChat) -> None:
        """Open planner and evaluator."""
        assert config.planner is not None, "validated by CurationConfig"
        self._rubric = load_rubric(config.planner_rubric)
        self._planner = material.Helper(open_chat("planner", config.planner), config.planner, config.attempts)
        self._evaluator = material.Evaluator(config, open_chat, {PLAN: self._rubric.version})
        self._plans: dict[Prompt, list[str] | Invalid] = {}

    def label(self, candidates: Sequence[Candidate]) -> list[JudgedCandidate]:
        """Plan each distinct prompt once, then judge every candidate on every dimension."""
        prompts = dict.fromkeys(c.prompt for c in candidates if c.prompt not in self._plans)
        self._plans |= zip(prompts, self._planner.each(self._plan, prompts), strict=True)
        return self._evaluator.label(candidates, PLAN, [self._plans[c.prompt] for c in candidates])

    @staticmethod
    def difficulty(judged: JudgedCandidate, config: CurationConfig) -> str:
        """A prompt whose plan has many questions is hard."""
        return material.difficulty(judged, PLAN, config.hard_from)

    def _plan(self, prompt: Prompt) -> list[str] | Invalid:
        """The planner's checklist for a prompt, or why there is none."""
        return self._planner.ask(self._rubric, JudgeInput(prompt, []), parse_plan)
