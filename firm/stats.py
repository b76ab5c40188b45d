"""Statistics of agreement between predicted scores p and human scores h, and their bootstrap intervals.

Scores lie in [1, 5]; h are whole numbers, p may be soft (expectations). All functions are pure, take 1-D arrays of the
same length N >= 1 and raise ValueError for empty, unequal or non-finite input. If a statistic is undefined, such as
the correlation with a constant, the result is None and never a number that could be mistaken for one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Statistic = Callable[..., Any]
_CHUNK = 1_000_000  # elements of a block of resamples, about 8 MB an array


def _arrays(*values: ArrayLike) -> tuple[Floats, ...]:
    arrays = tuple(np.asarray(v, dtype=np.float64) for v in values)
    for array in arrays:
        if array.ndim != 1 or not array.size or array.shape != arrays[0].shape:
            shapes = [a.shape for a in arrays]
            raise ValueError(f"expected 1-D arrays of the same length, at least 1, got shapes {shapes}")
        if not np.isfinite(array).all():
            raise ValueError("values must be finite: leave failed judgements out and count them")
    return arrays


def nearest_score(predicted: ArrayLike) -> NDArray[np.int64]:
    """Whole score 1..5 nearest to a soft one; halves go up, 2.5 -> 3."""
    (p,) = _arrays(predicted)
    return np.clip(np.floor(p + 0.5), 1, 5).astype(np.int64)


def mae(predicted: ArrayLike, human: ArrayLike) -> float:
    """Mean absolute error, mean(abs(p - h)), in [0, 4]; lower is better."""
    p, h = _arrays(predicted, human)
    return float(np.abs(p - h).mean())


def macro_mae(predicted: ArrayLike, human: ArrayLike) -> float:
    """Mean of the MAE of each human score that occurs, in [0, 4]: every score weighs the same, however rare it is."""
    p, h = _arrays(predicted, human)
    return float(np.mean([np.abs(p - h)[h == score].mean() for score in np.unique(h)]))


def constant_maes(human: ArrayLike) -> Floats:
    """MAE of always answering 1, 2, 3, 4, 5: shape [5], each in [0, 4]. What a critic must beat."""
    (h,) = _arrays(human)
    return np.abs(np.arange(1, 6)[:, None] - h[None, :]).mean(axis=1)


def best_constant(human: ArrayLike) -> tuple[int, float]:
    """The constant answer in 1..5 with the lowest MAE, and that MAE (the lower constant on a tie)."""
    maes = constant_maes(human)
    best = int(maes.argmin())
    return best + 1, float(maes[best])


def exact_accuracy(predicted: ArrayLike, human: ArrayLike) -> float:
    """Share of predictions whose nearest whole score is the human one, in [0, 1]."""
    p, h = _arrays(predicted, human)
    return float((nearest_score(p) == h).mean())


def within_one(predicted: ArrayLike, human: ArrayLike) -> float:
    """Share with abs(p - h) <= 1, in [0, 1]."""
    p, h = _arrays(predicted, human)
    return float((np.abs(p - h) <= 1 + 1e-9).mean())


def bias(predicted: ArrayLike, human: ArrayLike) -> float:
    """Signed error mean(p - h), in [-4, 4]; positive for a lenient critic."""
    p, h = _arrays(predicted, human)
    return float((p - h).mean())


def confusion(predicted: ArrayLike, human: ArrayLike) -> NDArray[np.int64]:
    """Counts [5, 5]: row = human score - 1, column = nearest whole predicted score - 1."""
    p, h = _arrays(predicted, human)
    counts = np.zeros((5, 5), dtype=np.int64)
    np.add.at(counts, (nearest_score(h) - 1, nearest_score(p) - 1), 1)
    return counts


def _row_spearman(p: Floats, h: Floats) -> Floats:
    """Rank correlation along the last axis; NaN where one side is constant."""
    a = rankdata(p, axis=-1)
    b = rankdata(h, axis=-1)
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    defined = scale > 0
    return np.where(defined, (a * b).sum(axis=-1) / np.where(defined, scale, 1.0), np.nan)


def spearman(predicted: ArrayLike, human: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties by average rank, in [-1, 1]; None if either side is constant."""
    p, h = _arrays(predicted, human)
    value = float(_row_spearman(p, h))
    return value if np.isfinite(value) else None


def quadratic_weighted_kappa(predicted: ArrayLike, human: ArrayLike) -> float | None:
    """Cohen's kappa with quadratic weights, 1 - mean_i (p_i - h_i)^2 / mean_ij (p_i - h_j)^2, in [-1, 1].

    On whole scores this is the usual definition by histograms; it also holds for soft ones. The denominator is
    var(p) + var(h) + (mean(p) - mean(h))^2. None where it is 0 (both sides the same constant).
    """
    p, h = _arrays(predicted, human)
    chance = p.var() + h.var() + (p.mean() - h.mean()) ** 2
    return float(1 - ((p - h) ** 2).mean() / chance) if chance > 0 else None


def pairwise_accuracy(predicted: ArrayLike, human: ArrayLike, clusters: Sequence[Hashable]) -> tuple[float | None, int]:
    """How well images of the same prompt are ranked, which is all that group-relative RL uses of a critic.

    Args:
        predicted: Predicted scores [N]; equal ones count half.
        human: Reference scores [N].
        clusters: Prompt of each example (N).

    Returns:
        Share, in [0, 1], of the pairs of one prompt with unequal reference scores that are ranked alike (chance: 0.5;
        None without such pairs), and the number of these pairs.
    """
    p, h = _arrays(predicted, human)
    labels = _labels(clusters, p.size)
    agreed = 0.0
    number = 0
    for label in np.unique(labels):
        mine = labels == label
        signs = np.sign(p[mine][:, None] - p[mine]) * np.sign(h[mine][:, None] - h[mine])
        unequal = np.triu(h[mine][:, None] != h[mine], 1)
        agreed += float((signs[unequal] + 1).sum() / 2)
        number += int(unequal.sum())
    return (agreed / number if number else None), number


def bootstrap_ci(
    values: ArrayLike | tuple[ArrayLike, ...],
    statistic: Statistic | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval; resamples whole examples, so paired arrays stay paired.

    Args:
        values: One array [N], or a tuple of paired arrays [N] each.
        statistic: Function of as many arrays [N] as given, which returns a number or None. None: the mean of the one
            array.
        num_resamples: Number of resamples.
        seed: Seed of the resampling; the same seed gives the same interval.
        level: Coverage in (0, 1).
        clusters: What each example belongs to, such as its prompt (N): whole clusters are resampled, since examples of
            one cluster tell less than as many independent ones. None: each is its own.

    Returns:
        The lower and upper end, or None if the statistic is undefined on more than half of the resamples.
    """
    arrays = _arrays(*values) if isinstance(values, tuple) else _arrays(values)
    if statistic is None:
        return _interval(
            lambda weights: _weighted_mean(weights, arrays[0]), arrays, num_resamples, seed, level, clusters
        )

    def looped(weights: Floats) -> list[float]:
        picks = [np.repeat(np.arange(len(row)), row.astype(int)) for row in weights]
        results = [statistic(*(array[pick] for array in arrays)) for pick in picks]
        return [np.nan if result is None else result for result in results]

    return _interval(looped, arrays, num_resamples, seed, level, clusters)


def paired_interval(differences: ArrayLike, clusters: Sequence[Hashable], error: float) -> tuple[float, float] | None:
    """Student's interval of the mean of paired differences, which holds far out in the tails, where resampling cannot.

    Args:
        differences: After minus before [N]; NaN where either failed, which leaves the pair out.
        clusters: What each pair belongs to, such as its prompt (N): differences are averaged within it first.
        error: Chance that the mean lies below the lower end, and that it lies above the upper one, in (0, 0.5).

    Returns:
        The lower and upper end. None with so few clusters that this could not be told even if all had the same sign.
    """
    values = np.asarray(differences, dtype=np.float64)
    labels = _labels(clusters, values.size)
    valid = np.isfinite(values)
    counts = np.bincount(labels[valid])
    means = np.bincount(labels[valid], values[valid])[counts > 0] / counts[counts > 0]
    if means.size < 2 or 0.5**means.size > error:
        return None
    half = float(-stdtrit(means.size - 1, error) * means.std(ddof=1) / np.sqrt(means.size))
    return float(means.mean()) - half, float(means.mean()) + half


def _interval(
    estimate: Callable[[Floats], ArrayLike],
    arrays: tuple[Floats, ...],
    num_resamples: int,
    seed: int,
    level: float,
    clusters: Sequence[Hashable] | None,
) -> tuple[float, float] | None:
    """Interval of an estimate that takes blocks of how often each example was drawn [R, N] and returns [R]."""
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"need num_resamples >= 1 and 0 < level < 1, got {num_resamples} and {level}")
    estimates = np.empty(num_resamples)
    for rows, weights in _resamples(_labels(clusters, arrays[0].size), num_resamples, seed):
        estimates[rows] = estimate(weights)
    defined = estimates[np.isfinite(estimates)]
    if 2 * defined.size < num_resamples:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _labels(clusters: Sequence[Hashable] | None, size: int) -> NDArray[np.int64]:
    """Number of each example's cluster [N]."""
    if clusters is None:
        return np.arange(size)
    if len(clusters) != size:
        raise ValueError(f"expected a cluster for each of {size} examples, got {len(clusters)}")
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[cluster] for cluster in clusters])


def _resamples(labels: NDArray[np.int64], num_resamples: int, seed: int) -> Iterator[tuple[slice, Floats]]:
    """Blocks of how often each example was drawn [R, N] with the rows they belong to, in constant memory."""
    generator = np.random.default_rng(seed)
    number = int(labels.max()) + 1
    block = max(1, _CHUNK // labels.size)
    for start in range(0, num_resamples, block):
        stop = min(start + block, num_resamples)
        picks = generator.integers(0, number, (stop - start, number))
        offsets = np.arange(stop - start)[:, None] * number
        counts = np.bincount((picks + offsets).ravel(), minlength=(stop - start) * number).reshape(stop - start, number)
        yield slice(start, stop), counts[:, labels].astype(np.float64)


def _weighted_mean(weights: Floats, values: Floats) -> Floats:
    return weights @ values / weights.sum(axis=-1)


def _weighted_ranks(weights: Floats, values: Floats) -> Floats:
    """Ranks [R, N] of values [N] among those drawn as often as ``weights`` [R, N] say, ties by average rank."""
    _, group = np.unique(values, return_inverse=True)
    one_hot = np.zeros((values.size, int(group.max()) + 1))
    one_hot[np.arange(values.size), group] = 1
    in_group = weights @ one_hot  # [R, U]
    return (np.cumsum(in_group, axis=-1) - in_group / 2 + 0.5)[:, group]


def _weighted_spearman(weights: Floats, p: Floats, h: Floats) -> Floats:
    total = weights.sum(axis=-1, keepdims=True)
    a, b = (_weighted_ranks(weights, values) for values in (p, h))
    a, b = (ranks - (weights * ranks).sum(axis=-1, keepdims=True) / total for ranks in (a, b))
    scale = np.sqrt((weights * a * a).sum(axis=-1) * (weights * b * b).sum(axis=-1))
    defined = scale > 1e-9
    return np.where(defined, (weights * a * b).sum(axis=-1) / np.where(defined, scale, 1.0), np.nan)


def mean_ci(
    values: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """Mean of an array [N] with its bootstrap interval: (mean, low, high); ``clusters`` as for `bootstrap_ci`."""
    (array,) = _arrays(values)
    interval = bootstrap_ci(array, None, num_resamples, seed, level, clusters)
    mean = float(array.mean())
    return (mean, *interval) if interval else (mean, mean, mean)


def mae_ci(
    predicted: ArrayLike,
    human: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """95% bootstrap interval of `mae`."""
    p, h = _arrays(predicted, human)
    return mean_ci(np.abs(p - h), num_resamples, seed, clusters=clusters)[1:]


def spearman_ci(
    predicted: ArrayLike,
    human: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """95% bootstrap interval of `spearman`; None where it is undefined."""
    p, h = _arrays(predicted, human)
    return _interval(lambda weights: _weighted_spearman(weights, p, h), (p, h), num_resamples, seed, 0.95, clusters)
