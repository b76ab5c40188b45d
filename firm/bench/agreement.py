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

from firm import stats
from firm.records import SCORES, ConfusionMatrix, Judgement, Prediction, Prompt, Record, UserError

PointEstimate = Literal["score", "soft_score", "median"]
Metrics = dict[str, float | None]

METRICS = (
    "n", "num_valid", "soft_share", "coverage", "mae", "mae_low", "mae_high", "mae_penalised", "macro_mae", "skill",
    "spearman", "spearman_low", "spearman_high", "pairwise", "num_pairs", "qwk", "exact", "within_1", "bias",
    "constant_score", "constant_mae", *(f"constant_{s}_mae" for s in SCORES),
)  # fmt: skip
"""Names of the metrics of every `Group`; the gate's rules use them."""


class Expected(Record):
    """An example that the critic was asked to judge, without its images."""

    id: str
    dimension: str
    prompt: Prompt
    difficulty: str
    source: str
    human: int


class Group(Record):
    """Agreement on one group of examples.

    Attributes:
        dimension: Judged dimension.
        by: What the group was formed by; ``all`` is the whole dimension.
        value: Value of ``by``, for example the name of a source.
        metrics: See `METRICS`; None where a metric is undefined, for example without a single valid judgement. All but
            n, coverage, mae_penalised, skill and the constants are taken over the valid judgements.
        invalid: Failed judgements by reason; ``missing`` where there is no prediction at all.
        confusion: Counts of valid judgements [human - 1][predicted - 1].
    """

    dimension: str
    by: Literal["all", "source", "difficulty", "human"]
    value: str
    metrics: Metrics
    invalid: dict[str, int]
    confusion: list[list[int]]


class Agreement(Record):
    """Agreement by dimension, source, difficulty and human score."""

    estimate: PointEstimate
    groups: list[Group]

    @property
    def metrics(self) -> dict[tuple[str, str | None], Metrics]:
        """Metrics by (dimension, source), with source None for the whole dimension; the gate reads these."""
        return {
            (g.dimension, None if g.by == "all" else g.value): g.metrics
            for g in self.groups
            if g.by in ("all", "source")
        }

    def headline(self) -> dict[str, float]:
        """The defined metrics of whole dimensions as ``<dimension>_<metric>``, for `Summary.metrics`."""
        return {
            f"{g.dimension}_{name}": value
            for g in self.groups
            if g.by == "all"
            for name, value in g.metrics.items()
            if value is not None
        }

    def confusion(self, dimension: str) -> ConfusionMatrix | None:
        """Human scores against predicted ones over all examples of a dimension; None where it has none."""
        for group in self.groups:
            if group.by == "all" and group.dimension == dimension:
                return ConfusionMatrix(categories=[str(s) for s in SCORES], counts=group.confusion)
        return None

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of JSON scalars for `Summary.tables`: ``agreement``, ``invalid`` and ``confusion``."""
        wholes = [g for g in self.groups if g.by == "all"]
        return {
            "agreement": [{"dimension": g.dimension, "by": g.by, "value": g.value, **g.metrics} for g in self.groups],
            "invalid": [
                {"dimension": g.dimension, "reason": reason, "count": count}
                for g in wholes
                for reason, count in sorted(g.invalid.items())
            ],
            "confusion": [
                {
                    "dimension": g.dimension,
                    "human": s,
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
) -> Agreement:
    """Compare predictions with human scores.

    Args:
        predictions: Outcomes of the critic, at most one for each dimension and id.
        estimate: Point estimate of a judgement, see `point_estimate`.
        num_bootstrap: Resamples of the 95% intervals of ``mae`` and ``spearman``.
        seed: Seed of the resamples.
        expected: The examples that were to be judged. Those without a prediction count as ``missing``. Empty: exactly
            those that were predicted.

    Raises:
        UserError: An example judged twice, or a prediction for an example that is not expected.
    """
    rows = _rows(predictions, expected, estimate)
    groups = []
    for dimension in sorted({row.example.dimension for row in rows}):
        mine = [row for row in rows if row.example.dimension == dimension]
        groups.append(_group(dimension, "all", "all", mine, num_bootstrap, seed))
        splits: list[tuple[Literal["source", "difficulty", "human"], Callable[[Expected], str]]] = [
            ("source", lambda e: e.source),
            ("difficulty", lambda e: e.difficulty),
            ("human", lambda e: str(e.human)),
        ]
        for by, value_of in splits:
            for value in sorted({value_of(row.example) for row in mine}):
                part = [row for row in mine if value_of(row.example) == value]
                groups.append(_group(dimension, by, value, part, num_bootstrap, seed))
    return Agreement(estimate=estimate, groups=groups)


def _group(
    dimension: str,
    by: Literal["all", "source", "difficulty", "human"],
    value: str,
    rows: Sequence[_Row],
    num_bootstrap: int,
    seed: int,
) -> Group:
    valid = [(row.estimate, row.example.human) for row in rows if row.estimate is not None]
    predicted = np.array([p for p, _ in valid])
    human = np.array([h for _, h in valid])
    everyone = np.array([row.example.human for row in rows], dtype=float)
    worst = [max(row.example.human - 1, 5 - row.example.human) for row in rows if row.estimate is None]
    constant, constant_mae = stats.best_constant(everyone)
    # A missing judgement costs the largest possible error, so that leaving out hard examples gains nothing.
    penalised = float((np.abs(predicted - human).sum() + sum(worst)) / len(rows))
    metrics: Metrics = dict.fromkeys(METRICS)
    metrics |= {
        "n": float(len(rows)),
        "num_valid": float(len(valid)),
        "coverage": len(valid) / len(rows),
        "mae_penalised": penalised,
        "skill": 1 - penalised / constant_mae if constant_mae > 0 else None,
        "constant_score": float(constant),
        "constant_mae": constant_mae,
        **{f"constant_{s}_mae": float(m) for s, m in zip(SCORES, stats.constant_maes(everyone), strict=True)},
    }
    counts = np.zeros((5, 5), dtype=int)
    if valid:
        metrics["soft_share"] = sum(row.has_distribution for row in rows) / len(valid)
        prompts = [row.example.prompt for row in rows if row.estimate is not None]
        soft = np.array([row.soft for row in rows if row.soft is not None])
        metrics["pairwise"], number = stats.pairwise_accuracy(soft, human, prompts)
        metrics |= {"num_pairs": float(number)} | _valid_metrics(predicted, human, prompts, num_bootstrap, seed)
        counts = stats.confusion(predicted, human)
    invalid = Counter(row.reason for row in rows if row.estimate is None)
    return Group(
        dimension=dimension, by=by, value=value, metrics=metrics, invalid=dict(invalid), confusion=counts.tolist()
    )


def _valid_metrics(predicted: Any, human: Any, prompts: Sequence[Prompt], num_bootstrap: int, seed: int) -> Metrics:
    """Metrics over the valid judgements, arrays [num_valid]; intervals are clustered by prompt."""
    mae_low, mae_high = stats.mae_ci(predicted, human, num_bootstrap, seed, prompts)
    spearman = stats.spearman(predicted, human)
    interval = None if spearman is None else stats.spearman_ci(predicted, human, num_bootstrap, seed, prompts)
    spearman_low, spearman_high = interval or (None, None)
    return {
        "mae": stats.mae(predicted, human),
        "mae_low": mae_low,
        "mae_high": mae_high,
        "macro_mae": stats.macro_mae(predicted, human),
        "spearman": spearman,
        "spearman_low": spearman_low,
        "spearman_high": spearman_high,
        "qwk": stats.quadratic_weighted_kappa(predicted, human),
        "exact": stats.exact_accuracy(predicted, human),
        "within_1": stats.within_one(predicted, human),
        "bias": stats.bias(predicted, human),
    }
