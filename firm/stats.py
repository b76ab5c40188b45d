"""Statistics of agreement between predicted scores p and reference scores r, with their bootstrap intervals.

Scores lie in [1, 5]; p may be soft (expectations), and r the mean of several raters. All functions are pure, take 1-D
arrays of the same length N >= 1 and raise ValueError for empty, unequal or non-finite input. If a statistic is
undefined, such as the correlation with a constant, the result is None and never a number mistaken for one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from firm.intervals import Floats, arrays_of, interval, labels_of, mean_ci, ratio


def nearest_score(predicted: ArrayLike) -> NDArray[np.int64]:
    """Whole score 1..5 nearest to a soft one; halves go up, 2.5 -> 3."""
    (p,) = arrays_of(predicted)
    return np.clip(np.floor(p + 0.5), 1, 5).astype(np.int64)


def mae(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Mean absolute error, mean(abs(p - r)), in [0, 4]; lower is better."""
    p, r = arrays_of(predicted, reference)
    return float(np.abs(p - r).mean())


def macro_mae(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Mean of the MAE of each (rounded) reference score, in [0, 4]: every score weighs the same, however rare it is."""
    p, r = arrays_of(predicted, reference)
    rounded = nearest_score(r)
    return float(np.mean([np.abs(p - r)[rounded == score].mean() for score in np.unique(rounded)]))


def constant_maes(reference: ArrayLike) -> Floats:
    """MAE of always answering 1, 2, 3, 4, 5: shape [5], each in [0, 4]. What a critic must beat."""
    (r,) = arrays_of(reference)
    return np.abs(np.arange(1, 6)[:, None] - r[None, :]).mean(axis=1)


def best_constant(reference: ArrayLike) -> tuple[float, float]:
    """The constant answer with the lowest MAE (the lower one on a tie), and that MAE; whole if the scores are."""
    (r,) = arrays_of(reference)
    median = float(np.sort(r)[(r.size - 1) // 2])
    return median, float(np.abs(r - median).mean())


def _constant_errors(weights: Floats, values: Floats) -> Floats:
    """Summed error of each constant answer [R, U] to values [N] drawn as often as ``weights`` [R, N] say.

    One of the U distinct values, sorted, is a median and so a best constant.
    """
    distinct = np.unique(values)
    errors: Floats = _counts(weights, values) @ np.abs(distinct[:, None] - distinct)
    return errors


def exact_accuracy(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Share of predictions whose nearest whole score is that of the reference, in [0, 1]."""
    p, r = arrays_of(predicted, reference)
    return float((nearest_score(p) == nearest_score(r)).mean())


def within_one(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Share with abs(p - r) <= 1, in [0, 1]."""
    p, r = arrays_of(predicted, reference)
    return float((np.abs(p - r) <= 1 + 1e-9).mean())


def bias(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Signed error mean(p - r), in [-4, 4]; positive for a lenient critic."""
    p, r = arrays_of(predicted, reference)
    return float((p - r).mean())


def confusion(predicted: ArrayLike, reference: ArrayLike) -> NDArray[np.int64]:
    """Counts [5, 5]: row = nearest whole reference score - 1, column = nearest whole predicted score - 1."""
    p, r = arrays_of(predicted, reference)
    counts = np.zeros((5, 5), dtype=np.int64)
    np.add.at(counts, (nearest_score(r) - 1, nearest_score(p) - 1), 1)
    return counts


def spearman(predicted: ArrayLike, reference: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties by average rank, in [-1, 1]; None if either side is constant."""
    a, b = (rankdata(values) - (values.size + 1) / 2 for values in arrays_of(predicted, reference))
    value = float(ratio(a @ b, np.sqrt((a @ a) * (b @ b))))
    return value if np.isfinite(value) else None


def quadratic_weighted_kappa(predicted: ArrayLike, reference: ArrayLike) -> float | None:
    """Cohen's kappa with quadratic weights, 1 - mean_i (p_i - h_i)^2 / mean_ij (p_i - h_j)^2, in [-1, 1].

    On whole scores this is the usual definition by histograms; it also holds for soft ones. The denominator is
    var(p) + var(r) + (mean(p) - mean(r))^2. None where it is 0 (both sides the same constant).
    """
    p, r = arrays_of(predicted, reference)
    chance = p.var() + r.var() + (p.mean() - r.mean()) ** 2
    return float(1 - ((p - r) ** 2).mean() / chance) if chance > 0 else None


def pairwise_accuracy(
    predicted: ArrayLike, reference: ArrayLike, clusters: Sequence[Hashable]
) -> tuple[float | None, int]:
    """How well images of the same prompt are ranked, which is all that group-relative RL uses of a critic.

    Args:
        predicted: Predicted scores [N]; equal ones count half.
        reference: Reference scores [N].
        clusters: Prompt of each example (N).

    Returns:
        Share, in [0, 1], of the pairs of one prompt with unequal reference scores that are ranked alike (chance: 0.5;
        None without such pairs), and the number of these pairs.
    """
    agreed, pairs = _ranked_pairs(predicted, reference, clusters)
    number = int(pairs.sum())
    return (float(agreed.sum() / number) if number else None), number


def _ranked_pairs(predicted: ArrayLike, reference: ArrayLike, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """For each of C clusters: pairs ranked alike [C], ties counted half, and pairs with unequal references [C]."""
    p, r = arrays_of(predicted, reference)
    labels = labels_of(clusters, p.size)
    order = labels.argsort(kind="stable")
    counts = []
    for mine in np.split(order, np.bincount(labels).cumsum()[:-1]):
        difference = np.sign(r[mine][:, None] - r[mine])
        alike = np.sign(p[mine][:, None] - p[mine]) * difference
        pairs = np.abs(difference).sum() / 2
        counts.append((alike.sum() / 4 + pairs / 2, pairs))
    agreed, number = np.array(counts).T
    return agreed, number


def skill_ci(
    errors: ArrayLike,
    reference: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """95% bootstrap interval of the skill, 1 - mean(errors) / (MAE of the best constant on the same examples).

    Args:
        errors: Absolute error of each example [N], in [0, 4].
        reference: Reference scores [N]: every resample has a best constant of its own.
        num_resamples: Number of resamples.
        seed: Seed of the resampling.
        clusters: As for `firm.intervals.interval`.

    Returns:
        None where a constant is always right.
    """
    e, r = arrays_of(errors, reference)

    def skill(weights: Floats) -> Floats:
        return 1 - ratio(weights @ e, _constant_errors(weights, r).min(axis=-1))

    return interval(skill, (e, r), num_resamples, seed, 0.95, clusters)


def pairwise_ci(
    predicted: ArrayLike,
    reference: ArrayLike,
    clusters: Sequence[Hashable],
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95% bootstrap interval of `pairwise_accuracy`, whose pairs lie within clusters; None where it is undefined."""
    agreed, pairs = _ranked_pairs(predicted, reference, clusters)
    return interval(lambda weights: ratio(weights @ agreed, weights @ pairs), (pairs,), num_resamples, seed, 0.95)


def _counts(weights: Floats, values: Floats) -> Floats:
    """How often each of U distinct values was drawn [R, U]."""
    order = values.argsort(kind="stable")
    starts = np.unique(values[order], return_index=True)[1]
    counts: Floats = np.add.reduceat(weights[:, order], starts, axis=-1)
    return counts


def _weighted_ranks(weights: Floats, values: Floats) -> Floats:
    """Ranks [R, N] of values [N] among those drawn as often as ``weights`` [R, N] say, ties by average rank."""
    _, group = np.unique(values, return_inverse=True)
    in_group = _counts(weights, values)
    return (np.cumsum(in_group, axis=-1) - in_group / 2 + 0.5)[:, group]


def _weighted_spearman(weights: Floats, p: Floats, r: Floats) -> Floats:
    total = weights.sum(axis=-1, keepdims=True)
    a, b = (_weighted_ranks(weights, values) for values in (p, r))
    a, b = (ranks - (weights * ranks).sum(axis=-1, keepdims=True) / total for ranks in (a, b))
    scale = np.sqrt((weights * a * a).sum(axis=-1) * (weights * b * b).sum(axis=-1))
    return ratio((weights * a * b).sum(axis=-1), scale)


def mae_ci(
    predicted: ArrayLike,
    reference: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """95% bootstrap interval of `mae`."""
    p, r = arrays_of(predicted, reference)
    return mean_ci(np.abs(p - r), num_resamples, seed, clusters=clusters)[1:]


def spearman_ci(
    predicted: ArrayLike,
    reference: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """95% bootstrap interval of `spearman`; None where it is undefined."""
    p, r = arrays_of(predicted, reference)
    return interval(lambda weights: _weighted_spearman(weights, p, r), (p, r), num_resamples, seed, 0.95, clusters)
