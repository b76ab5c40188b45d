"""Agreement of a critic with reference scores (paper section 3.3), with what the paper's MAE alone does not show.

The official benchmark compares the examples that both files have, so a critic gains by not answering, and a constant
answer beats several published models. Here every expected example counts: coverage is reported, a missing or failed
judgement costs the largest possible error in ``mae_penalised``, and every MAE is shown next to a constant answer's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from firm import stats
from firm.config.bench import METRICS, Whose
from firm.records import SCORES, ConfusionMatrix, Judgement, Outcome, Prompt, Record, UserError

PointEstimate = Literal["score", "soft_score", "median"]
Metrics = dict[str, float | None]
By = Literal["all", "source", "seen", "difficulty", "reference"]


class Expected(Record):
    """An example that a judge is asked to judge, without its images; ``reference`` may be a mean of several raters.

    ``seen`` is what is seen of it without a judge, such as "untouched"; empty where there is nothing to tell.
    """

    id: str
    dimension: str
    prompt: Prompt
    difficulty: str
    source: str
    whose: Whose
    reference: float = Field(ge=1, le=5)
    seen: str = ""


class Prediction(Expected):
    """A judge's outcome on one example with its reference score: one line of a prediction file."""

    outcome: Outcome


class Group(Record):
    """Agreement on one group of examples.

    Attributes:
        dimension: Judged dimension.
        by: What the group was formed by; ``all`` is the whole dimension.
        value: Value of ``by``, for example the name of a source.
        whose: Whose scores the reference scores are.
        metrics: See `METRICS`; None where a metric is undefined, for example without a single valid judgement. All but
            n, coverage, mae_penalised, skill and the constants are taken over the valid judgements.
        invalid: Failed judgements by reason; ``missing`` where there is no prediction at all.
        confusion: Counts of valid judgements [reference - 1][predicted - 1].
    """

    dimension: str
    by: By
    value: str
    whose: Whose | Literal["both"]
    metrics: Metrics
    invalid: dict[str, int]
    confusion: list[list[int]]


class Overall(Record):
    """The error over all dimensions at once, of all examples or of one source.

    As in the paper, a dimension weighs as much as it has (valid) judgements: sum(n_d * MAE_d) / sum(n_d). The best
    constant is one answer for all dimensions.
    """

    by: By
    value: str
    whose: Whose | Literal["both"]
    metrics: Metrics


class Agreement(Record):
    """Agreement of one judge by dimension, source, what is seen, difficulty and reference, and over dimensions."""

    judge: str
    estimate: PointEstimate
    groups: list[Group]
    overall: list[Overall]

    @property
    def measured(self) -> dict[tuple[str, str | None], Group]:
        """Groups by (dimension, source), with source None for the whole dimension; the gate reads these."""
        return {(g.dimension, None if g.by == "all" else g.value): g for g in self.groups if g.by in ("all", "source")}

    def headline(self) -> dict[str, float]:
        """The defined metrics of whole dimensions as ``<dimension>_<metric>``, and ``overall_mae``, for a summary."""
        wholes = [g for g in self.groups if g.by == "all"]
        found = {f"{g.dimension}_{name}": value for g in wholes for name, value in g.metrics.items()}
        found["overall_mae"] = self.overall[0].metrics["mae"] if self.overall else None
        return {name: value for name, value in found.items() if value is not None}

    def confusion(self, dimension: str) -> ConfusionMatrix | None:
        """Reference scores against predicted ones over all examples of a dimension; None where it has none."""
        for group in self.groups:
            if group.by == "all" and group.dimension == dimension:
                return ConfusionMatrix(categories=[str(s) for s in SCORES], counts=group.confusion)
        return None

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of JSON scalars for `Summary.tables`: ``agreement``, ``overall``, ``invalid`` and ``confusion``."""
        wholes = [g for g in self.groups if g.by == "all"]
        return {
            "agreement": [
                {"judge": self.judge, **g.model_dump(include={"dimension", "by", "value", "whose"}), **g.metrics}
                for g in self.groups
            ],
            "overall": [
                {"judge": self.judge, "dimension": "overall", **o.model_dump(exclude={"metrics"}), **o.metrics}
                for o in self.overall
            ],
            "invalid": [
                {"judge": self.judge, "dimension": g.dimension, "reason": reason, "count": count}
                for g in wholes
                for reason, count in sorted(g.invalid.items())
            ],
            "confusion": [
                {
                    "judge": self.judge,
                    "dimension": g.dimension,
                    "reference": s,
                    **{f"predicted_{c}": n for c, n in zip(SCORES, row, strict=True)},
                }
                for g in wholes
                for s, row in zip(SCORES, g.confusion, strict=True)
            ],
        }


@dataclass(frozen=True)
class _Row:
    """One expected example, with estimates in [1, 5] of its score or why there are none.

    ``estimate`` stands for the judgement; ``soft`` is the expectation, by which a critic's reward ranks.
    """

    example: Expected
    estimate: float | None = None
    soft: float | None = None
    has_distribution: bool = False
    reason: str = ""


def point_estimate(judgement: Judgement, estimate: PointEstimate) -> float:
    """Point estimate of a judgement, in [1, 5].

    ``score`` is the hard score, ``soft_score`` the expectation and ``median`` the median of the distribution, which is
    the estimate that makes the expected absolute error smallest. Without a distribution all three are the hard score.
    """
    if estimate == "score" or judgement.distribution is None:
        return float(judgement.score)
    shares = np.asarray(judgement.distribution) / sum(judgement.distribution)
    if estimate == "soft_score":
        return float(np.clip(shares @ np.asarray(SCORES), 1, 5))
    return float(SCORES[int(np.argmax(shares.cumsum() >= 0.5 - 1e-9))])


def _rows(predictions: Sequence[Prediction], expected: Iterable[Expected], estimate: PointEstimate) -> list[_Row]:
    wanted = {(e.dimension, e.id): e for e in expected}
    given: dict[tuple[str, str], _Row] = {}
    for p in predictions:
        key = (p.dimension, p.id)
        if key in given:
            raise UserError("an example was judged twice", f"{p.dimension} {p.id}", "remove one of the predictions")
        example = Expected(**p.model_dump(exclude={"outcome"}))
        if isinstance(p.outcome, Judgement):
            estimates = (point_estimate(p.outcome, estimate), point_estimate(p.outcome, "soft_score"))
            given[key] = _Row(example, *estimates, has_distribution=p.outcome.distribution is not None)
        else:
            given[key] = _Row(example, reason=p.outcome.reason)
    if wanted and (unknown := sorted(set(given) - set(wanted))):
        raise UserError("a prediction belongs to no expected example", " ".join(unknown[0]), "use the same test set")
    missing = [_Row(e, reason="missing") for key, e in wanted.items() if key not in given]
    return [*given.values(), *missing]


def agreement(
    predictions: Sequence[Prediction],
    estimate: PointEstimate = "score",
    num_bootstrap: int = 1000,
    seed: int = 0,
    expected: Iterable[Expected] = (),
    judge: str = "critic",
) -> Agreement:
    """Compare predictions with reference scores.

    Args:
        predictions: Outcomes of the judge, at most one for each dimension and id.
        estimate: Point estimate of a judgement, see `point_estimate`.
        num_bootstrap: Resamples of the 95% intervals, which are clustered by prompt.
        seed: Seed of the resamples.
        expected: The examples that were to be judged. Those without a prediction count as ``missing``. Empty: exactly
            those that were predicted.
        judge: Who predicted.

    Raises:
        UserError: An example judged twice, or a prediction for an example that is not expected.
    """
    rows = _rows(predictions, expected, estimate)
    groups = []
    for dimension in sorted({row.example.dimension for row in rows}):
        mine = [row for row in rows if row.example.dimension == dimension]
        groups.append(_group(dimension, "all", "all", mine, num_bootstrap, seed))
        splits: list[tuple[By, Callable[[Expected], str]]] = [
            ("source", lambda e: e.source),
            ("seen", lambda e: e.seen),
            ("difficulty", lambda e: e.difficulty),
            ("reference", lambda e: str(stats.nearest_score([e.reference])[0])),
        ]
        for by, value_of in splits:
            for value in sorted({value_of(row.example) for row in mine} - {""}):
                part = [row for row in mine if value_of(row.example) == value]
                groups.append(_group(dimension, by, value, part, num_bootstrap, seed))
    parts: list[tuple[By, str, list[_Row]]] = [("all", "all", rows)] if rows else []
    for source in sorted({row.example.source for row in rows}):
        parts.append(("source", source, [row for row in rows if row.example.source == source]))
    overall = [_overall(by, value, part, num_bootstrap, seed) for by, value, part in parts]
    return Agreement(judge=judge, estimate=estimate, groups=groups, overall=overall)


def _group(dimension: str, by: By, value: str, rows: Sequence[_Row], num_bootstrap: int, seed: int) -> Group:
    references = np.array([row.example.reference for row in rows])
    prompts = [row.example.prompt for row in rows]
    # A missing judgement costs the largest possible error, so that leaving out hard examples gains nothing.
    errors = np.array([_penalised_error(row) for row in rows])
    constant, constant_mae = stats.best_constant(references)
    skill = stats.skill_ci(errors, references, num_bootstrap, seed, prompts)
    valid = [row for row in rows if row.estimate is not None]
    metrics: Metrics = dict.fromkeys(METRICS)
    metrics |= {
        "n": float(len(rows)),
        "num_valid": float(len(valid)),
        "coverage": len(valid) / len(rows),
        "mae_penalised": float(errors.mean()),
        "skill": 1 - float(errors.mean()) / constant_mae if constant_mae > 0 else None,
        "constant_score": constant,
        "constant_mae": constant_mae,
        **_ends("skill", skill),
        **{f"constant_{s}_mae": float(m) for s, m in zip(SCORES, stats.constant_maes(references), strict=True)},
    }
    counts = np.zeros((5, 5), dtype=int)
    if valid:
        metrics["soft_share"] = sum(row.has_distribution for row in valid) / len(valid)
        metrics |= _valid_metrics(valid, num_bootstrap, seed)
        counts = stats.confusion(np.array([row.estimate for row in valid]), [row.example.reference for row in valid])
    return Group(
        dimension=dimension,
        by=by,
        value=value,
        whose=_whose(rows),
        metrics=metrics,
        invalid=dict(Counter(row.reason for row in rows if row.estimate is None)),
        confusion=counts.tolist(),
    )


def _overall(by: By, value: str, rows: Sequence[_Row], num_bootstrap: int, seed: int) -> Overall:
    constant, constant_mae = stats.best_constant([row.example.reference for row in rows])
    valid = [row for row in rows if row.estimate is not None]
    metrics: Metrics = {
        "n": float(len(rows)),
        "num_valid": float(len(valid)),
        "coverage": len(valid) / len(rows),
        "mae": None,
        **_ends("mae", None),
        "constant_score": constant,
        "constant_mae": constant_mae,
    }
    if valid:
        metrics |= _mae(valid, num_bootstrap, seed)
    return Overall(by=by, value=value, whose=_whose(rows), metrics=metrics)


def _whose(rows: Sequence[_Row]) -> Whose | Literal["both"]:
    whose = {row.example.whose for row in rows}
    return whose.pop() if len(whose) == 1 else "both"


def _mae(rows: Sequence[_Row], num_bootstrap: int, seed: int) -> Metrics:
    """The mean absolute error of valid judgements, and the ends of its interval, which is clustered by prompt."""
    predicted = np.array([row.estimate for row in rows])
    reference = [row.example.reference for row in rows]
    prompts = [row.example.prompt for row in rows]
    interval = stats.mae_ci(predicted, reference, num_bootstrap, seed, prompts)
    return {"mae": stats.mae(predicted, reference), **_ends("mae", interval)}


def _penalised_error(row: _Row) -> float:
    reference = row.example.reference
    return max(reference - 1, 5 - reference) if row.estimate is None else abs(row.estimate - reference)


def _ends(name: str, interval: tuple[float, float] | None) -> Metrics:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _valid_metrics(rows: Sequence[_Row], num_bootstrap: int, seed: int) -> Metrics:
    """Metrics over valid judgements; intervals are clustered by prompt."""
    predicted = np.array([row.estimate for row in rows])
    soft = np.array([row.soft for row in rows])
    reference = np.array([row.example.reference for row in rows])
    prompts = [row.example.prompt for row in rows]
    pairwise, num_pairs = stats.pairwise_accuracy(soft, reference, prompts)
    return {
        **_mae(rows, num_bootstrap, seed),
        "macro_mae": stats.macro_mae(predicted, reference),
        "spearman": stats.spearman(predicted, reference),
        **_ends("spearman", stats.spearman_ci(predicted, reference, num_bootstrap, seed, prompts)),
        "pairwise": pairwise,
        **_ends("pairwise", stats.pairwise_ci(soft, reference, prompts, num_bootstrap, seed)),
        "num_pairs": float(num_pairs),
        "qwk": stats.quadratic_weighted_kappa(predicted, reference),
        "exact": stats.exact_accuracy(predicted, reference),
        "within_1": stats.within_one(predicted, reference),
        "bias": stats.bias(predicted, reference),
    }
