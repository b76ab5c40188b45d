"""Whatever a judge says, parsing does not raise; whatever curation writes parses back to the same score."""

import json
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from firm.chat.messages import valid_unicode
from firm.critics.answers import (
    ScoreFormat,
    final_analysis,
    parse_answer,
    parse_instruction,
    parse_plan,
    parse_report,
    parse_score_first,
    write_answer,
)
from firm.records import Invalid, Judgement

PIECES = st.sampled_from(
    ["{", "}", '"score"', ":", "[", "]", ",", "4", "4.7", "NaN", "-1", "1e400", "\\boxed{", "\\boxed{3}", "\n", " ",
     '"', "\\", "Score: ", "Final Alignment Rating: ", "Final Analysis: ", "**", "- ", "<think>", "</think>",
     "\u0663", "\ud800", "/5", " or ", " / 10", "\\ud800", " is for ", "not "]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=30).map("".join))
ANSWERS = st.sampled_from(get_args(ScoreFormat))


@given(TEXTS, ANSWERS, st.booleans())
def test_parsing_never_raises_and_never_leaves_the_scale(text: str, answer: ScoreFormat, truncated: bool) -> None:
    for outcome in (parse_answer(text, answer, truncated), parse_score_first(text, truncated)):
        assert isinstance(outcome, Invalid) or outcome.score in (1, 2, 3, 4, 5)
    assert isinstance(final_analysis(text), str)
    for parse in (parse_plan, parse_report):
        lines = parse(text, truncated)
        assert isinstance(lines, Invalid) or (lines and all(line.strip() for line in lines))
        assert isinstance(lines, Invalid) or len(set(lines)) == len(lines)
    rewritten = parse_instruction(text, truncated)
    assert isinstance(rewritten, Invalid) or rewritten[0].strip()
    assert not truncated or all(
        isinstance(p(text, True), Invalid) for p in (parse_plan, parse_report, parse_instruction)
    )


@given(TEXTS.filter(lambda text: "think>" not in text and text.strip()), TEXTS)
def test_a_rewritten_instruction_is_read_as_it_was_written(instruction: str, reasoning: str) -> None:
    text = json.dumps({"reasoning": reasoning.replace("think>", ""), "instruction": instruction})
    outcome = parse_instruction(f"Here it is: {text}")
    assert isinstance(outcome, tuple) and outcome[0] == " ".join(valid_unicode(instruction).split())


RATIONALES = TEXTS.filter(lambda text: "think>" not in text)  # a teacher's thoughts are cut out of its rationale


@given(st.integers(1, 5), RATIONALES, ANSWERS)
def test_reason_first_answers_parse_back(score: int, rationale: str, answer: ScoreFormat) -> None:
    outcome = parse_answer(write_answer(score, rationale, "reason_first", answer), answer)
    assert isinstance(outcome, Judgement) and outcome.score == score
    assert valid_unicode(outcome.rationale) == valid_unicode(rationale.strip()) or answer == "boxed"


@given(st.integers(1, 5), TEXTS, ANSWERS)
def test_score_first_answers_parse_back(score: int, rationale: str, answer: ScoreFormat) -> None:
    outcome = parse_score_first(write_answer(score, rationale, "score_first", answer))
    assert isinstance(outcome, Judgement) and outcome.score == score
    assert outcome.rationale == rationale.strip()
