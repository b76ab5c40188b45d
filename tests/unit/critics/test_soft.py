"""Distributions of scores: read where the verdict was first written, or pooled from several samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest

from firm.chat.messages import Reply, Token
from firm.critics.answers import ScoreFormat
from firm.critics.soft import of_the_lowest, pool, read_reply, soft_share
from firm.records import Invalid, Judgement

Belief = Mapping[str, float]
HALF = {" 4": 0.5, " 5": 0.25, " 3": 0.25}
HARD = Judgement(score=4)
FAILED = Invalid(reason="unparsable", detail="hm")


def token(text: str, belief: Belief) -> Token:
    """A token whose place might have been taken by others, with these probabilities."""
    top = tuple((other, math.log(p)) for other, p in belief.items())
    return Token(text, math.log(belief[text]), top)


def reply(*pieces: str | Token, text: str | None = None) -> Reply:
    """A reply of these tokens; those that are only a text are certain."""
    tokens = tuple(token(piece, {piece: 1.0}) if isinstance(piece, str) else piece for piece in pieces)
    return Reply("".join(t.text for t in tokens) if text is None else text, tokens=tokens)


def read(answer: Reply, form: ScoreFormat | Literal["score_first"]) -> Judgement:
    style: Literal["score_first", "reason_first"] = "score_first" if form == "score_first" else "reason_first"
    outcome = read_reply(answer, "boxed" if form == "score_first" else form, style)
    assert isinstance(outcome, Judgement)
    return outcome


@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        ("score_first", ["Score", ":", token(" 4", HALF), "\n", "as rule 4 says, Score: ", "4"]),
        ("score_first", [token("**Score:** 4", {"**Score:** 4": 1.0})]),  # a token that is more than the score
        ("boxed", ["I count ", "4", ".\n", "Final Alignment Rating:", token(" 4", HALF), "\n\\boxed{", "4", "}"]),
        ("boxed", ["Final Alignment Rating: ", token("**4", {"**4": 0.5, "**5": 0.25, "**3": 0.25}), "**"]),
        ("boxed", ["Score: ", "4", " at first.\n\\boxed{", token("4", {"4": 0.5, "5": 0.25, "3": 0.25}), "}"]),
        ("boxed", ["It is fine. Score:", token(" 4", HALF)]),
        ("score", ["red circle recolored blue 2 score :", token(" 4", HALF)]),
        ("json", ['{"score": ', token("4", {"4": 0.5, "5": 0.25, "3": 0.25}), "}"]),
        ("json", ["<think>", '{"score": ', "4", "}</think>", '{"score":', token(" 4", HALF), "}"]),
    ],
)
def test_a_distribution_is_read_where_the_verdict_was_first_written(
    form: ScoreFormat | Literal["score_first"], pieces: list[str | Token]
) -> None:
    judgement = read(reply(*pieces), form)
    certain = not any(len(piece.top) > 1 for piece in pieces if isinstance(piece, Token))
    assert judgement.score == 4 and judgement.distribution == (
        None if certain else pytest.approx((0, 0, 0.25, 0.5, 0.25))
    )


def test_tokens_of_another_text_give_no_distribution() -> None:
    judgement = read(reply("\\boxed{", token("4", {"4": 0.5, "5": 0.5}), "}", text="x\\boxed{4}"), "boxed")
    assert (judgement.score, judgement.distribution) == (4, None)


def test_the_written_forms_of_a_score_count_together_and_others_not_at_all() -> None:
    belief = {" 4": 0.3, "4": 0.2, "**4": 0.1, " 5": 0.1, " 45": 0.2, " four": 0.1}
    assert read(reply("Score:", token(" 4", belief)), "score_first").distribution == pytest.approx(
        (0, 0, 0, 6 / 7, 1 / 7)
    )


def test_the_written_token_counts_though_it_is_not_among_the_likeliest() -> None:
    drawn = Token(" 2", math.log(0.1), ((" 4", math.log(0.6)), (" 5", math.log(0.3))))
    assert read(reply("Score:", drawn), "score_first").distribution == pytest.approx((0, 0.1, 0, 0.6, 0.3))


@pytest.mark.parametrize(
    "answer",
    [
        Reply("Score: 4"),
        reply("Score:", Token(" 4", -0.1)),  # without top_logprobs
        reply("Score:", token(" 4", {" 4": 0.3, " four": 0.6, " 5": 0.1})),  # hardly a choice of score
        reply("Score:", Token(" 4", 0.0, ((" 5", 0.0),))),  # more than certain
        reply("Score:", Token(" 4", math.nan, ((" 4", math.nan),))),
        reply("Score:", Token(" 4", math.inf, ((" 4", math.inf),))),
        reply("Score:", token(" 4", HALF), text="Score: 4 of 5"),  # other tokens than the text's
    ],
)
def test_without_a_distribution_that_adds_up_a_score_is_whole(answer: Reply) -> None:
    assert read(answer, "score_first").distribution is None


def test_a_rating_that_contradicts_the_conclusion_gives_no_distribution() -> None:
    answer = reply("Final Alignment Rating:", token(" 3", {" 3": 0.6, " 4": 0.4}), "\n\\boxed{", "4", "}")
    assert read(answer, "boxed") == Judgement(score=4)


def test_servers_may_give_a_character_in_pieces() -> None:
    answer = reply("caf", "\ufffd", "\ufffd", ".\nScore:", token(" 4", HALF), text="caf\u00e9.\nScore: 4")
    assert read(answer, "boxed").soft_score == pytest.approx(4)


def test_thoughts_and_the_end_may_be_among_the_tokens_alone() -> None:
    thoughts = ["So: \\boxed{", "4", "}", "</think>", "\n\n"]
    answer = reply(*thoughts, "\\boxed{", token("4", {"4": 0.5, "5": 0.5}), "}", "<|im_end|>", text="\\boxed{4}")
    assert read(answer, "boxed").soft_score == pytest.approx(4.5)


def test_three_sub_scores_have_the_distribution_of_the_lowest() -> None:
    coin = {"2": 0.5, "4": 0.5}
    answer = reply('{"score": [', token("4", coin), ", ", token("2", coin), ", ", token("4", coin), "]}")
    judgement = read(answer, "json")
    assert judgement.parts == (4, 2, 4) and judgement.distribution == pytest.approx((0, 0.875, 0, 0.125, 0))
    blind = reply('{"score": [', token("4", coin), ", ", Token("2", 0.0), ", ", token("4", coin), "]}")
    assert read(blind, "json").distribution is None


def test_the_lowest_of_one_is_itself() -> None:
    assert of_the_lowest([(0.1, 0.2, 0.3, 0.4, 0.0)]) == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.0))


# ---- samples


def soft(score: int, *distribution: float) -> Judgement:
    return Judgement(score=score, distribution=distribution)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "score", "distribution"),
    [
        ([HARD, HARD, soft(2, 0, 1, 0, 0, 0)], 4, (0, 1 / 3, 0, 2 / 3, 0)),
        ([soft(5, 0, 0, 0, 0.4, 0.6), HARD], 4, (0, 0, 0, 0.7, 0.3)),  # as often as 5, and nearer to the mean of 4.3
        ([soft(5, 0, 0, 0, 0, 1), Judgement(score=1), Judgement(score=1), HARD, HARD], 4, (0.4, 0, 0, 0.4, 0.2)),
        ([Judgement(score=1), Judgement(score=5)], 1, (0.5, 0, 0, 0, 0.5)),
    ],
)
def test_samples_are_pooled(samples: Sequence[Judgement], score: int, distribution: tuple[float, ...]) -> None:
    pooled = pool(samples)
    assert isinstance(pooled, Judgement) and pooled.score == score
    assert pooled.distribution == pytest.approx(distribution) and pooled.invalid_samples == 0


def test_failed_samples_are_counted_and_more_than_half_of_them_fail_the_judgement() -> None:
    half = pool([FAILED, HARD])
    assert half == Judgement(score=4, distribution=(0, 0, 0, 1, 0), invalid_samples=1)
    most = pool([FAILED, HARD, Invalid(reason="truncated"), FAILED])
    assert most == Invalid(reason="unparsable", detail="2 of 4 samples, such as: hm")
    assert pool([FAILED]) == FAILED and pool([HARD]) == HARD


def test_the_share_of_soft_judgements() -> None:
    assert soft_share([HARD, FAILED, soft(2, 0, 1, 0, 0, 0), HARD]) == pytest.approx(1 / 3)
    assert soft_share([FAILED]) is None
