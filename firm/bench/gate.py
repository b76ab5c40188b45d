"""The trust rule: a critic becomes a reward only if its agreement with held-out scores passes every rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from firm.config import Gate, Rule
from firm.config.bench import SCORES_OF
from firm.critics.agreement import Agreement, Group
from firm.records import Check, Verdict


def judge_gate(gate: Gate, agreement: Agreement, dimensions: Sequence[str]) -> Verdict:
    """Apply the rules to a critic's agreement; a rule without a dimension holds for each of ``dimensions``.

    A metric without a value fails its rule: no examples of a source, no valid judgement, a constant critic's
    correlation.
    """
    checks = [
        _check(rule, dimension, agreement)
        for rule in gate.rules
        for dimension in ([rule.dimension] if rule.dimension else dimensions)
    ]
    return Verdict(trusted=all(check.passed for check in checks), checks=checks, accepted_gaps=gate.accept_gaps)


def _check(rule: Rule, dimension: str, agreement: Agreement) -> Check:
    group = agreement.measured.get((dimension, rule.source))
    value = group.metrics[rule.metric] if group else None
    if value is not None and not math.isfinite(value):
        value = None
    passed = rule.holds(value)
    bound = _bound(rule, value)
    message = _sentence(rule, dimension, value, bound, passed, group, agreement)
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
    group: Group | None,
    agreement: Agreement,
) -> str:
    where = f"{dimension} {rule.metric}" + (f" on {rule.source}" if rule.source else "")
    if group is None:
        known = sorted(source for d, source in agreement.measured if d == dimension and source)
        sources = f"; it has examples of {', '.join(known)}" if known else ""
        return f"{where} has no value, must be {bound}: the bench has no such examples{sources}"
    where += f" against {SCORES_OF[group.whose]}"
    if value is None:
        return f"{where} has no value ({_why_undefined(group)}), must be {bound}"
    verb = "is" if passed else "must be"
    number = f"{value:.{_digits(rule, value)}f}"
    if passed:
        return f"{where} {verb} {number}, as demanded {bound}{_constant(rule, group)}"
    return f"{where} is {number}, {verb} {bound}{_constant(rule, group)}"


def _why_undefined(group: Group) -> str:
    return "it is undefined on these scores" if group.metrics["num_valid"] else "there is no valid judgement"


def _constant(rule: Rule, group: Group) -> str:
    """The error of the best constant answer, for metrics in units of the score."""
    score = group.metrics["constant_score"]
    error = group.metrics["constant_mae"]
    if rule.metric not in ("mae", "mae_low", "mae_high", "mae_penalised") or score is None or error is None:
        return ""
    return f" (a constant {score:.3g} has {error:.2f})"
