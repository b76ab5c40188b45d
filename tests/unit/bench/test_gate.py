"""The gate: trusted only if every rule is kept, and a sentence for each that is not."""

from typing import Any

import pytest

from firm.bench.gate import judge_gate
from firm.config import Gate, Rule
from firm.critics.agreement import Agreement, Prediction, agreement
from firm.records import Invalid, Judgement, Verdict

BASE = "instruction_following"


def predictions(pairs: list[tuple[int, int | None]], source: str = "rendered") -> list[Prediction]:
    return [
        Prediction(
            id=f"{source}{i}", prompt="a", dimension="instruction_following", difficulty="easy", source=source,
            whose="teacher", reference=human,
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


def judged(measured: Agreement, *rules: Rule, dimensions: tuple[str, ...] = (BASE,)) -> Verdict:
    return judge_gate(Gate(rules=list(rules)), measured, dimensions)


def test_a_kept_gate(measured: Agreement) -> None:
    verdict = judged(measured, rule("mae", at_most=0.6), rule("spearman", at_least=0.5, at_most=1))
    assert verdict.trusted and verdict.failures == [] and [c.passed for c in verdict.checks] == [True, True]
    assert verdict.checks[0].value == 0.6  # a bound that is met exactly is kept
    assert verdict.checks[1].bound == "at least 0.50 and at most 1.00"


def test_one_broken_rule_is_enough(measured: Agreement) -> None:
    verdict = judged(measured, rule("mae", at_most=0.5), rule("coverage", at_least=1))
    assert not verdict.trusted
    assert verdict.failures == [
        "instruction_following mae on rendered against the teacher's scores is 0.60, must be at most 0.50 "
        "(a constant 3 has 1.20)"
    ]


def test_the_sentence_shows_a_narrow_miss(measured: Agreement) -> None:
    (message,) = judged(measured, rule("mae", at_most=0.5999)).failures
    assert "is 0.6000, must be at most 0.5999" in message


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            rule("mae", "mute", at_most=4),
            "mae on mute against the teacher's scores has no value (there is no valid judgement), must be at most 4.00",
        ),
        (rule("mae", "elsewhere", at_most=4), "no such examples; it has examples of mute, rendered"),
        (Rule(metric="mae", dimension="quality", at_most=4), "quality mae has no value"),
        (
            rule("coverage", None, at_least=0.99),
            "instruction_following coverage against the teacher's scores is 0.71, must be at least 0.99",
        ),
        (
            rule("mae_penalised", None, at_most=1),
            "mae_penalised against the teacher's scores is 1.57, must be at most 1.00 (a constant",
        ),
        (rule("mae", at_most=float("nan")), "must be at most nan"),
    ],
)
def test_without_a_value_or_beyond_a_bound_the_rule_is_broken(measured: Agreement, broken: Rule, words: str) -> None:
    verdict = judged(measured, broken)
    assert not verdict.trusted and words in verdict.failures[0]


def test_a_constant_critic_is_not_trusted_by_its_correlation() -> None:
    constant = agreement(predictions([(h, 4) for h in (1, 3, 4, 5)]), num_bootstrap=20)
    verdict = judged(constant, rule("spearman", at_least=-1))
    assert not verdict.trusted and "undefined" in verdict.failures[0]


def test_the_verdict_travels_as_json(measured: Agreement) -> None:
    verdict = judged(measured, rule("mae", "mute", at_most=1))
    assert type(verdict).model_validate_json(verdict.model_dump_json()) == verdict


def test_a_rule_without_a_dimension_holds_for_every_dimension_of_the_reward(measured: Agreement) -> None:
    verdict = judged(measured, rule("mae", at_most=1), dimensions=(BASE, "quality"))
    assert [check.dimension for check in verdict.checks] == [BASE, "quality"]
    assert not verdict.trusted and "quality mae on rendered has no value" in verdict.failures[0]
    assert judged(measured, rule("mae", dimension=BASE, at_most=1), dimensions=("quality",)).trusted


def test_what_is_accepted_is_in_the_verdict(measured: Agreement) -> None:
    gate = Gate(rules=[rule("mae", at_most=1)], accept_gaps=["quality.pairwise"])
    assert judge_gate(gate, measured, [BASE]).accepted_gaps == ["quality.pairwise"]


def test_the_sentence_says_whose_scores_they_are() -> None:
    mine = [p.model_copy(update={"whose": "people"}) for p in predictions([(1, 5), (5, 1)])]
    (message,) = judged(agreement(mine, num_bootstrap=5), rule("mae", at_most=1)).failures
    assert "against people's scores is 4.00" in message
    both = agreement(mine + predictions([(1, 1)], "mute"), num_bootstrap=5)
    (message,) = judged(both, rule("mae", None, at_most=1)).failures
    assert "against people's and the teacher's scores" in message
