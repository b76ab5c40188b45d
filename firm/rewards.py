"""Reward formulas: scores 1..5 to a reward in [0, 1] (paper section 3.4, "Base-and-Bonus").

The base is a necessary condition and multiplies the bonus, so a policy cannot win by the bonus alone: an untouched
source image or a pretty picture of something else earns nothing. Failed judgements have no score; the caller masks them
out, and a NaN that gets here is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firm.records import Assessment, Judgement

if TYPE_CHECKING:
    from firm.config import RewardConfig

Formula = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]

_ROUNDING = 0.01  # distributions may sum to 1 +- 1e-3, so an expectation over 1..5 may leave the range by 5e-3


def normalise(score: Tensor) -> Tensor:
    """Map scores to [0, 1] by (s - 1) / 4.

    Args:
        score: Scores in [1, 5], shape [N], hard (integers) or soft.

    Raises:
        ValueError: A score is not finite or not in [1, 5].
    """
    score = score if score.is_floating_point() else score.float()
    # Compared this way round a NaN is refused as well.
    if not bool(((score >= 1 - _ROUNDING) & (score <= 5 + _ROUNDING)).all()):
        raise ValueError("scores must be finite and in [1, 5]; mask failed judgements out before computing rewards")
    return ((score - 1) / 4).clamp(0, 1)


def _check(terms: Sequence[Tensor], weights: Sequence[float]) -> None:
    if len(terms) != len(weights):
        raise ValueError(f"{len(terms)} terms need as many weights, got {list(weights)}")
    if not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
        raise ValueError(f"weights must be non-negative and sum to 1, got {list(weights)}")
    if any(term.shape != terms[0].shape for term in terms):
        raise ValueError(f"terms must have the same shape, got {[tuple(t.shape) for t in terms]}")
    for term in terms:
        if not bool(((term >= 0) & (term <= 1)).all()):
            raise ValueError("terms must be finite and normalised to [0, 1]")


def base_and_bonus(base: Tensor, bonuses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Base-and-bonus, base * (w_0 + sum_i w_i * bonus_i).

    QMA, for generation, is IF * (0.4 + 0.6 * quality); CME, for editing, Exec * (0.6 + 0.4 * Cons): settings of this
    one function, which `RewardConfig` names.

    Args:
        base: Necessary condition in [0, 1], shape [N].
        bonuses: Terms in [0, 1], shape [N] each.
        weights: w_0 for the base alone, then one for each bonus; non-negative, sum 1.

    Returns:
        Rewards in [0, 1], shape [N].

    Raises:
        ValueError: NaN, a term out of [0, 1], unequal shapes or impossible weights.
    """
    _check([base, *bonuses], weights)
    bracket = weights[0] + sum(
        (w * bonus for w, bonus in zip(weights[1:], bonuses, strict=True)), torch.zeros_like(base)
    )
    return (base * bracket).clamp(0, 1)


def weighted_sum(base: Tensor, bonuses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """w_0 * base + sum_i w_i * bonus_i: the paper's hackable baseline, for ablations. Arguments as `base_and_bonus`."""
    _check([base, *bonuses], weights)
    return sum((w * term for w, term in zip(weights[1:], bonuses, strict=True)), weights[0] * base).clamp(0, 1)


def base_only(base: Tensor) -> Tensor:
    """The base alone, shape [N] in [0, 1], for ablations."""
    _check([base], [1.0])
    return base.clone()


FORMULAS: dict[str, Formula] = {
    "qma": base_and_bonus,
    "cme": base_and_bonus,
    "base_and_bonus": base_and_bonus,
    "weighted_sum": weighted_sum,
    "base_only": lambda base, _bonuses, _weights: base_only(base),
}
"""The formulas that a config can name: functions of (base, bonuses, weights), all normalised to [0, 1]."""


def reward(config: RewardConfig, scores: Mapping[str, Tensor]) -> Tensor:
    """Reward of valid judgements.

    Args:
        config: Formula, dimensions and weights.
        scores: Scores in [1, 5], shape [N], for at least the dimensions that the formula uses.

    Returns:
        Rewards in [0, 1], shape [N].

    Raises:
        ValueError: A dimension is missing, or a score is NaN or out of range.
    """
    if missing := [d for d in config.dimensions if d not in scores]:
        raise ValueError(f"the reward needs scores on {missing}, got {sorted(scores)}")
    base, *rest = (normalise(scores[d]) for d in config.dimensions)
    return FORMULAS[config.formula](base, rest, config.weights)


def rewards_of(assessments: Sequence[Assessment], config: RewardConfig) -> tuple[Tensor, Tensor]:
    """Rewards [N] in [0, 1] and a mask [N]: False where a judgement that the formula needs is missing or invalid."""
    valid = [all(isinstance(a.get(d), Judgement) for d in config.dimensions) for a in assessments]
    scores = {
        d: torch.tensor([_score(a, d, config.soft) for a, ok in zip(assessments, valid, strict=True) if ok])
        for d in config.dimensions
    }
    mask = torch.tensor(valid)
    rewards = torch.zeros(len(assessments))
    if any(valid):
        rewards[mask] = reward(config, scores).float()
    return rewards, mask


def _score(assessment: Assessment, dimension: str, soft: bool) -> float:
    outcome = assessment[dimension]
    assert isinstance(outcome, Judgement)
    return outcome.soft_score if soft else float(outcome.score)
