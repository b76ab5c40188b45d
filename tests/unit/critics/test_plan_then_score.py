"""Plan-then-score with the teacher of the shapes world, and with evaluators that fail."""

import json
from collections.abc import Sequence

import pytest
from shared import Scripted

from firm.chat.client import open_chat
from firm.chat.messages import Chat, RequestFailed
from firm.config import CurationConfig, FunctionSource, JudgedDimension, PythonChat
from firm.critics.answers import parse_answer, parse_score_first
from firm.critics.plan_then_score import PlanThenScore
from firm.critics.rubrics import load_rubric
from firm.curation.examples import student_example
from firm.images import encode_image
from firm.records import Candidate, Invalid, JudgedCandidate, Judgement
from firm.shapes import teacher
from firm.shapes.generation import candidate

TEACHER = PythonChat(target="firm.shapes.teacher:PixelTeacher")
DIMENSIONS = {"instruction_following": "evaluate", "quality": "quality"}


def settings(**changes: object) -> CurationConfig:
    source = FunctionSource(name="rendered", function="firm.shapes.generation:candidate", num_images=8)
    plain = {
        "planner": TEACHER, "evaluator": TEACHER, "sources": [source],
        "dimensions": {d: JudgedDimension(rubric=r) for d, r in DIMENSIONS.items()},
    }  # fmt: skip
    return CurationConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    made = [candidate(i, 0, "train") for i in range(8)]
    return [
        Candidate(index=i, prompt=p, source="rendered", split="train", images=[encode_image(image)])
        for i, (p, image) in enumerate(made)
    ]


FAILED = RequestFailed("no", retryable=True)


def judge(
    candidates: Sequence[Candidate], planner: Chat | None = None, evaluator: Chat | None = None
) -> list[JudgedCandidate]:
    chats = {"planner": planner or open_chat(TEACHER), "evaluator": evaluator or open_chat(TEACHER)}
    return PlanThenScore(settings(), lambda role, _: chats[role]).label(candidates)


def test_judgements_are_the_teachers_with_their_provenance(candidates: list[Candidate]) -> None:
    for given, judged in zip(candidates, judge(candidates), strict=True):
        assert Candidate(**{k: getattr(judged, k) for k in Candidate.model_fields}) == given
        assert judged.material["plan"] == teacher.plan(given.prompt.text)
        outcome = judged.assessment["instruction_following"]
        _, image = candidate(given.index, 0, "train")
        assert isinstance(outcome, Judgement) and outcome.score == teacher.instruction_following(
            given.prompt.text, image
        )
        quality = judged.assessment["quality"]
        assert isinstance(quality, Judgement) and quality.score == min(teacher.quality(image))
        provenance = judged.provenance
        assert provenance.teacher == TEACHER.target
        names = {"plan": "plan", **DIMENSIONS}
        assert provenance.rubrics == {d: load_rubric(name).version for d, name in names.items()}
        assert parse_answer(provenance.answers["instruction_following"], "boxed") == outcome
        assert judged.material["plan"][0] in provenance.answers["instruction_following"]  # the evaluator saw the plan


@pytest.mark.parametrize("style", ["score_first", "reason_first"])
@pytest.mark.parametrize("rationale", ["summary", "full"])
def test_the_student_never_sees_the_plan(candidates: list[Candidate], style: str, rationale: str) -> None:
    config = settings(rationale=rationale, hard_from=4)
    for judged in judge(candidates):
        for dimension in DIMENSIONS:
            example = student_example(judged, dimension, f"short_{dimension}", style, config)
            asked, answered = example.messages
            assert (asked.role, answered.role) == ("user", "assistant")
            assert asked.content.count("<image>") == 1 == len(example.images)
            assert not any(question in asked.content for question in judged.material["plan"])
            if rationale == "summary":
                assert not any(question in answered.content for question in judged.material["plan"])
            read = (
                parse_score_first(answered.content)
                if style == "score_first"
                else parse_answer(answered.content, "boxed")
            )
            assert isinstance(read, Judgement) and read.score == example.score
            assert example.difficulty == ("hard" if len(judged.material["plan"]) >= 4 else "easy")


def test_the_answer_on_quality_has_the_form_that_its_question_asks_for(candidates: list[Candidate]) -> None:
    """The rubric asks for three sub-scores; one alone would teach the critic to contradict it."""
    for judged in judge(candidates):
        example = student_example(judged, "quality", "quality", "reason_first", settings())
        assert "[a, t, s]" in example.messages[0].content
        _, image = candidate(judged.index, 0, "train")
        assert json.loads(example.messages[1].content)["score"] == list(teacher.quality(image))
        assert example.score == min(teacher.quality(image))


def test_one_plan_per_prompt(candidates: list[Candidate]) -> None:
    planner = Scripted("- Is it red?\n- Is it round?")
    judged = judge([candidates[0]] * 3, planner)
    assert judged[0].material["plan"] == ["Is it red?", "Is it round?"]
    [call] = planner.calls
    assert candidates[0].prompt.text in str(call["messages"]) and "image_url" not in str(call["messages"])


@pytest.mark.parametrize("nonsense", ["I like it.", "\\boxed{7}", "\\boxed{4.5}", "", FAILED, "{"])
def test_nonsense_is_invalid_and_makes_no_example(candidates: list[Candidate], nonsense: str | Exception) -> None:
    evaluator = Scripted(*[nonsense] * 6)
    [judged] = judge(candidates[:1], evaluator=evaluator)
    assert all(isinstance(outcome, Invalid) for outcome in judged.assessment.values())
    assert judged.provenance.answers["instruction_following"] == (nonsense if isinstance(nonsense, str) else "")
    assert [call["seed"] for call in evaluator.calls] == [0, 1, 2] * 2 and evaluator.calls[1]["temperature"] > 0
    with pytest.raises(AssertionError, match="only valid"):
        student_example(judged, "instruction_following", "short_instruction_following", "score_first", settings())


def test_an_answer_that_does_not_parse_is_asked_again(candidates: list[Candidate]) -> None:
    [judged] = judge(candidates[:1], evaluator=Scripted("what?", FAILED, "fine\n\\boxed{4}", '{"score": [2, 3, 5]}'))
    assert judged.assessment["instruction_following"] == Judgement(score=4, rationale="fine")
    assert judged.assessment["quality"] == Judgement(score=2, parts=(2, 3, 5))


def test_without_a_plan_the_evaluator_makes_its_own(candidates: list[Candidate]) -> None:
    planner = Scripted(*["no list here"] * 3)
    evaluator = Scripted(*["\\boxed{3}"] * 4)
    [judged] = judge(candidates[:1], planner, evaluator)
    assert judged.material == {} and judged.failed["plan"].reason == "unparsable" and len(planner.calls) == 3
    assert "no plan was made" in str(evaluator.calls[0]["messages"])
    example = student_example(judged, "instruction_following", "short_instruction_following", "score_first", settings())
    assert example.difficulty == "unknown"


def test_a_planner_that_cannot_be_reached_or_is_cut_off_makes_no_plan(candidates: list[Candidate]) -> None:
    [judged] = judge(candidates[:1], Scripted(*[FAILED] * 3), Scripted(*["\\boxed{3}"] * 4))
    assert judged.failed["plan"].reason == "request_failed"
    planner = Scripted("<think>- [ ] Is this a thought?", "- [ ] Is it red?")
    [judged] = judge(candidates[:1], planner, Scripted(*["\\boxed{3}"] * 4))
    assert judged.material == {"plan": ["Is it red?"]} and judged.failed == {}
