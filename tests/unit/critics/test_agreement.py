"""Agreement: every expected example counts, whether it was answered or not."""

import json
from typing import Any

import pytest

from firm.config import METRICS
from firm.critics.agreement import Expected, Group, Prediction, agreement, point_estimate
from firm.records import Invalid, Judgement, Outcome, UserError

FOLLOWING = "instruction_following"
EASY = {"difficulty": "easy", "source": "generated", "whose": "teacher"}


def prediction(index: int, human: float, outcome: Outcome | int, **fields: Any) -> Prediction:
    outcome = Judgement(score=outcome) if isinstance(outcome, int) else outcome
    values = {
        "whose": "teacher",
        "id": str(index),
        "prompt": f"prompt {index}",
        "dimension": FOLLOWING,
        "difficulty": "easy",
        "source": "generated",
        **fields,
    }
    return Prediction(**values, reference=human, outcome=outcome)


def group(predictions: list[Prediction], by: str = "all", value: str = "all", **options: Any) -> Group:
    result = agreement(predictions, **{"num_bootstrap": 50, **options})
    (found,) = [g for g in result.groups if (g.by, g.value) == (by, value)]
    return found


BAD = Invalid(reason="unparsable")
CUT = Invalid(reason="truncated")


def test_numbers_by_hand() -> None:
    pairs = [(1, 1), (1, 2), (3, 3), (3, 5), (5, 4), (5, 5)]
    metrics = group([prediction(i, h, p) for i, (h, p) in enumerate(pairs)]).metrics
    assert set(metrics) == set(METRICS)
    assert metrics["n"] == metrics["num_valid"] == 6 and metrics["coverage"] == 1
    assert metrics["mae"] == metrics["mae_penalised"] == pytest.approx(4 / 6)
    assert metrics["macro_mae"] == pytest.approx(2 / 3) and metrics["bias"] == pytest.approx(2 / 6)
    assert (metrics["constant_score"], metrics["constant_mae"]) == (3, pytest.approx(8 / 6))
    assert metrics["constant_4_mae"] == pytest.approx(10 / 6) and metrics["skill"] == pytest.approx(0.5)
    assert metrics["exact"] == 0.5 and metrics["within_1"] == pytest.approx(5 / 6)
    low, high, spearman = metrics["spearman_low"], metrics["spearman_high"], metrics["spearman"]
    assert low is not None and high is not None and spearman is not None and low <= spearman <= high
    assert metrics["mae_low"] is not None and metrics["mae_high"] is not None
    assert metrics["mae_low"] < 4 / 6 < metrics["mae_high"]


def test_failed_and_missing_judgements_are_counted() -> None:
    rows = [prediction(0, 4, 4), prediction(1, 2, BAD), prediction(2, 3, CUT)]
    expected = [
        Expected(id=str(i), prompt=f"prompt {i}", dimension=FOLLOWING, **EASY, reference=h)
        for i, h in enumerate([4, 2, 3, 5])
    ]
    found = group(rows, expected=expected)
    assert found.invalid == {"unparsable": 1, "truncated": 1, "missing": 1}
    assert (found.metrics["n"], found.metrics["num_valid"], found.metrics["coverage"]) == (4, 1, 0.25)
    assert found.metrics["mae"] == 0 and found.metrics["mae_penalised"] == (0 + 3 + 2 + 4) / 4
    assert found.metrics["constant_mae"] == 1  # on all four, not on the one that was answered


def test_not_answering_never_helps() -> None:
    """Whichever single answer is withheld, the penalised error does not fall (the official script's MAE does)."""
    pairs = [(1, 5), (2, 2), (3, 4), (4, 1), (5, 5)]
    honest = group([prediction(i, h, p) for i, (h, p) in enumerate(pairs)]).metrics
    gained = False
    for withheld in range(5):
        rows = [prediction(i, h, BAD if i == withheld else p) for i, (h, p) in enumerate(pairs)]
        metrics = group(rows).metrics
        assert metrics["mae_penalised"] >= honest["mae_penalised"]  # type: ignore[operator]
        assert metrics["coverage"] == 0.8
        gained = gained or metrics["mae"] < honest["mae"]  # type: ignore[operator]
    assert gained


def test_nothing_valid_gives_no_numbers() -> None:
    found = group([prediction(0, 2, BAD), prediction(1, 5, BAD)])
    assert all(
        found.metrics[name] is None for name in ("mae", "mae_low", "macro_mae", "spearman", "qwk", "exact", "bias")
    )
    assert found.metrics["mae_penalised"] == 3.5 and sum(map(sum, found.confusion)) == 0


def test_a_constant_critic_has_no_correlation_and_no_skill() -> None:
    metrics = group([prediction(i, h, 3) for i, h in enumerate([1, 3, 3, 5])]).metrics
    assert metrics["spearman"] is None and metrics["spearman_low"] is None and metrics["skill"] == 0


def test_groups() -> None:
    rows = [
        prediction(0, 1, 1), prediction(1, 5, 4, source="rendered"), prediction(2, 5, 5, difficulty="hard"),
        prediction(0, 2, 3, dimension="quality", seen="untouched"),
    ]  # fmt: skip
    result = agreement(rows, num_bootstrap=10)
    [untouched] = [g for g in result.groups if g.by == "seen"]
    assert (untouched.dimension, untouched.value, untouched.metrics["bias"]) == ("quality", "untouched", 1)
    names = [(g.by, g.value) for g in result.groups if g.dimension == FOLLOWING]
    assert names == [
        ("all", "all"), ("source", "generated"), ("source", "rendered"), ("difficulty", "easy"), ("difficulty", "hard"),
        ("reference", "1"), ("reference", "5"),
    ]  # fmt: skip
    assert set(result.measured) == {
        (FOLLOWING, None), (FOLLOWING, "generated"), (FOLLOWING, "rendered"),
        ("quality", None), ("quality", "generated"),
    }  # fmt: skip
    assert result.measured[(FOLLOWING, "rendered")].metrics["mae"] == 1
    assert group(rows, "reference", "5").metrics["bias"] == -0.5


def test_a_source_named_all_is_not_the_whole() -> None:
    rows = [prediction(0, 1, 5, source="all"), prediction(1, 1, 1)]
    result = agreement(rows, num_bootstrap=10)
    assert result.measured[(FOLLOWING, None)].metrics["n"] == 2
    assert result.measured[(FOLLOWING, "all")].metrics["n"] == 1


def test_point_estimates() -> None:
    judgement = Judgement(score=5, distribution=(0.35, 0.25, 0, 0, 0.4))
    assert [point_estimate(judgement, e) for e in ("score", "soft_score", "median")] == [5, pytest.approx(2.85), 2]
    assert point_estimate(Judgement(score=4), "median") == point_estimate(Judgement(score=4), "soft_score") == 4
    assert point_estimate(Judgement(score=1, distribution=(0.5, 0.5, 0, 0, 0)), "median") == 1
    off = Judgement(score=5, distribution=(0, 0, 0, 0, 1.0009))
    assert point_estimate(off, "soft_score") == 5
    rows = [prediction(0, 2, judgement)]
    assert [group(rows, estimate=e).metrics["mae"] for e in ("score", "median")] == [3, 0]


def test_judgements_without_a_distribution_show() -> None:
    soft = Judgement(score=5, distribution=(0.35, 0.25, 0, 0, 0.4))
    rows = [prediction(0, 2, soft), prediction(1, 2, soft), prediction(2, 4, 4), prediction(3, 4, BAD)]
    assert group(rows).metrics["soft_share"] == pytest.approx(2 / 3)
    assert group(rows[3:]).metrics["soft_share"] is None


def test_contradictory_predictions_are_refused() -> None:
    with pytest.raises(UserError, match="judged twice"):
        agreement([prediction(0, 1, 1), prediction(0, 1, 2)])
    expected = [Expected(id="0", prompt="prompt 0", dimension=FOLLOWING, **EASY, reference=1)]
    with pytest.raises(UserError, match="no expected example"):
        agreement([prediction(7, 1, 1)], expected=expected)


def test_it_travels_as_json_and_into_a_summary() -> None:
    result = agreement([prediction(0, 1, 2), prediction(1, 4, 4), prediction(2, 3, BAD)], num_bootstrap=10)
    assert type(result).model_validate_json(result.model_dump_json()) == result
    tables = result.tables()
    json.dumps(tables, allow_nan=False)
    assert tables["agreement"][0]["by"] == "all" and tables["agreement"][0]["mae"] == 0.5
    assert tables["invalid"] == [{"judge": "critic", "dimension": FOLLOWING, "reason": "unparsable", "count": 1}]
    assert len(tables["confusion"]) == 5 and tables["confusion"][0]["predicted_2"] == 1
    assert result.headline()["instruction_following_mae"] == 0.5
    assert agreement([]).tables() == {"agreement": [], "overall": [], "invalid": [], "confusion": []}


def test_overall_each_dimension_weighs_as_much_as_it_has_judgements() -> None:
    """The paper's own numbers: 301 edits with an error of .53 in execution and 256 with .73 in consistency have .62."""

    def edits(dimension: str, number: int, wrong: int) -> list[Prediction]:
        return [
            prediction(i, 4, 3 if i < wrong else 4, dimension=dimension, source="b" if i % 2 else "a")
            for i in range(number)
        ]

    execution, consistency = edits("execution", 301, 160), edits("consistency", 256, 187)
    failed = [prediction(i, 1, BAD, dimension="execution", source="a") for i in range(1000, 1020)]
    result = agreement([*execution, *consistency, *failed], num_bootstrap=50)
    whole, a, b = result.tables()["overall"]
    errors = [result.measured[d, None].metrics["mae"] for d in ("execution", "consistency")]
    assert errors == [pytest.approx(0.53, abs=0.002), pytest.approx(0.73, abs=0.002)]
    assert (whole["judge"], whole["dimension"], whole["by"], whole["whose"]) == ("critic", "overall", "all", "teacher")
    assert (
        whole["mae"] == result.headline()["overall_mae"] == pytest.approx(347 / 557) and round(whole["mae"], 2) == 0.62
    )
    assert whole["mae_low"] < whole["mae"] < whole["mae_high"]
    assert (whole["n"], whole["num_valid"], whole["coverage"]) == (577, 557, pytest.approx(557 / 577))
    assert (whole["constant_score"], whole["constant_mae"]) == (4, pytest.approx(60 / 577))
    assert (a["by"], a["value"], b["value"]) == ("source", "a", "b") and a["n"] + b["n"] == 577
    nothing = agreement(failed, num_bootstrap=5)
    assert nothing.overall[0].metrics["mae"] is None and "overall_mae" not in nothing.headline()


def test_images_of_one_prompt_are_ranked_by_soft_scores() -> None:
    """Hard scores would tie; the reward is soft."""
    low = Judgement(score=3, distribution=(0, 0.4, 0.6, 0, 0))
    high = Judgement(score=3, distribution=(0, 0, 0.6, 0.4, 0))
    pairs = [prediction(0, 2, low, prompt="a"), prediction(1, 4, high, prompt="a"), prediction(2, 5, 1, prompt="b")]
    metrics = group(pairs).metrics
    assert (metrics["pairwise"], metrics["num_pairs"]) == (1.0, 1.0)
    assert group([prediction(0, 2, 2), prediction(1, 4, 4)]).metrics["pairwise"] is None


def test_references_that_are_means_of_raters() -> None:
    rows = [prediction(i, h, p, whose="people") for i, (h, p) in enumerate([(4.5, 4), (4.4, 5), (1.25, 1)])]
    result = agreement(rows, num_bootstrap=20, judge="auditor")
    metrics = result.measured[(FOLLOWING, None)].metrics
    assert metrics["mae"] == pytest.approx((0.5 + 0.6 + 0.25) / 3) and metrics["constant_score"] == 4.4
    assert [g.value for g in result.groups if g.by == "reference"] == ["1", "4", "5"]
    assert metrics["exact"] == pytest.approx(1 / 3), "4.5 is nearest to 5, 4.4 to 4"
    assert {g.whose for g in result.groups} == {"people"}
    assert {row["judge"] for rows in result.tables().values() for row in rows} == {"auditor"}
    mixed = agreement([*rows, prediction(9, 1, 1, source="rendered")], num_bootstrap=5)
    assert mixed.measured[(FOLLOWING, None)].whose == "both"
    assert mixed.measured[(FOLLOWING, "rendered")].whose == "teacher"


def test_skill_and_pairs_have_intervals_that_count_failures() -> None:
    rows = [prediction(i, 1 + i % 5, 1 + i % 5, prompt=f"prompt {i // 5}") for i in range(100)]
    good = group(rows).metrics
    assert good["skill"] == good["skill_low"] == 1 and good["pairwise_low"] == 1
    half = group([p.model_copy(update={"outcome": BAD}) if i % 2 else p for i, p in enumerate(rows)]).metrics
    assert half["skill_low"] is not None and half["skill_low"] < half["skill"] < 0  # type: ignore[operator]
    inverted = group([prediction(i, 1 + i % 5, 5 - i % 5, prompt=f"prompt {i // 5}") for i in range(100)]).metrics
    assert inverted["pairwise_high"] == 0 and inverted["skill_high"] < 0  # type: ignore[operator]


def test_pairs_are_ranked_by_the_soft_score_against_the_reference() -> None:
    sure, doubtful = (0.0, 0.0, 0.6, 0.4, 0.0), (0.0, 0.4, 0.6, 0.0, 0.0)  # the hard score of both is 3
    rows = [
        prediction(2 * i + j, human, Judgement(score=3, distribution=distribution), prompt=f"prompt {i}")
        for i in range(4)
        for j, (human, distribution) in enumerate([(4, sure), (2, doubtful)])
    ]
    metrics = group(rows).metrics
    assert [metrics[name] for name in ("pairwise", "pairwise_low", "pairwise_high", "num_pairs")] == [1, 1, 1, 4]
