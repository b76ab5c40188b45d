"""Plan-then-score (paper section 3.2, appendix D): plan from the prompt, judgement from image, prompt and plan."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from firm.chat.messages import Chat, RequestFailed, user_message
from firm.config import CurationConfig, EndpointChat
from firm.critics.answers import final_analysis, parse_plan, write_answer
from firm.critics.judge import JudgeInput, question
from firm.critics.load import open_judge
from firm.critics.rubrics import load_rubric
from firm.records import Candidate, Example, JudgedCandidate, Judgement, Message, Provenance


class PlanThenScore:
    """Judges candidates with privileged information: the evaluator sees a plan that the critic will never see."""

    def __init__(self, config: CurationConfig, planner: Chat, evaluator: Chat) -> None:
        """``planner`` and ``evaluator`` may be journals around the configured chats."""
        rubrics = {d: judged.rubric for d, judged in config.dimensions.items()}
        self.config, self.planner = config, planner
        self.critic = open_judge(config.evaluator, rubrics, chat=evaluator, attempts=config.attempts)
        self._plan_rubric = load_rubric(config.planner_rubric)
        self._versions = {"plan": self._plan_rubric.version, **self.critic.versions}
        self._plans: dict[str, list[str]] = {}
        self._planners = config.planner.concurrency if isinstance(config.planner, EndpointChat) else 1

    def judge(self, candidates: Sequence[Candidate]) -> list[JudgedCandidate]:
        """Plan each distinct prompt once, then judge every candidate on every dimension."""
        prompts = dict.fromkeys(c.prompt for c in candidates)
        with ThreadPoolExecutor(self._planners) as pool:
            plans = dict(zip(prompts, pool.map(self.plan, prompts), strict=True))
        items = [JudgeInput(c.prompt, c.images, {"plan": plans[c.prompt]}) for c in candidates]
        return [
            JudgedCandidate(
                **dict(candidate),
                material={"plan": plans[candidate.prompt]},
                assessment={d: a.outcome for d, a in answers.items()},
                provenance=Provenance(
                    teacher=self.critic.chat.name,
                    rubrics=self._versions,
                    answers={d: a.text for d, a in answers.items()},
                ),
            )
            for candidate, item, answers in zip(candidates, items, self.critic.ask_all(items), strict=True)
        ]

    def plan(self, prompt: str) -> list[str]:
        """The planner's checklist for a prompt; empty when the planner gave none."""
        if prompt not in self._plans:
            self._plans[prompt] = self._ask_plan(prompt)
        return self._plans[prompt]

    def _ask_plan(self, prompt: str) -> list[str]:
        message = user_message(self._plan_rubric.render({"prompt": prompt}))
        for attempt in range(self.config.attempts):
            temperature = 0.0 if attempt == 0 else 0.7
            try:
                reply = self.planner.complete([message], max_tokens=2048, temperature=temperature, seed=attempt)
            except RequestFailed:
                continue
            if questions := parse_plan(reply.text):
                return questions
        return []


def student_example(
    judged: JudgedCandidate, dimension: str, rubric: str, style: str, config: CurationConfig
) -> Example:
    """The critic's training record: its own inference prompt, without the plan, answered with the teacher's judgement.

    Args:
        judged: A candidate whose judgement on ``dimension`` is valid.
        dimension: The dimension.
        rubric: Name of the critic's rubric (not the teacher's).
        style: The critic's answer style.
        config: For the rationale and the limit of easy prompts.
    """
    outcome, template = judged.assessment[dimension], load_rubric(rubric)
    assert isinstance(outcome, Judgement), "only valid judgements become examples"
    rationale = outcome.rationale
    if config.rationale == "summary":
        rationale = final_analysis(judged.provenance.answers[dimension]) or rationale
    answer = write_answer(outcome.score, rationale, style, "json" if template.answer == "json" else "boxed")  # type: ignore[arg-type]
    return Example(
        id=f"{judged.source}-{judged.split}-{judged.index}-{dimension}",
        split=judged.split,
        dimension=dimension,
        prompt=judged.prompt,
        source=judged.source,
        difficulty="hard" if len(judged.material["plan"]) >= config.hard_from else "easy",
        score=outcome.score,
        messages=[
            Message(role="user", content=question(template, judged.prompt)),
            Message(role="assistant", content=answer),
        ],
        images=judged.images,
    )
