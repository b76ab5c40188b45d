"""Training records for the critic, made of judged candidates."""

from __future__ import annotations

from firm.config import CurationConfig
from firm.critics.answers import AnswerStyle, final_analysis, write_answer
from firm.critics.judge import question
from firm.critics.labeller import find_labeller
from firm.critics.rubrics import load_rubric
from firm.records import Example, JudgedCandidate, Judgement, Message


def student_example(
    judged: JudgedCandidate, dimension: str, rubric: str, style: AnswerStyle, config: CurationConfig
) -> Example:
    """The critic's own inference prompt, without the teacher's material, answered with the teacher's judgement.

    Args:
        judged: A candidate whose judgement on ``dimension`` is valid.
        dimension: The dimension.
        rubric: Name of the critic's rubric (not the teacher's).
        style: The critic's answer style.
        config: For the rationale and the difficulty.
    """
    outcome = judged.assessment[dimension]
    assert isinstance(outcome, Judgement), "only valid judgements become examples"
    template = load_rubric(rubric)
    rationale = outcome.rationale
    if config.rationale == "summary":
        rationale = final_analysis(judged.provenance.answers[dimension]) or rationale
    answer = write_answer(outcome.score, rationale, style, template.score_format, outcome.parts)
    return Example(
        id=f"{judged.source}-{judged.split}-{judged.index}-{dimension}",
        split=judged.split,
        dimension=dimension,
        prompt=judged.prompt,
        source=judged.source,
        difficulty=find_labeller(config.labeller).difficulty(judged, config),
        score=outcome.score,
        messages=[
            Message(role="user", content=question(template, judged.prompt)),
            Message(role="assistant", content=answer),
        ],
        images=judged.images,
    )
