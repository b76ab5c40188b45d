"""Which texts say a score in each format, and which only have a number in them."""

import json
from collections.abc import Callable
from itertools import product

import pytest

from firm.critics.answers import parse_answer, parse_instruction, parse_score_first
from firm.records import Invalid, Judgement

Read = Callable[[str, bool], Judgement | Invalid]
READERS: dict[str, Read] = {
    "boxed": lambda text, cut: parse_answer(text, "boxed", cut),
    "json": lambda text, cut: parse_answer(text, "json", cut),
    "score": lambda text, cut: parse_answer(text, "score", cut),
    "score_first": parse_score_first,
}
# How each format writes a number; what follows on its line is the case.
FORMS = [
    ("boxed", "\\boxed{{{}}}"),
    ("boxed", "It is red.\n**\\boxed{{{}}}**"),
    ("boxed", "Final Alignment Rating: {}"),
    ("boxed", "Score: **{}**"),
    ("json", '{{"score": {}}}'),
    ("json", '```json\n{{"reasoning": "red", "score": [{}]}}'),
    ("score", "It is red.\nScore: {}"),
    ("score_first", "Score: {}"),
    ("score_first", "**Score:** {}"),
]
GOES_ON = [
    " / 10", "/10", "/ 100", " (out of 10)", " out of 10", " out of ten", " points out of 10", " of 10", "%",
    " percent", " on a scale of 1 to 10", " on a 10-point scale", " or 5", " or even 5", " to 5", "-5", " - 5", " – 5",
    "~5", ", 5", " 5", " and a half",
    " point 5", ".5", "±1", " plus 1", " or four", " & 5", " out of 5.5", "/50", " / 5/10",
]  # fmt: skip
MENTIONS = [
    " is for perfect images.",
    " is only for perfect images.",
    " would be too much.",
    " means perfect",
    " if it were red",
]
HARMLESS = ["", ".", " ", "\n", "/5", " / 5", " out of 5", " (out of five)", " on a scale of 1 to 5", "/5."]


@pytest.mark.parametrize(("form", "template"), FORMS)
def test_a_number_that_goes_on_is_no_verdict(form: str, template: str) -> None:
    for follows, cut in product((*GOES_ON, *MENTIONS), (False, True)):
        for behind in ("", "\n", " and so"):
            text = template.format(4) + follows + behind
            assert isinstance(READERS[form](text, cut), Invalid), (text, cut)


@pytest.mark.parametrize(("form", "template"), FORMS)
def test_a_number_that_stands_alone_is_a_verdict(form: str, template: str) -> None:
    for score, follows in product(range(1, 6), HARMLESS):
        outcome = READERS[form](template.format(score) + follows, False)
        assert isinstance(outcome, Judgement) and outcome.score == score, template.format(score) + follows


@pytest.mark.parametrize(
    "before",
    ["3 or ", "3 to ", "3-", "3 - ", "between 3 and ", "I would not give ", "It does not deserve ", "It isn't a ",
     "less than ", "at least ", "almost ", "rather than ", "instead of ", "never ", "\\boxed{3} or ", "**3** or ",
     '{"score": 3} or ', "> "],
)  # fmt: skip
def test_what_is_a_bound_or_denied_is_no_verdict(before: str) -> None:
    for (form, verdict), cut in product(
        (("boxed", "\\boxed{5}"), ("boxed", "Score: 5"), ("json", '{"score": 5}'), ("score", "Score: 5")), (False, True)
    ):
        for text in (before + verdict, f"It is red. {before}{verdict}."):
            assert isinstance(READERS[form](text, cut), Invalid), (text, cut)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is not red.\n\\boxed{2}", 2),
        ("The cat is not red, so I give it \\boxed{2}", 2),
        ("I do not see a circle: \\boxed{1}", 1),
        ("There are 3. \\boxed{4} and all are red", 4),
        ("\\boxed{4}, as it is red", 4),
        ("\\boxed{4} to be fair", 4),
        ("Score: 4. 3 circles are red.", 4),
        ("Score: 4 (a good one)", 4),
        ("Score: 4 - good", 4),
        ("Overall, the score: 4", 4),
        ("I say Score: 4", 4),
        ("Of 3 circles, one is red.\n3. Is it alone? Yes.\nScore: 4", 4),
        ("I say Score: 4 and so on", None),  # in a sentence, that may be about it
        ("The rubric says Score: 5 is for perfect images. Let me now", None),
        ("The rubric says Score: 5, and that is", None),
    ],
)
def test_boxed(text: str, score: int | None) -> None:
    outcome = parse_answer(text, "boxed")
    assert isinstance(outcome, Invalid) if score is None else outcome == outcome.model_copy(update={"score": score})
    assert isinstance(outcome, Invalid) == (score is None)


@pytest.mark.parametrize("form", ["boxed", "json"])
@pytest.mark.parametrize(
    ("before", "leads"),
    [
        ("", True), ("It is red.\n", True), ("It is red. ", True), ("The verdict is ", True), ("**", True),
        ("So, my final score: ", True), ("It is red. Thus the answer is: ", True), ("A perfect one gets ", False),
        ("I give it ", False), ("By the rubric, the score is ", False), ("Were it red, the verdict is ", False),
    ],
)  # fmt: skip
def test_truncated_only_what_leads_a_sentence_is_a_verdict(form: str, before: str, leads: bool) -> None:
    text = before + ("\\boxed{4}" if form == "boxed" else '{"score": 4}')
    for behind in ("", ".", " Let me", "\nLet me"):
        assert isinstance(READERS[form](text + behind, True), Judgement) is leads, text + behind
        assert isinstance(READERS[form](text + behind, False), Judgement)


@pytest.mark.parametrize("tag", ["<think>", "<THINK>", "<thinking>", "<thought>", "< think >", "[THINK]", "◁think▷"])
def test_no_format_reads_thoughts(tag: str) -> None:
    end = tag.replace("think", "/think").replace("THINK", "/THINK").replace("<thought", "</thought")
    for form, verdict in (
        ("boxed", "\\boxed{5}"),
        ("json", '{"score": 5}'),
        ("score", "Score: 5"),
        ("score_first", "Score: 5"),
    ):
        for cut in (False, True):
            assert isinstance(READERS[form](tag + verdict, cut), Invalid)
            assert isinstance(READERS[form](f"{tag}{verdict}{end}", cut), Invalid)
        if form != "score_first":
            assert READERS[form](f"{tag}{verdict}{end}{verdict.replace('5', '4')}", False) == Judgement(score=4)


def test_a_score_first_that_may_have_been_cut_inside_its_number() -> None:
    for text in ("Score: 4", "Score: 4.", "Score:"):
        outcome = parse_score_first(text, truncated=True)
        assert isinstance(outcome, Invalid) and outcome.reason == "truncated"
    assert parse_score_first("Score: 4\nred", truncated=True) == Judgement(score=4, rationale="red")


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "\\udc00\\ud800"])
def test_half_a_surrogate_pair_in_an_object_does_not_get_into_files(half: str) -> None:
    """As an escape it is in no text before the object is read."""
    outcome = parse_answer(f'{{"reasoning": "red {half}", "score": 4}}', "json")
    assert isinstance(outcome, Judgement) and Judgement.model_validate_json(outcome.model_dump_json()) == outcome
    rewritten = parse_instruction(f'{{"instruction": "make it {half}", "reasoning": "{half}"}}')
    assert isinstance(rewritten, tuple) and json.dumps(rewritten, ensure_ascii=False).encode()
    whole = parse_answer('{"reasoning": "\\ud83d\\ude00", "score": 4}', "json")
    assert whole == Judgement(score=4, rationale="\U0001f600")
