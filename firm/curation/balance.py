"""Score balancing: choose examples so that the scores follow a target histogram."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from firm.seeds import seed_for


def balance(
    scores: Sequence[int | None], target: Mapping[int, float], oversample: float, share: float, seed: int
) -> list[int]:
    """Indices of chosen items, in order; an index comes more than once where a scarce score is repeated.

    The scarcest score, repeated up to ``oversample`` times, sets the size; ``share`` scales it down.

    Args:
        scores: Score 1..5 of each item, None for items without a valid judgement (never chosen).
        target: Wanted ratio of each score; scores with ratio 0 or without items are left out.
        oversample: How often an item may be used at most (1: never twice).
        share: Part of the balanced set that is kept, 0..1.
        seed: Which items of a plentiful score are kept.
    """
    by_score: dict[int, list[int]] = defaultdict(list)
    for index, score in enumerate(scores):
        if score is not None:
            by_score[score].append(index)
    wanted = {s: w for s, w in target.items() if w > 0 and by_score.get(s)}
    if not wanted:
        return []
    size = min(len(by_score[s]) * oversample / w for s, w in wanted.items()) * share
    chosen: list[int] = []
    for score, weight in wanted.items():
        pool = sorted(by_score[score], key=lambda i: seed_for(seed, "balance", i))
        number = round(size * weight)
        chosen += [pool[i % len(pool)] for i in range(number)]
    return sorted(chosen)


def histogram(scores: Sequence[int | None]) -> dict[str, int]:
    """Number of items of each score, and of items without one."""
    counts = {str(s): sum(x == s for x in scores) for s in (1, 2, 3, 4, 5)}
    return {**counts, "invalid": sum(x is None for x in scores)}
