"""Balancing follows the target, never repeats more than allowed, and depends on the seed only."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from firm.curation.balance import balance, histogram

SCORES = st.lists(st.none() | st.integers(1, 5), max_size=60)
TARGET = st.dictionaries(st.integers(1, 5), st.floats(0, 4, allow_subnormal=False).filter(lambda w: w == 0 or w > 0.01))
FLAT = {s: 1.0 for s in range(1, 6)}


@given(SCORES, TARGET, st.floats(0.1, 4), st.floats(0, 1), st.integers(0, 9))
def test_what_is_chosen(
    scores: list[int | None], target: dict[int, float], oversample: float, share: float, seed: int
) -> None:
    chosen = balance(scores, target, oversample, share, seed)
    assert chosen == sorted(chosen) == balance(scores, target, oversample, share, seed)
    uses = Counter(chosen)
    assert all(target.get(scores[i] or 0, 0) > 0 for i in uses)  # valid, and wanted
    assert all(n <= math.ceil(oversample + 0.5) for n in uses.values())
    sizes, there = Counter(scores[i] for i in chosen), Counter(scores)
    wanted = {s: w for s, w in target.items() if w > 0 and there[s]}
    for s, w in wanted.items():
        assert sizes[s] <= there[s] * oversample * share + 0.5 + 1e-9
        for other, v in wanted.items():  # in the ratio of the target, up to rounding
            assert abs(sizes[s] / w - sizes[other] / v) <= 0.5 / w + 0.5 / v + 1e-6
    for s in wanted:  # items of one score are used equally often
        times = [uses[i] for i, score in enumerate(scores) if score == s]
        assert max(times) - min(times) <= 1


@given(SCORES, st.integers(0, 9))
def test_without_oversampling_nothing_comes_twice_and_the_scarcest_score_is_used_up(
    scores: list[int | None], seed: int
) -> None:
    chosen, there = balance(scores, FLAT, 1, 1, seed), Counter(s for s in scores if s is not None)
    assert len(set(chosen)) == len(chosen) == (min(there.values()) * len(there) if there else 0)


def test_the_seed_chooses_among_plentiful_items() -> None:
    scores: list[int | None] = [*[1] * 5, *[2] * 100]
    assert len({tuple(balance(scores, FLAT, 1, 1, seed)) for seed in range(5)}) == 5
    assert Counter(balance(scores, FLAT, 3, 1, 0))[0] == 3


@given(SCORES)
def test_the_histogram_counts_every_item(scores: list[int | None]) -> None:
    counts = histogram(scores)
    assert sum(counts.values()) == len(scores) and counts["invalid"] == scores.count(None)
    assert [counts[str(s)] for s in range(1, 6)] == [scores.count(s) for s in range(1, 6)]
