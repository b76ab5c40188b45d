"""Difference-first with a teacher that sees pixels, and with reporters that fail."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from edits import DIMENSIONS, SHORT, TEACHER, edit_run, pair, scores
from shared import Scripted

from firm.chat.client import open_chat
from firm.chat.messages import Chat, Reply, RequestFailed
from firm.config import ChatConfig, CurationConfig
from firm.critics.difference_first import DifferenceFirst
from firm.critics.labeller import OpenChat
from firm.critics.rubrics import NO_REPORT, load_rubric
from firm.curation.examples import student_example
from firm.records import Candidate, Invalid, JudgedCandidate, Judgement, Prompt

REPORTS = ("obvious_differences", "detailed_differences")
FIVE = ['{"reasoning": "fine", "score": [5]}'] * 2
FAILED = RequestFailed("no", retryable=True)


def settings(**changes: Any) -> CurationConfig:
    return CurationConfig.model_validate({**edit_run()["curation"], **changes})


def candidates(number: int) -> list[Candidate]:
    made = [pair(i) for i in range(number)]
    return [
        Candidate(index=i, prompt=Prompt(text=text, image=f"{i}.png"), source="painted", split="train", images=images)
        for i, (text, images) in enumerate(made)
    ]


def chats(reporter: Chat | None = None, evaluator: Chat | None = None) -> OpenChat:
    given = {"reporter": reporter, "evaluator": evaluator}
    return lambda role, config: given[role] or open_chat(config)


def judge(
    given: Sequence[Candidate], reporter: Chat | None = None, evaluator: Chat | None = None
) -> list[JudgedCandidate]:
    return DifferenceFirst(settings(), chats(reporter, evaluator)).label(given)


def asked(chat: Scripted) -> list[str]:
    """The text of each request, which is behind two images."""
    contents = [call["messages"][0]["content"] for call in chat.calls]
    assert all([part["type"] for part in content] == ["image_url", "image_url", "text"] for content in contents)
    return [content[-1]["text"] for content in contents]


def test_judgements_are_the_teachers_with_their_provenance() -> None:
    given = candidates(8)
    for candidate, judged in zip(given, judge(given), strict=True):
        assert Candidate(**{k: getattr(judged, k) for k in Candidate.model_fields}) == candidate
        assert judged.failed == {} and judged.rewritten is None
        first, second, compared, *changes = judged.material["report"]
        assert first.startswith("Image 1 shows") and second.startswith("Image 2 shows")
        assert compared == "Compared" and len(changes) == 1
        found = {d: outcome.score for d, outcome in judged.assessment.items() if isinstance(outcome, Judgement)}
        assert found == {"execution": 5, "consistency": 5}
        rubrics = {**{name: name for name in REPORTS}, **DIMENSIONS}
        assert judged.provenance.rubrics == {d: load_rubric(name).version for d, name in rubrics.items()}
        assert judged.provenance.teacher == TEACHER["target"]


def test_two_reports_are_merged_and_given_to_each_dimension_s_own_call() -> None:
    reporter = Scripted("## Seen\n- a cat\n- a dog", "* a dog\n1. the tail is <b>longer</b>")
    evaluator = Scripted('{"reasoning": "so", "score": [4]}', '{"reasoning": "so", "score": [2]}')
    [judged] = judge(candidates(1), reporter, evaluator)
    assert judged.material == {"report": ["Seen", "a cat", "a dog", "1. the tail is <b>longer</b>"]}
    obvious, detailed = asked(reporter)
    assert "obvious differences" in obvious and "detailed differences" in detailed
    assert judged.prompt.text not in obvious + detailed  # the report cannot depend on what was asked for
    for text, dimension in zip(asked(evaluator), DIMENSIONS, strict=True):
        assert f"{dimension} score" in text
        assert f"<START OF INSTRUCTION>\n{judged.prompt.text}\n<END OF INSTRUCTION>" in text
        report = "- Seen\n- a cat\n- a dog\n- 1. the tail is <b>longer</b>"
        assert f"<START OF DIFFERENCE REPORT>\n{report}\n<END OF DIFFERENCE REPORT>" in text
    assert judged.assessment == {
        "execution": Judgement(score=4, rationale="so"), "consistency": Judgement(score=2, rationale="so")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([FAILED] * 3, "request_failed"),
        ([RequestFailed("status 400")], "request_failed"),
        (["- fine", FAILED, FAILED, FAILED], "request_failed"),  # half a report would mislead
        (["", "<think>- a thought", "  \n"], "empty"),
        ([Reply("- the report was cut", truncated=True)] * 3, "truncated"),
        (["- fine", *[Reply("- the report was cut", truncated=True)] * 3], "truncated"),
    ],
)
def test_a_failed_difference_call_is_invalid_and_never_in_the_report(script: list[Any], reason: str) -> None:
    reporter, evaluator = Scripted(*script), Scripted(*FIVE)
    [judged] = judge(candidates(1), reporter, evaluator)
    assert reporter.script == [] and judged.failed["report"].reason == reason and judged.material == {}
    for text in asked(evaluator):
        assert NO_REPORT in text and "- " not in text.partition("<START OF DIFFERENCE")[2].partition("<END OF")[0]
    assert all(isinstance(outcome, Judgement) for outcome in judged.assessment.values())
    assert DifferenceFirst.difficulty(judged, settings()) == "unknown"


def test_a_report_that_failed_is_asked_for_again_and_thoughts_are_cut_out() -> None:
    cut = Reply("- cut", truncated=True)
    reporter = Scripted(cut, "<think>- is it a cat?</think>- a cat", "- the tail")
    [judged] = judge(candidates(1), reporter, Scripted(*FIVE))
    assert judged.material["report"] == ["a cat", "the tail"]
    assert [(c["temperature"], c["seed"]) for c in reporter.calls] == [(0.0, 0), (0.7, 1), (0.0, 0)]


def test_a_judgement_that_fails_leaves_the_other_dimension_alone() -> None:
    evaluator = Scripted(*["no score"] * 3, FIVE[0])
    [judged] = judge(candidates(1), evaluator=evaluator)
    assert isinstance(judged.assessment["execution"], Invalid)
    assert judged.assessment["consistency"] == Judgement(score=5, rationale="fine")


@pytest.mark.parametrize("style", ["score_first", "reason_first"])
@pytest.mark.parametrize("rubrics", [SHORT, {d: d for d in DIMENSIONS}])
def test_the_student_sees_two_images_and_the_instruction_and_never_the_report(
    style: Any, rubrics: dict[str, str]
) -> None:
    for judged in judge(candidates(8)):
        for dimension, rubric in rubrics.items():
            example = student_example(judged, dimension, rubric, style, settings())
            question, answer = (message.content for message in example.messages)
            assert question.count("<image>") == 2 == len(example.images) and example.images == judged.images
            assert judged.prompt.text in question
            for line in (*judged.material["report"], "REPORT", "report"):
                assert line not in question and line not in answer
            if style == "reason_first" and rubric == dimension:
                assert json.loads(answer)["score"] == [example.score]


def test_difficulty_is_the_length_of_the_report() -> None:
    [judged] = judge(candidates(1))
    length = len(judged.material["report"])
    assert DifferenceFirst.difficulty(judged, settings(hard_from=length)) == "hard"
    assert DifferenceFirst.difficulty(judged, settings(hard_from=length + 1)) == "easy"


def test_the_reporter_is_the_evaluator_unless_another_is_named() -> None:
    opened: list[tuple[str, ChatConfig]] = []

    def opening(role: str, config: ChatConfig) -> Chat:
        opened.append((role, config))
        return Scripted()

    own = {"kind": "python", "target": "somewhere:Else"}
    for config in (settings(), settings(reporter=own)):
        DifferenceFirst(config, opening)
        assert ("evaluator", config.evaluator) in opened and ("reporter", config.reporter or config.evaluator) in opened
    assert {role for role, _ in opened} == {"reporter", "evaluator"}


def test_the_world_of_these_tests_has_every_kind_of_score() -> None:
    before = ["red", "green", "blue", "white"]
    assert scores("paint the first patch blue", before, before) == {"execution": 1, "consistency": 5}
    assert scores("paint the first patch blue", before, ["blue", *before[1:]]) == {"execution": 5, "consistency": 5}
    assert scores("paint the first patch blue", before, ["white"] * 4) == {"execution": 3, "consistency": 1}
