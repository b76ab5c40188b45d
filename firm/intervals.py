"""Intervals of statistics: by the bootstrap, which draws whole examples or clusters of them, and Student's.

As in `firm.stats`, arrays are 1-D, of the same length N >= 1 and finite, or a ValueError is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
_CHUNK = 1_000_000  # elements of a block of resamples, about 8 MB an array


def arrays_of(*values: ArrayLike) -> tuple[Floats, ...]:
    """Check paired values and give them as arrays [N] each."""
    arrays = tuple(np.asarray(v, dtype=np.float64) for v in values)
    for array in arrays:
        if array.ndim != 1 or not array.size or array.shape != arrays[0].shape:
            shapes = [a.shape for a in arrays]
            raise ValueError(f"expected 1-D arrays of the same length, at least 1, got shapes {shapes}")
        if not np.isfinite(array).all():
            raise ValueError("values must be finite: leave failed judgements out and count them")
    return arrays


def mean_ci(
    values: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """Mean of an array [N] with its bootstrap interval: (mean, low, high); arguments as for `interval`."""
    (array,) = arrays_of(values)
    ends = interval(lambda weights: _weighted_mean(weights, array), (array,), num_resamples, seed, level, clusters)
    mean = float(array.mean())
    return (mean, *ends) if ends else (mean, mean, mean)


def interval(
    estimate: Callable[[Floats], ArrayLike],
    arrays: tuple[Floats, ...],
    num_resamples: int,
    seed: int,
    level: float,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval; resamples whole examples, so paired arrays stay paired.

    Args:
        estimate: Takes how often each example was drawn, blocks [R, N], and returns [R]; NaN where it is undefined.
        arrays: What it is made of [N] each.
        num_resamples: Number of resamples.
        seed: Seed of the resampling; the same seed gives the same interval.
        level: Coverage in (0, 1).
        clusters: What each example belongs to, such as its prompt (N): whole clusters are resampled, since examples of
            one cluster tell less than as many independent ones. None: each is its own.

    Returns:
        The lower and upper end. None if the estimate is undefined on more than half of the resamples, or if there is
        only one cluster, of which all resamples are alike.
    """
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"need num_resamples >= 1 and 0 < level < 1, got {num_resamples} and {level}")
    labels = labels_of(clusters, arrays[0].size)
    if labels.max() == 0:
        return None
    estimates = np.empty(num_resamples)
    for rows, weights in _resamples(labels, num_resamples, seed):
        estimates[rows] = estimate(weights)
    defined = estimates[np.isfinite(estimates)]
    if 2 * defined.size < num_resamples:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def labels_of(clusters: Sequence[Hashable] | None, size: int) -> NDArray[np.int64]:
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


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is 0."""
    defined = denominator > 1e-9
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


def _weighted_mean(weights: Floats, values: Floats) -> Floats:
    return weights @ values / weights.sum(axis=-1)


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
    labels = labels_of(clusters, values.size)
    valid = np.isfinite(values)
    counts = np.bincount(labels[valid])
    means = np.bincount(labels[valid], values[valid])[counts > 0] / counts[counts > 0]
    if means.size < 2 or 0.5**means.size > error:
        return None
    half = float(-stdtrit(means.size - 1, error) * means.std(ddof=1) / np.sqrt(means.size))
    return float(means.mean()) - half, float(means.mean()) + half
