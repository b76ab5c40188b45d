"""The gate: trusted only if every rule is kept, and a sentence for each that is not."""

from typing import Any

import pytest

from firm.bench.agreement import Agreement, agreement
from firm.bench.gate import judge_gate
from firm.config import Rule
from firm.records import Invalid, Judgement, Prediction, UserError

BASE = "instruction_following"


def predictions(pairs: list[tuple[int, int | None]], source: str = "rendered") -> list[Prediction]:
    return [
        Prediction(
            id=f"{source}{i}", prompt="a", dimension="instruction_following", difficulty="easy", source=source,
            human=human,
            outcome=Judgement(score=score) if score else Invalid(reason="empty"),
        )
        for i, (human, score) in enumerate(pairs)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> Agreement:
    rendered = [(1, 2), (2, 2), (3, 5), (4, 4), (5, 5)]
    return agreement(predictions(rendered) + predictions([(1, None), (5, None)], "mute"), num_bootstrap=20)


def rule(metric: str, source: str | None = "rendered", **bounds: Any) -> Rule:
    return Rule(metric=metric, source=source, **bounds)


def test_a_kept_gate(measured: Agreement) -> None:
    verdict = judge_gate([rule("mae", at_most=0.6), rule("spearman", at_least=0.5, at_most=1)], measured, BASE)
    assert verdict.trusted and verdict.failures == [] and [c.passed for c in verdict.checks] == [True, True]
    assert verdict.checks[0].value == 0.6  # a bound that is met exactly is kept
    assert verdict.checks[1].bound == "at least 0.50 and at most 1.00"


def test_one_broken_rule_is_enough(measured: Agreement) -> None:
    verdict = judge_gate([rule("mae", at_most=0.5), rule("coverage", at_least=1)], measured, BASE)
    assert not verdict.trusted
    assert verdict.failures == [
        "instruction_following mae on rendered is 0.60, must be at most 0.50 (a constant 3 has 1.20)"
    ]


def test_the_sentence_shows_a_narrow_miss(measured: Agreement) -> None:
    (message,) = judge_gate([rule("mae", at_most=0.5999)], measured, BASE).failures
    assert "is 0.6000, must be at most 0.5999" in message


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            rule("mae", "mute", at_most=4),
            "mae on mute has no value (there is no valid judgement), must be at most 4.00",
        ),
        (rule("mae", "elsewhere", at_most=4), "no such examples; it has examples of mute, rendered"),
        (Rule(metric="mae", dimension="quality", at_most=4), "quality mae has no value"),
        (rule("coverage", None, at_least=0.99), "instruction_following coverage is 0.71, must be at least 0.99"),
        (rule("mae_penalised", None, at_most=1), "mae_penalised is 1.57, must be at most 1.00 (a constant"),
        (rule("mae", at_most=float("nan")), "must be at most nan"),
    ],
)
def test_without_a_value_or_beyond_a_bound_the_rule_is_broken(measured: Agreement, broken: Rule, words: str) -> None:
    verdict = judge_gate([broken], measured, BASE)
    assert not verdict.trusted and words in verdict.failures[0]


def test_a_constant_critic_is_not_trusted_by_its_correlation() -> None:
    constant = agreement(predictions([(h, 4) for h in (1, 3, 4, 5)]), num_bootstrap=20)
    verdict = judge_gate([rule("spearman", at_least=-1)], constant, BASE)
    assert not verdict.trusted and "undefined" in verdict.failures[0]


def test_impossible_gates(measured: Agreement) -> None:
    with pytest.raises(UserError, match=r"unknown metric 'maee'.*\n.*coverage, mae, mae_low") as error:
        judge_gate([rule("maee", at_most=1)], measured, BASE)
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="no rules"):
        judge_gate([], measured, BASE)


def test_the_verdict_travels_as_json(measured: Agreement) -> None:
    verdict = judge_gate([rule("mae", "mute", at_most=1)], measured, BASE)
    assert type(verdict).model_validate_json(verdict.model_dump_json()) == verdict


def test_a_rule_is_on_its_own_dimension_or_the_base_of_the_reward(measured: Agreement) -> None:
    assert judge_gate([rule("mae", at_most=1)], measured, BASE).checks[0].dimension == BASE
    verdict = judge_gate([rule("mae", at_most=1)], measured, "quality")
    assert not verdict.trusted and "quality mae on rendered has no value" in verdict.failures[0]
    assert judge_gate([rule("mae", dimension=BASE, at_most=1)], measured, "quality").trusted
