"""Plan-then-score (paper section 3.2, appendix D): plan from the prompt, judgement from image, prompt and plan."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from firm.chat.messages import RequestFailed, user_message
from firm.config import CurationConfig, EndpointChat
from firm.critics.answers import parse_plan
from firm.critics.judge import RETRY_TEMPERATURE, JudgeInput
from firm.critics.labeller import OpenChat
from firm.critics.load import open_judge
from firm.critics.rubrics import load_rubric
from firm.records import Candidate, Invalid, JudgedCandidate, Prompt, Provenance

MAX_TOKENS = 2048
"""Limit of a plan."""
PLAN = "plan"
"""Name of the material."""


class PlanThenScore:
    """Judges candidates with a plan that the critic will never see; a `firm.critics.labeller.Labeller`."""

    def __init__(self, config: CurationConfig, open_chat: OpenChat) -> None:
        """Open planner and evaluator."""
        rubrics = {d: judged.rubric for d, judged in config.dimensions.items()}
        evaluator = open_chat("evaluator", config.evaluator)
        self.config = config
        self.planner = open_chat("planner", config.planner)
        self.evaluator = open_judge(config.evaluator, rubrics, chat=evaluator, attempts=config.attempts)
        self._plan_rubric = load_rubric(config.planner_rubric)
        self._versions = {PLAN: self._plan_rubric.version, **self.evaluator.versions}
        self._plans: dict[Prompt, list[str] | Invalid] = {}
        self._planners = config.planner.concurrency if isinstance(config.planner, EndpointChat) else 1

    def label(self, candidates: Sequence[Candidate]) -> list[JudgedCandidate]:
        """Plan each distinct prompt once, then judge every candidate on every dimension."""
        prompts = dict.fromkeys(c.prompt for c in candidates)
        with ThreadPoolExecutor(self._planners) as pool:
            plans = dict(zip(prompts, pool.map(self.plan, prompts), strict=True))
        material = [{PLAN: plan} if isinstance(plan := plans[c.prompt], list) else {} for c in candidates]
        items = [JudgeInput(c.prompt, c.images, given) for c, given in zip(candidates, material, strict=True)]
        return [
            JudgedCandidate(
                **dict(candidate),
                material=given,
                failed={PLAN: plan} if isinstance(plan := plans[candidate.prompt], Invalid) else {},
                assessment={d: a.outcome for d, a in answers.items()},
                provenance=Provenance(
                    teacher=self.evaluator.chat.name,
                    rubrics=self._versions,
                    answers={d: a.text for d, a in answers.items()},
                ),
            )
            for candidate, given, answers in zip(candidates, material, self.evaluator.ask_all(items), strict=True)
        ]

    @staticmethod
    def difficulty(judged: JudgedCandidate, config: CurationConfig) -> str:
        """A prompt whose plan has many questions is hard; without a plan nobody knows."""
        if PLAN not in judged.material:
            return "unknown"
        return "hard" if len(judged.material[PLAN]) >= config.hard_from else "easy"

    def plan(self, prompt: Prompt) -> list[str] | Invalid:
        """The planner's checklist for a prompt, or why there is none."""
        if prompt not in self._plans:
            self._plans[prompt] = self._ask_plan(prompt)
        return self._plans[prompt]

    def _ask_plan(self, prompt: Prompt) -> list[str] | Invalid:
        message = user_message(self._plan_rubric.render({"prompt": prompt.text}))
        plan: list[str] | Invalid = Invalid(reason="request_failed", detail="not asked")
        for attempt in range(self.config.attempts):
            temperature = 0.0 if attempt == 0 else RETRY_TEMPERATURE
            try:
                reply = self.planner.complete([message], max_tokens=MAX_TOKENS, temperature=temperature, seed=attempt)
            except RequestFailed as error:
                plan = Invalid(reason="request_failed", detail=error.detail)
                continue
            plan = parse_plan(reply.text, reply.truncated)
            if isinstance(plan, list):
                break
        return plan
