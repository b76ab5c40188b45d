"""The trust rule: a critic becomes a reward only if its agreement with held-out scores passes every rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from firm.bench.agreement import METRICS, Agreement, Metrics
from firm.config import Rule
from firm.records import Check, UserError, Verdict


def judge_gate(rules: Sequence[Rule], agreement: Agreement, base: str) -> Verdict:
    """Apply the rules to a critic's agreement; a rule without a dimension applies to the reward's ``base``.

    A metric without a value fails its rule: no examples of a source, no valid judgement, a constant critic's
    correlation.

    Raises:
        UserError: No rules, or a rule on a metric that does not exist (exit code 2).
    """
    if not rules:
        raise UserError("the gate has no rules", "bench.gate", "give at least one rule", usage=True)
    for rule in rules:
        if rule.metric not in METRICS:
            known = f"use one of {', '.join(METRICS)}"
            raise UserError(
                f"the gate has a rule on an unknown metric {rule.metric!r}", "bench.gate", known, usage=True
            )
    checks = [_check(rule, rule.dimension or base, agreement) for rule in rules]
    return Verdict(trusted=all(check.passed for check in checks), checks=checks)


def _check(rule: Rule, dimension: str, agreement: Agreement) -> Check:
    metrics = agreement.metrics.get((dimension, rule.source))
    value = metrics[rule.metric] if metrics else None
    if value is not None and not math.isfinite(value):
        value = None
    passed = value is not None
    # Written so that a bound that is not a number fails, too.
    if value is not None and rule.at_least is not None:
        passed = passed and value >= rule.at_least
    if value is not None and rule.at_most is not None:
        passed = passed and value <= rule.at_most
    bound = _bound(rule, value)
    message = _sentence(rule, dimension, value, bound, passed, metrics, agreement)
    return Check(
        metric=rule.metric, dimension=dimension, source=rule.source, value=value, bound=bound, passed=passed,
        message=message,
    )  # fmt: skip


def _digits(rule: Rule, value: float | None) -> int:
    """Decimals needed to tell the value from the bounds: 0.604 is not at most 0.60, and the message must show it."""
    bounds = [b for b in (rule.at_least, rule.at_most) if b is not None]
    for digits in (2, 3, 4, 5):
        written = {f"{b:.{digits}f}" for b in bounds}
        if value is None or value in bounds or f"{value:.{digits}f}" not in written:
            return digits
    return 6


def _bound(rule: Rule, value: float | None) -> str:
    digits = _digits(rule, value)
    parts = [("at least", rule.at_least), ("at most", rule.at_most)]
    return " and ".join(f"{words} {b:.{digits}f}" for words, b in parts if b is not None)


def _sentence(
    rule: Rule,
    dimension: str,
    value: float | None,
    bound: str,
    passed: bool,
    metrics: Metrics | None,
    agreement: Agreement,
) -> str:
    where = f"{dimension} {rule.metric}" + (f" on {rule.source}" if rule.source else "")
    if metrics is None:
        known = sorted(source for d, source in agreement.metrics if d == dimension and source)
        sources = f"; it has examples of {', '.join(known)}" if known else ""
        return f"{where} has no value, must be {bound}: the bench has no such examples{sources}"
    if value is None:
        return f"{where} has no value ({_why_undefined(metrics)}), must be {bound}"
    verb = "is" if passed else "must be"
    number = f"{value:.{_digits(rule, value)}f}"
    if passed:
        return f"{where} {verb} {number}, as demanded {bound}{_constant(rule, metrics)}"
    return f"{where} is {number}, {verb} {bound}{_constant(rule, metrics)}"


def _why_undefined(metrics: Metrics) -> str:
    return "it is undefined on these scores" if metrics["num_valid"] else "there is no valid judgement"


def _constant(rule: Rule, metrics: Metrics) -> str:
    """The error of the best constant answer, for metrics in units of the score."""
    score = metrics["constant_score"]
    error = metrics["constant_mae"]
    if rule.metric not in ("mae", "mae_low", "mae_high", "mae_penalised") or score is None or error is None:
        return ""
    return f" (a constant {score:.0f} has {error:.2f})"
