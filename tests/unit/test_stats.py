"""Statistics against scipy, against definitions written out, and against numbers computed by hand."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from firm import intervals, stats

P, H = [1, 2, 3, 5, 4, 5], [1, 1, 3, 3, 5, 5]


def random_scores(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.integers(1, 6, n)
    return np.clip(reference + generator.integers(-2, 3, n), 1, 5), reference


def looped(
    arrays: tuple[np.ndarray, ...], statistic: Callable[..., float | None], num: int, seed: int, **by: Any
) -> Any:
    """The bootstrap as the textbook has it: the statistic of one resample after the other."""

    def estimate(weights: np.ndarray) -> list[float]:
        picks = [np.repeat(np.arange(len(row)), row.astype(int)) for row in weights]
        found = [statistic(*(array[pick] for array in arrays)) for pick in picks]
        return [np.nan if value is None else value for value in found]

    return intervals.interval(estimate, tuple(map(np.asarray, arrays)), num, seed, 0.95, **by)


def test_by_hand() -> None:
    assert stats.mae(P, H) == pytest.approx(4 / 6)
    assert stats.macro_mae(P, H) == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert stats.bias(P, H) == pytest.approx(2 / 6)
    assert stats.exact_accuracy(P, H) == pytest.approx(3 / 6)
    assert stats.within_one(P, H) == pytest.approx(5 / 6)
    assert stats.constant_maes(H).tolist() == pytest.approx([2, 10 / 6, 8 / 6, 10 / 6, 2])
    assert stats.best_constant(H) == (3, pytest.approx(8 / 6))


def test_the_paper_s_key_finding() -> None:
    """A constant 4 on FIRM-Bench's consistency (method.md 4.4), from the published histogram."""
    reference = np.repeat([5, 4, 3, 2, 1], [73, 83, 82, 14, 4])
    score, error = stats.best_constant(reference)
    assert (score, round(error, 3)) == (4, 0.762)
    assert round(stats.constant_maes(reference)[2], 3) == 0.980


def test_macro_mae_weighs_rare_scores_as_much_as_frequent_ones() -> None:
    reference, predicted = [5] * 99 + [1], [5] * 100
    assert stats.mae(predicted, reference) == pytest.approx(0.04) and stats.macro_mae(predicted, reference) == 2


def test_soft_scores() -> None:
    assert stats.nearest_score([1.49, 2.5, 4.5, 5.0]).tolist() == [1, 3, 5, 5]
    assert stats.exact_accuracy([4.4, 3.5], [4, 4]) == 1 and stats.within_one([4.0, 2.9], [5, 4]) == 0.5


def test_confusion() -> None:
    counts = stats.confusion(P, H)
    assert counts.shape == (5, 5) and counts.sum() == 6
    assert counts[0].tolist() == [1, 1, 0, 0, 0] and counts[2, 4] == 1 and counts[4].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipy_s(seed: int) -> None:
    p, h = random_scores(seed=seed)
    assert stats.spearman(p, h) == pytest.approx(scipy.stats.spearmanr(p, h).statistic)


def test_undefined_is_none_and_not_a_number() -> None:
    assert stats.spearman([4, 4, 4], [1, 2, 3]) is None and stats.spearman([1, 2], [3, 3]) is None
    assert stats.quadratic_weighted_kappa([4, 4], [4, 4]) is None
    assert stats.spearman_ci([4, 4, 4], [1, 2, 3], 20) is None


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_the_one_of_histograms(seed: int) -> None:
    p, h = random_scores(seed=seed)
    observed = stats.confusion(p, h) / len(p)
    chance = np.outer(observed.sum(1), observed.sum(0))
    weights = (np.arange(5)[:, None] - np.arange(5)[None, :]) ** 2
    expected = 1 - (weights * observed).sum() / (weights * chance).sum()
    assert stats.quadratic_weighted_kappa(p, h) == pytest.approx(expected)


def test_kappa_of_perfect_constant_and_opposite_answers() -> None:
    assert stats.quadratic_weighted_kappa([1, 5, 3], [1, 5, 3]) == 1
    assert stats.quadratic_weighted_kappa([3, 3, 3], [1, 5, 3]) == pytest.approx(0)
    assert stats.quadratic_weighted_kappa([5, 1], [1, 5]) == -1


def test_mean_ci_is_close_to_theory_and_deterministic() -> None:
    values = np.random.default_rng(1).normal(3, 1, 2000)
    mean, low, high = intervals.mean_ci(values, 2000, seed=3)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 2000**0.5
    assert (low, high) == (pytest.approx(mean - half, abs=0.006), pytest.approx(mean + half, abs=0.006))
    assert intervals.mean_ci(values, 2000, seed=3) == (mean, low, high) != intervals.mean_ci(values, 2000, seed=4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        _, low, high = intervals.mean_ci(generator.normal(0, 1, 60), 300, seed, level=0.9)
        covered += low <= 0 <= high
    assert 0.83 <= covered / 200 <= 0.96


def test_vectorised_and_looped_statistics_agree() -> None:
    p, h = random_scores(60)
    assert looped((p, h), stats.spearman, 50, 0) == pytest.approx(stats.spearman_ci(p, h, 50, 0))
    assert looped((p, h), stats.mae, 50, 0) == pytest.approx(stats.mae_ci(p, h, 50, 0))


def test_an_interval_by_clusters_is_as_wide_as_that_of_the_means_of_clusters() -> None:
    """40 prompts of 8 images whose scores differ by prompt only: 40 things were seen, not 320."""
    means = np.random.default_rng(2).normal(3, 1, 40)
    values, prompts = np.repeat(means, 8), np.repeat(np.arange(40), 8).tolist()
    naive, honest, truth = (
        intervals.mean_ci(values, seed=1),
        intervals.mean_ci(values, seed=1, clusters=prompts),
        intervals.mean_ci(means, seed=1),
    )
    assert honest == pytest.approx(truth)
    assert (honest[2] - honest[1]) / (naive[2] - naive[1]) == pytest.approx(8**0.5, rel=0.15)


def test_a_paired_interval_is_students_of_the_means_of_clusters() -> None:
    generator = np.random.default_rng(0)
    differences = np.repeat(generator.normal(0.3, 1, 40), 3) + generator.normal(0, 0.1, 120)
    differences[7] = np.nan  # leaves out the pair and not its cluster
    prompts = [i // 3 for i in range(120)]
    means = np.nanmean(differences.reshape(40, 3), axis=1)
    expected = scipy.stats.t.interval(0.98, 39, means.mean(), scipy.stats.sem(means))
    assert intervals.paired_interval(differences, prompts, 0.01) == pytest.approx(expected)


@pytest.mark.parametrize("error", [0.05, 0.005])
def test_a_paired_interval_misses_as_rarely_as_it_says(error: float) -> None:
    """Differences of whole scores, most of them 0, as between two audits."""
    generator = np.random.default_rng(1)
    upper = 0
    for _ in range(4000):
        found = intervals.paired_interval(
            generator.choice([-2, -1, 0, 1, 2], 200, p=[0.05, 0.1, 0.7, 0.1, 0.05]), range(200), error
        )
        upper += found is not None and found[1] < 0
    assert upper / 4000 == pytest.approx(error, abs=3 * (error / 4000) ** 0.5)


def test_a_paired_interval_of_few_clusters_is_unknown() -> None:
    assert intervals.paired_interval([-1.0] * 6, range(6), 0.02) == (-1, -1)
    assert intervals.paired_interval([-1.0] * 6, range(6), 0.01) is None  # as likely as six heads
    assert intervals.paired_interval([-1.0] * 60, [i % 5 for i in range(60)], 0.02) is None
    assert intervals.paired_interval([-1.0] * 5 + [np.nan] * 55, range(60), 0.02) is None
    assert intervals.paired_interval([np.nan], ["a"], 0.4) is None


def test_clusters_of_one_change_nothing_and_unequal_ones_weigh_what_they_hold() -> None:
    p, h = random_scores(60)
    names = [f"prompt {i}" for i in range(60)]
    assert stats.spearman_ci(p, h, 50, 0, clusters=names) == stats.spearman_ci(p, h, 50, 0)
    labels = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    found = looped((p, h), stats.spearman, 50, 0, clusters=labels)
    assert found == pytest.approx(stats.spearman_ci(p, h, 50, 0, clusters=labels))
    assert stats.spearman_ci(p, h, 50, 0, clusters=["a"] * 60) is None, "one prompt, and so one witness"
    assert stats.skill_ci(np.abs(p - h), h, 50, 0, ["a"] * 60) is None
    assert intervals.mean_ci([1.0] * 30 + [0.0] * 10, 500, clusters=["a"] * 30 + ["b"] * 10)[1:] == (0, 1)
    with pytest.raises(ValueError, match="a cluster for each of 3"):
        intervals.mean_ci([1.0, 2.0, 3.0], clusters=["a"])


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p, h = random_scores(50)
    whole = stats.spearman_ci(p, h, 40, 0)
    monkeypatch.setattr(intervals, "_CHUNK", 120)
    assert stats.spearman_ci(p, h, 40, 0) == whole


def test_it_is_fast() -> None:
    p, h = random_scores(2000)
    start = time.process_time()
    stats.mae_ci(p, h, 1000)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("function", [stats.mae, stats.macro_mae, stats.spearman, stats.bias, stats.confusion])
@pytest.mark.parametrize("values", [([], []), ([1, 2], [1]), ([np.nan], [1]), ([np.inf], [1]), ([[1]], [[1]])])
def test_impossible_input_is_refused(function: Callable[..., object], values: tuple[list, list]) -> None:
    with pytest.raises(ValueError, match=r"1-D arrays|finite"):
        function(*values)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_resamples"):
        intervals.mean_ci([1.0], 0)
    with pytest.raises(ValueError, match="level"):
        intervals.mean_ci([1.0], level=1.0)


def test_pairwise_accuracy_is_within_a_prompt_and_ties_count_half() -> None:
    reference = [1, 2, 3, 5, 5]
    prompts = ["a", "a", "a", "b", "b"]  # b has no unequal pair
    assert stats.pairwise_accuracy([1.1, 2.2, 3.3, 4, 2], reference, prompts) == (1.0, 3)
    assert stats.pairwise_accuracy([3, 2, 1, 4, 2], reference, prompts) == (0.0, 3)
    assert stats.pairwise_accuracy([2, 2, 2, 4, 2], reference, prompts) == (0.5, 3)
    assert stats.pairwise_accuracy([1, 3, 2, 4, 2], reference, prompts) == (pytest.approx(2 / 3), 3)
    assert stats.pairwise_accuracy([4, 2], [5, 5], ["b", "b"]) == (None, 0)
    assert stats.pairwise_accuracy([1, 2], [1, 2], ["a", "b"]) == (None, 0)


def test_a_critic_that_knows_only_the_prompt_ranks_by_chance() -> None:
    """Its correlation over all images is high, and it is worth nothing as a reward of group-relative RL."""
    generator = np.random.default_rng(0)
    easy = np.repeat(generator.integers(1, 5, 100), 6)
    reference = easy + generator.integers(0, 2, 600)
    prompts = np.repeat(np.arange(100), 6).tolist()
    accuracy, number = stats.pairwise_accuracy(easy, reference, prompts)
    assert (stats.spearman(easy, reference) or 0) > 0.8 and accuracy == 0.5 and number > 500


def test_the_best_constant_of_means_of_raters_is_their_median() -> None:
    reference = [1, 2.5, 3.5, 4.5, 4.5]
    errors = {c: stats.mae([c] * 5, reference) for c in np.arange(1, 5.01, 0.25)}
    assert stats.best_constant(reference) == (3.5, pytest.approx(min(errors.values())))
    assert stats.best_constant([1, 2, 4, 5])[0] == 2, "the lower one on a tie"


def test_skill_is_paired_with_the_best_constant_of_each_resample() -> None:
    p, r = random_scores(80)
    prompts = np.repeat(np.arange(20), 4).tolist()

    def skill(errors: np.ndarray, reference: np.ndarray) -> float:
        return 1 - errors.mean() / stats.best_constant(reference)[1]

    errors = np.abs(p - r)
    found = looped((errors, r), skill, 60, 3, clusters=prompts)
    assert stats.skill_ci(errors, r, 60, 3, prompts) == pytest.approx(found)
    low, high = stats.skill_ci(np.abs(3 - r), r, 60, 3, prompts) or (1, 1)
    assert low <= high <= 0, "no constant beats the best one"
    assert stats.skill_ci([0, 0], [4, 4]) is None


def test_the_interval_of_pairs_resamples_prompts() -> None:
    p, r = random_scores(90)
    prompts = np.repeat(np.arange(30), 3)
    interval = stats.pairwise_ci(p, r, prompts.tolist(), 40, 5)
    generator = np.random.default_rng(5)
    picks = generator.integers(0, 30, (40, 30))
    shares = []
    for pick in picks:  # a prompt drawn twice is two prompts
        rows = np.concatenate([np.flatnonzero(prompts == k) for k in pick])
        shares.append(stats.pairwise_accuracy(p[rows], r[rows], np.repeat(np.arange(30), 3).tolist())[0])
    assert interval == pytest.approx(np.quantile(shares, [0.025, 0.975]))
    assert stats.pairwise_ci([1, 2], [3, 3], ["a", "a"]) is None


def test_intervals_of_2000_examples_take_well_under_a_second() -> None:
    p, r = random_scores(2000)
    prompts = (np.arange(2000) % 34).tolist()
    start = time.process_time()
    stats.skill_ci(np.abs(p - r), r, 1000, 0, prompts)
    stats.pairwise_ci(p, r, prompts, 1000, 0)
    assert time.process_time() - start < 0.6
