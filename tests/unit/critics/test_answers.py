"""Reading and writing of answers: the hard cases one by one."""

import json
import time

import pytest

from firm.critics.answers import (
    MAX_CHARS,
    final_analysis,
    parse_answer,
    parse_instruction,
    parse_plan,
    parse_report,
    parse_score_first,
    write_answer,
)
from firm.records import Invalid, Judgement


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"Good.\n\boxed{4}", 4),
        (r"A draft said \boxed{2}, but the final is \boxed{5}.", 5),
        (r"\boxed{ 3 }", 3),
        (r"\boxed{\text{2}}", 2),
        (r"$\boxed{4.0}$", 4),
        (r"\boxed{4/5}", 4),
        (r"Score: 1 at first, then \boxed{5}", 5),
        ("Final Alignment Rating: 3", 3),
        ("**Final Alignment Rating:** 4", 4),
        ("Final Alignment Rating: **4**.", 4),
        ("Score: 2\nbut then\nScore: 3", 3),
        ("final alignment rating: 2/5.", 2),
        ("<think>perhaps \\boxed{1}</think> \\boxed{4}", 4),
        (r"\boxed{5", None),
        (r"\boxed{}", None),
        (r"\boxed{N}", None),
        (r"\boxed{4.7}", None),
        (r"\boxed{4, 5}", None),
        (r"\boxed{four}", None),
        (r"\boxed{1_0}", None),
        ("I would say four out of five", None),
        ("Score: 4.5", None),
    ],
)
def test_boxed(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "boxed")
    if score is None:
        assert isinstance(outcome, Invalid) and outcome.reason == "unparsable" and outcome.detail
    else:
        assert isinstance(outcome, Judgement) and outcome.score == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("red circle kept\nScore: 4", 4),
        ("red circle kept score : 2 ", 2),
        ("the score: Score: 3", 3),
        ("Score: 1 at first, then\n**Score:** 5", 5),
        ("\\boxed{1} score : 5", 5),
        ("Score: 4 is for good ones", None),
        ("Score: 4 / 10", None),
        ("score : 3 or 4", None),
        ("\\boxed{4}", None),
    ],
)
def test_a_score_at_the_end(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "score")
    assert outcome == Judgement(score=score, rationale=outcome.rationale) if score else isinstance(outcome, Invalid)
    assert isinstance(parse_answer(text, "score", truncated=True), Invalid)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reasoning": "fine", "score": [4]}', 4),
        ('{"score": 3}', 3),
        ('{"score": "2"}', 2),
        ('{"score": 5.0}', 5),
        ('{"reasoning": "sub-scores", "score": [5, 2, 4]}', 2),
        ('```json\n{"reasoning": "in a fence", "score": [1]}\n```\nHope this helps {smile}', 1),
        ('The set {a, b} is drawn. {"reasoning": "has } and { and {\\"score\\": 1}", "score": 4} Done }', 4),
        ('{"score": 1} no, rather {"score": 2}', 2),
        ('{"score": 3} {"other": 1}', 3),
        ('{"reasoning": "a raw\nline break", "score": 3}', 3),
        ('{"score": [4, 5]}', None),
        ('{"score": []}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": {"value": 3}}', None),
        ('{"score": 4.7}', None),
        ('{"score": [4.5, 1, 5]}', None),
        ('{"score": 4', None),
        ("[4]", None),
    ],
)
def test_json(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "json")
    if score is None:
        assert isinstance(outcome, Invalid) and outcome.reason == "unparsable"
    else:
        assert isinstance(outcome, Judgement) and outcome.score == score


@pytest.mark.parametrize(
    ("text", "answer", "truncated", "reason"),
    [
        ("", "boxed", False, "empty"),
        (" \n\t", "json", False, "empty"),
        ("", "boxed", True, "truncated"),
        (r"\boxed{0}", "boxed", False, "out_of_range"),
        (r"\boxed{6}", "boxed", False, "out_of_range"),
        (r"\boxed{-1}", "boxed", False, "out_of_range"),
        (r"\boxed{nan}", "boxed", False, "non_finite"),
        (r"\boxed{-inf}", "boxed", False, "non_finite"),
        (r"\boxed{1e999}", "boxed", False, "non_finite"),
        ('{"score": NaN}', "json", False, "non_finite"),
        ('{"score": 0}', "json", False, "out_of_range"),
        ('{"score": [5, 5, 9]}', "json", False, "out_of_range"),
        ('{"score": 1' + "0" * 400 + "}", "json", False, "non_finite"),
        ("The image shows a red ci", "boxed", True, "truncated"),
        ('{"reasoning": "The image sho', "json", True, "truncated"),
    ],
)
def test_reasons(text: str, answer: str, truncated: bool, reason: str) -> None:
    outcome = parse_answer(text, answer, truncated)  # type: ignore[arg-type]
    assert isinstance(outcome, Invalid) and outcome.reason == reason


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"\boxed{4} and furthermore", 4),
        (r"\boxed{4}", 4),
        ("Final Alignment Rating: 4\n\\box", 4),
        ("Final Alignment Rating: 4", None),  # perhaps of 4.5
        ("A rater might say Score: 1, but the circle", None),
        ("Score: 1\nScore: 2\nThen the square, which", None),
        ("<think>\\boxed{1} or", None),
        ("<think>no</think>\nIt is red. \\boxed{5}", 5),
        ("A poor image would get \\boxed{1}, while this one", None),
        ("Final Alignment Rating: 2\nAnd yet \\boxed{4} would be", None),
        ("Final Alignment Rating: 1 is for images that", None),
        ("By the scale, Final Alignment Rating: 1\n\\box", None),
        ("**Final Alignment Rating:** 4\n**\\boxed{4}**\nLet me add that", 4),
    ],
)
def test_a_truncated_answer_is_read_where_its_verdict_stands_complete(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "boxed", truncated=True)
    if score is None:
        assert isinstance(outcome, Invalid) and outcome.reason == "truncated"
    else:
        assert isinstance(outcome, Judgement) and outcome.score == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reasoning": "red", "score": [4]} and', 4),
        ('```json\n{"reasoning": "red", "score": [4]}\n```\nLet me', 4),
        ('The verdict is {"score": 4}', 4),
        ('A poor image would get {"score": 1}, while this', None),
        ('{"reasoning": "red", "parts": {"score": 1}, "sco', None),
        ('{"score": 2}\nOn second thoughts {"score": 4} would', None),
    ],
)
def test_a_truncated_object_is_read_where_it_is_the_verdict(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "json", truncated=True)
    if score is None:
        assert isinstance(outcome, Invalid) and outcome.reason == "truncated"
    else:
        assert isinstance(outcome, Judgement) and outcome.score == score


@pytest.mark.parametrize("answer", ["boxed", "json"])
def test_thoughts_are_no_answer(answer: str) -> None:
    thought = "\\boxed{1}" if answer == "boxed" else '{"score": 1}'
    verdict = thought.replace("1", "4")
    assert parse_answer(f"<think>{thought}</think>{verdict}", answer) == Judgement(score=4)  # type: ignore[arg-type]
    for text in (f"<think>{thought}", f"<think>{thought}</think>", f"{thought}</think>"):
        assert isinstance(parse_answer(text, answer), Invalid)  # type: ignore[arg-type]
    assert parse_answer(f"{verdict}<think>{thought}", answer) == Judgement(score=4)  # type: ignore[arg-type]


def test_sub_scores_are_kept_and_the_lowest_counts() -> None:
    outcome = parse_answer('{"reasoning": "dull", "score": [4, 2, 5]}', "json")
    assert outcome == Judgement(score=2, rationale="dull", parts=(4, 2, 5))
    assert parse_answer(write_answer(2, "dull", "reason_first", "json", (4, 2, 5)), "json") == outcome
    with pytest.raises(ValueError, match="lowest of its parts"):
        write_answer(3, "dull", "reason_first", "json", (4, 2, 5))


def test_the_rationale_is_what_stands_before_the_rating() -> None:
    outcome = parse_answer("1. Red? Yes.\n\nFinal Analysis: Good.\nFinal Alignment Rating: 5\n\\boxed{5}", "boxed")
    assert isinstance(outcome, Judgement) and outcome.rationale == "1. Red? Yes.\n\nFinal Analysis: Good."
    assert parse_answer('{"reasoning": "why", "score": 2}', "json") == Judgement(score=2, rationale="why")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 4\nIt is red.\nScore: 1", Judgement(score=4, rationale="It is red.\nScore: 1")),
        ("score : 2 a circle", Judgement(score=2, rationale="a circle")),
        ("Score: 3", Judgement(score=3)),
    ],
)
def test_score_first(text: str, expected: Judgement) -> None:
    assert parse_score_first(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), ("It is red. Score: 4", "unparsable"), ("Score: 9", "out_of_range"), ("Score:", "unparsable")],
)
def test_score_first_invalid(text: str, reason: str) -> None:
    outcome = parse_score_first(text)
    assert isinstance(outcome, Invalid) and outcome.reason == reason


def test_written_answers() -> None:
    assert write_answer(4, "It is red.", "score_first", "boxed") == "Score: 4\nIt is red."
    assert write_answer(4, "It is red.", "score_first", "json") == "Score: 4\nIt is red."
    assert write_answer(4, "Red.", "reason_first", "score") == "Red.\nScore: 4"
    assert write_answer(4, "Red.", "reason_first", "boxed") == "Red.\n\nFinal Alignment Rating: 4\n\\boxed{4}"
    assert json.loads(write_answer(4, "Red.", "reason_first", "json")) == {"reasoning": "Red.", "score": [4]}
    with pytest.raises(ValueError, match=r"1\.\.5"):
        write_answer(0, "", "score_first", "boxed")


def test_final_analysis() -> None:
    text = "Final Analysis: no.\n**Final Analysis:** The circle\nis red.\n\n**Final Alignment Rating: 4**\n\\boxed{4}"
    assert final_analysis(text) == "The circle\nis red."
    assert final_analysis("Final Analysis: all there \\boxed{5}") == "all there"
    assert final_analysis("no such paragraph") == ""


def test_parse_plan() -> None:
    text = """<think>- not this one?</think>
# Plan
## Main subject
- [ ] Is there a red circle?
* **Is it alone?**
1. Is the circle on the left?
   2) Is there snow?
- [x] Is there a red circle?
---
## Negative constraints
- None
"""
    expected = ["Is there a red circle?", "Is it alone?", "Is the circle on the left?", "Is there snow?"]
    assert parse_plan(text) == expected


@pytest.mark.parametrize(
    ("text", "truncated", "reason"),
    [
        ("", False, "empty"),
        ("There is nothing to check.", False, "unparsable"),
        ("- None", False, "unparsable"),
        ("- [ ] Is there a circle?", True, "truncated"),
        ("<think>- Is it about a circle?\n- Or a square?", False, "empty"),
        ("<think>- Is it about a circle?\n- Or a squ", True, "truncated"),
        ("Okay.\n<think>- Is it about a circle?", False, "unparsable"),
    ],
)
def test_a_plan_that_failed_is_invalid(text: str, truncated: bool, reason: str) -> None:
    outcome = parse_plan(text, truncated)
    assert isinstance(outcome, Invalid) and outcome.reason == reason


def test_parse_report() -> None:
    text = "<think>- no</think>\n## **Objects**\n\n- a - b\n* a - b\n   + **one** cat_\nplain\n---\n- None"
    assert parse_report(text) == ["Objects", "a - b", "one** cat", "plain", "None"]


def test_parse_instruction() -> None:
    text = 'Well: {"instruction": "a"} or ```{"reasoning": " why ", "instruction": " make\n it {red} "}``` {"x": 1}'
    assert parse_instruction(text) == ("make it {red}", "why")
    assert parse_instruction('{"instruction": "a", "reasoning": ["b"]}') == ("a", "")


@pytest.mark.parametrize(
    ("text", "truncated", "reason"),
    [
        ("", False, "empty"),
        ("<think>- a", False, "empty"),
        ("- a\n- b", True, "truncated"),
        ("- \n***", False, "empty"),
    ],
)
def test_a_report_that_failed_is_invalid(text: str, truncated: bool, reason: str) -> None:
    outcome = parse_report(text, truncated)
    assert isinstance(outcome, Invalid) and outcome.reason == reason


@pytest.mark.parametrize(
    ("text", "truncated", "reason"),
    [
        ("", False, "empty"),
        ("make it red", False, "unparsable"),
        ('{"instruction": ""}', False, "unparsable"),
        ('{"instruction": ["a"]}', False, "unparsable"),
        ('{"instruction": "a", "more', False, "unparsable"),
        ('{"instruction": "a"}', True, "truncated"),
        ('<think>{"instruction": "a"}', False, "empty"),
    ],
)
def test_a_rewriting_that_failed_is_invalid(text: str, truncated: bool, reason: str) -> None:
    outcome = parse_instruction(text, truncated)
    assert isinstance(outcome, Invalid) and outcome.reason == reason


@pytest.mark.parametrize(
    "piece",
    ['{"a":', "{", '{"x', "\\boxed{", "\\boxed   ", "Score: ", "[*_ ", "final alignment rating:\n ", "- [ ] ", "{[["],
)
def test_hostile_answers_take_little_time(piece: str) -> None:
    text = (piece * (2 * MAX_CHARS // len(piece)))[: 2 * MAX_CHARS]
    start = time.process_time()
    for answer in ("boxed", "json"):
        assert isinstance(parse_answer(text, answer), Invalid)  # type: ignore[arg-type]
    parse_score_first(text)
    final_analysis(text)
    for parse in (parse_plan, parse_report, parse_instruction):
        parse(text)
    assert time.process_time() - start < 3
