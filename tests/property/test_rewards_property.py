"""Rewards stay in [0, 1], rise with every argument, and are nothing without the base."""

from typing import get_args

import hypothesis.strategies as st
import torch
from hypothesis import given

from firm.config import RewardConfig
from firm.rewards import FORMULAS, base_and_bonus, normalise, reward, weighted_sum

SHARES = st.floats(0, 1)
SCORES = st.floats(1, 5)
KINDS = st.sampled_from(sorted(FORMULAS))


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def config(formula: str, weight: float) -> RewardConfig:
    own = {} if formula in ("qma", "cme") else {"base": "instruction_following", "bonuses": ["quality"]}
    return RewardConfig(formula=formula, weights=[weight, 1 - weight], **own)


def earned(settings: RewardConfig, following: float, quality: float) -> float:
    return reward(settings, {settings.base: one(following), settings.bonuses[0]: one(quality)}).item()


def test_every_formula_of_the_config_exists() -> None:
    assert set(get_args(RewardConfig.model_fields["formula"].annotation)) == set(FORMULAS)


@given(KINDS, SHARES, SCORES, SCORES)
def test_bounds(formula: str, weight: float, following: float, quality: float) -> None:
    assert 0 <= earned(config(formula, weight), following, quality) <= 1


@given(KINDS, SHARES)
def test_the_ends_of_the_scale(formula: str, weight: float) -> None:
    settings = config(formula, weight)
    assert earned(settings, 1, 1) == 0 and abs(earned(settings, 5, 5) - 1) < 1e-9


@given(KINDS, SHARES, SCORES, SCORES, SCORES)
def test_monotone_in_every_argument(formula: str, weight: float, low: float, high: float, other: float) -> None:
    settings, (low, high) = config(formula, weight), sorted((low, high))
    assert earned(settings, low, other) <= earned(settings, high, other) + 1e-12
    assert earned(settings, other, low) <= earned(settings, other, high) + 1e-12


@given(st.sampled_from(["qma", "cme", "base_and_bonus", "base_only"]), SHARES, SCORES)
def test_without_the_base_there_is_no_reward(formula: str, weight: float, quality: float) -> None:
    assert earned(config(formula, weight), 1, quality) == 0


@given(SHARES, st.lists(SHARES, max_size=4), st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_the_product_never_exceeds_the_base(base: float, bonuses: list[float], raw: list[float]) -> None:
    raw = raw[: 1 + len(bonuses)]
    weights = [w / sum(raw) for w in raw]
    terms = [one(b) for b in bonuses]
    assert base_and_bonus(one(base), terms, weights).item() <= base + 1e-9
    lowest, highest = min([base, *bonuses]), max([base, *bonuses])
    assert lowest - 1e-9 <= weighted_sum(one(base), terms, weights).item() <= highest + 1e-9


@given(st.lists(st.integers(1, 5), max_size=8))
def test_whole_scores_map_to_quarters(scores: list[int]) -> None:
    assert normalise(torch.tensor(scores, dtype=torch.long)).tolist() == [(s - 1) / 4 for s in scores]
