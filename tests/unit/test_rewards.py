"""Reward formulas: exact values of the paper, and what is refused."""

from typing import Any

import pytest
import torch

from firm.config import RewardConfig
from firm.records import Assessment, Invalid, Judgement
from firm.rewards import FORMULAS, base_and_bonus, base_only, normalise, reward, rewards_of, weighted_sum


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_normalise() -> None:
    assert normalise(torch.tensor([1, 2, 3, 4, 5])).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert normalise(tensor(4.2)).tolist() == pytest.approx([0.8])
    assert normalise(tensor(0.996, 5.004)).tolist() == [0, 1]  # rounding of an expectation
    assert normalise(tensor()).shape == (0,)


@pytest.mark.parametrize("bad", [0.0, 0.9, 5.1, 6.0, float("nan"), float("inf"), -float("inf")])
def test_scores_off_the_scale_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="mask failed judgements"):
        normalise(tensor(3.0, bad))


def test_the_paper_s_values() -> None:
    """R = IF * (0.4 + 0.6 Q) and R = Exec * (0.6 + 0.4 Cons), method.md 1.1."""
    first, second = tensor(5, 3, 5, 1), tensor(1, 3, 5, 5)
    generation = reward(RewardConfig(formula="qma"), {"instruction_following": first, "quality": second})
    assert generation.tolist() == pytest.approx([0.4, 0.35, 1, 0])
    editing = reward(RewardConfig(formula="cme"), {"execution": first, "consistency": second})
    assert editing.tolist() == pytest.approx([0.6, 0.4, 1, 0])


def test_every_pair_of_scores_of_an_edit() -> None:
    """The whole table of CME, Exec * (0.6 + 0.4 Cons), rows execution 1..5, columns consistency 1..5."""
    table = [
        [0, 0, 0, 0, 0],
        [0.15, 0.175, 0.2, 0.225, 0.25],
        [0.3, 0.35, 0.4, 0.45, 0.5],
        [0.45, 0.525, 0.6, 0.675, 0.75],
        [0.6, 0.7, 0.8, 0.9, 1],
    ]
    grid = torch.arange(1, 6, dtype=torch.float64)
    for executed, row in zip(grid, table, strict=True):
        scores = {"execution": executed.expand(5), "consistency": grid}
        assert reward(RewardConfig(formula="cme"), scores).tolist() == pytest.approx(row)


@pytest.mark.parametrize(
    ("config", "untouched", "half", "perfect"),
    [
        ({"formula": "cme"}, 0, 0.45, 1),
        ({"formula": "weighted_sum", "weights": [0.5, 0.5]}, 0.5, 0.625, 1),
        ({"formula": "weighted_sum", "weights": [0.6, 0.4]}, 0.4, 0.6, 1),
        ({"formula": "base_only"}, 0, 0.5, 1),
    ],
)
def test_the_rewards_of_the_paper_s_ablation(
    config: dict[str, Any], untouched: float, half: float, perfect: float
) -> None:
    """Table 5: under the sums the untouched source (1, 5) earns something, under CME nothing."""
    edits = {"execution": tensor(1, 3, 5), "consistency": tensor(5, 4, 5)}
    settings = RewardConfig(base="execution", bonuses=["consistency"], **config)
    assert reward(settings, edits).tolist() == pytest.approx([untouched, half, perfect])


@pytest.mark.parametrize(
    ("formula", "given", "words"),
    [
        ("cme", {"base": "instruction_following", "bonuses": ["quality"]}, "cme has base execution and bonuses"),
        ("cme", {"bonuses": ["quality"]}, r"cme has base execution and bonuses \['consistency'\]"),
        ("qma", {"base": "execution"}, "with other dimensions it is base_and_bonus"),
        ("base_and_bonus", {}, "base"),
    ],
)
def test_a_named_formula_has_its_own_dimensions(formula: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardConfig(formula=formula, **given)


def test_a_named_formula_may_have_other_weights() -> None:
    same = RewardConfig(formula="base_and_bonus", base="execution", bonuses=["consistency"], weights=[0.5, 0.5])
    named, scores = RewardConfig(formula="cme", weights=[0.5, 0.5]), {"execution": tensor(4), "consistency": tensor(2)}
    assert reward(named, scores) == reward(same, scores) and named.dimensions == ("execution", "consistency")


def test_the_source_image_returned_untouched_earns_nothing() -> None:
    execution, consistency = tensor(0), tensor(1)
    assert base_and_bonus(execution, [consistency], [0.6, 0.4]).item() == 0
    assert weighted_sum(execution, [consistency], [0.5, 0.5]).item() == 0.5  # the hackable baseline


def test_several_bonuses() -> None:
    terms = [tensor(0.5), tensor(1), tensor(0.25)]
    assert base_and_bonus(terms[0], terms[1:], [0.2, 0.3, 0.5]).item() == pytest.approx(0.5 * (0.2 + 0.3 + 0.125))
    assert weighted_sum(terms[0], terms[1:], [0.2, 0.3, 0.5]).item() == pytest.approx(0.1 + 0.3 + 0.125)
    assert base_and_bonus(terms[0], [], [1.0]).item() == base_only(terms[0]).item() == 0.5


@pytest.mark.parametrize(
    ("weights", "match"), [([0.5, 0.6], "sum to 1"), ([1.5, -0.5], "non-negative"), ([1.0], "as many"),
                           ([float("nan"), 1.0], "sum to 1")]
)  # fmt: skip
def test_impossible_weights(weights: list[float], match: str) -> None:
    for formula in (base_and_bonus, weighted_sum):
        with pytest.raises(ValueError, match=match):
            formula(tensor(0.5), [tensor(0.5)], weights)


@pytest.mark.parametrize("bad", [tensor(0.5, float("nan")), tensor(0.5, 1.1), tensor(-0.1, 0), tensor(0.5)])
def test_impossible_terms(bad: torch.Tensor) -> None:
    for base, bonus in ((bad, tensor(0.5, 0.5)), (tensor(0.5, 0.5), bad)):
        with pytest.raises(ValueError, match=r"same shape|normalised to \[0, 1\]"):
            base_and_bonus(base, [bonus], [0.4, 0.6])


def test_reward_follows_the_config() -> None:
    scores = {"instruction_following": tensor(5, 3, 1), "quality": tensor(1, 3, 5)}
    assert reward(RewardConfig(), scores).tolist() == pytest.approx([0.4, 0.35, 0])
    two = {"base": "instruction_following", "bonuses": ["quality"], "weights": [0.5, 0.5]}
    config = RewardConfig(formula="weighted_sum", **two)
    assert reward(config, scores).tolist() == pytest.approx([0.5, 0.5, 0.5])
    alone = RewardConfig(formula="base_only", base="instruction_following")
    assert reward(alone, {"instruction_following": tensor(5, 3)}).tolist() == [1, 0.5]
    for formula in FORMULAS.keys() - {"cme"}:
        assert reward(RewardConfig(formula=formula, **two), scores).shape == (3,)


def test_reward_refuses_missing_dimensions_and_invalid_scores() -> None:
    with pytest.raises(ValueError, match=r"needs scores on \['quality'\]"):
        reward(RewardConfig(), {"instruction_following": tensor(5)})
    with pytest.raises(ValueError, match="mask failed judgements"):
        reward(RewardConfig(), {"instruction_following": tensor(5), "quality": tensor(float("nan"))})


def test_rewards_need_every_dimension_of_the_formula_and_no_other() -> None:
    base, qma = RewardConfig(formula="base_only", base="instruction_following"), RewardConfig.model_validate({})
    good, bad = Judgement(score=4, distribution=(0, 0, 0.5, 0, 0.5)), Invalid(reason="empty")
    assessments: list[Assessment] = [
        {"instruction_following": good, "quality": Judgement(score=3)},
        {"instruction_following": good, "quality": bad},
        {"instruction_following": bad, "quality": good},
    ]
    rewards, mask = rewards_of(assessments, qma)
    assert mask.tolist() == [True, False, False] and rewards[0] == pytest.approx(0.75 * (0.4 + 0.6 * 0.5))
    assert rewards_of(assessments, base)[1].tolist() == [True, True, False]
    rewards, mask = rewards_of(assessments[1:], qma)
    assert not mask.any() and not rewards.isnan().any()
    assert not rewards_of([{"instruction_following": good}], qma)[1].any(), "a judgement that is missing is none"
    hard = RewardConfig(formula="base_only", base="instruction_following", soft=False)
    assert rewards_of([{"instruction_following": Judgement(score=5, distribution=(0.4, 0, 0, 0, 0.6))}], hard)[0] == 1
