"""Rollout: groups are draws, invalid judgements are masked, batching and ranks change nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import ALONE, CPU, TINY, Redness

from firm.config import RewardConfig, RLConfig
from firm.critics.judge import JudgeInput, judging
from firm.policies.policy import Policy
from firm.records import Assessment, Judgement, Prompt
from firm.rl.rollout import Rollout, draw_prompts, sample_groups, score, with_advantages

BASE, QMA = RewardConfig(formula="base_only", base="instruction_following"), RewardConfig()
TEXTS = ("a red circle", "a blue square", "a green triangle", "a yellow circle")
PROMPTS = [Prompt(text=text) for text in TEXTS]


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy(TINY, CPU)
    made.train(None, ("old", "ema"), seed=0)
    return made


def settings(**changes: Any) -> RLConfig:
    few: dict[str, Any] = {"prompts_per_epoch": 4, "group_size": 3, "max_epochs": 1, "num_inference_steps": 3}
    return RLConfig(**{**few, **changes})


def roll(policy: Policy, critic: Redness | None = None, prompts: Sequence[Prompt] = PROMPTS, **changes: Any) -> Rollout:
    rl = settings(**changes)
    with judging(critic or Redness()) as judged:
        groups = sample_groups(policy, prompts, rl, 5, 2, ALONE, judged)
        return with_advantages(groups, *score(judged, groups, BASE), rl, ALONE)


def test_one_sample_per_group_member_under_its_own_prompt(policy: Policy) -> None:
    critic = Redness()
    found = roll(policy, critic)
    assert found.latents.shape == (12, 8, 8, 8) and found.rows.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    drawn = [PROMPTS[i] for i in draw_prompts(PROMPTS, 4, 5, 2)]
    assert [item.prompt for item in critic.asked] == [p for p in drawn for _ in range(3)]
    assert len({item.images[0] for item in critic.asked}) == 12
    assert found.trained.all() and found.advantage.view(4, 3).sum(1).abs().max() < 1e-4
    assert found.advantage.abs().min() > 0 and 0 < found.stats["reward"] < 1 and found.stats["masked_samples"] == 0


def test_the_same_prompt_drawn_twice_makes_two_groups(policy: Policy) -> None:
    critic = Redness()
    found = roll(policy, critic, PROMPTS[:1] * 2)
    assert {item.prompt.text for item in critic.asked} == {"a red circle"}
    assert len({item.images[0] for item in critic.asked}) == 12  # with noises of their own
    assert found.advantage.view(4, 3).sum(1).abs().max() < 1e-4  # each centred by itself
    rewards = torch.tensor([a["instruction_following"].soft_score for a in Redness().judge(critic.asked)])  # type: ignore[union-attr]
    centred = rewards.view(4, 3) - rewards.view(4, 3).mean(1, keepdim=True)
    torch.testing.assert_close(found.advantage, centred.flatten() / 4 / (rewards.std(unbiased=False) / 4 + 1e-4))


def test_invalid_judgements_are_masked_and_leave_the_others_alone(policy: Policy) -> None:
    found = roll(policy, Redness(failing=[0, 3, 4]))  # one of group 0, two of group 1
    assert found.trained.tolist() == [False, True, True, False, False, False, *[True] * 6]
    assert not found.advantage[[0, 3, 4, 5]].any()
    assert found.advantage[:3].sum().abs() < 1e-4 and found.advantage[1:3].abs().min() > 0
    assert found.stats["invalid_judgements"] == 3 and found.stats["masked_samples"] == 4
    nothing = roll(policy, Redness(failing=range(12)))
    assert not nothing.trained.any() and not nothing.advantage.any() and nothing.stats["reward"] is None
    assert nothing.stats["reward_std"] is None
    assert found.stats["soft_share"] == 1 and nothing.stats["soft_share"] is None


def test_a_group_with_too_few_valid_judgements_is_left_out(policy: Policy) -> None:
    """One of three fails in the first group, two of three in the second."""
    half, most = (roll(policy, Redness(failing=[0, 3, 4]), min_valid_share=share) for share in (0.5, 0.7))
    everything = roll(policy, Redness(failing=[0, 3, 4]))
    assert half.trained.tolist() == everything.trained.tolist() == [False, True, True, *[False] * 3, *[True] * 6]
    assert most.trained.tolist() == [False] * 6 + [True] * 6 and not most.advantage[:6].any()
    assert (most.stats["masked_samples"], most.stats["invalid_judgements"]) == (6, 3)
    assert torch.equal(half.advantage, everything.advantage)


def test_judgements_without_a_distribution_show(policy: Policy) -> None:
    class Hard(Redness):
        def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
            soft = super().judge(items)
            return [*soft[:3], *({"instruction_following": Judgement(score=2)} for _ in soft[3:])]

    assert roll(policy, Hard(failing=[0])).stats["soft_share"] == pytest.approx(2 / 11)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_the_batch_size_changes_nothing(policy: Policy, batch_size: int) -> None:
    reference, found = roll(policy, batch_size=7), roll(policy, batch_size=batch_size)
    torch.testing.assert_close(found.latents, reference.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.advantage, reference.advantage, rtol=0.05, atol=0.05)  # images are rounded


def test_it_samples_from_the_old_policy(policy: Policy) -> None:
    assert policy.parameters is not None
    before = roll(policy).latents
    saved = {k: t.clone() for k, t in policy.parameters.tensors().items()}
    with torch.no_grad():
        for parameter in policy.parameters.trainable:
            parameter.mul_(1.1)
    assert torch.equal(roll(policy).latents, before)
    policy.parameters.update_average("old", 0.0)
    assert not torch.equal(roll(policy).latents, before)
    policy.parameters.load(saved)


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 99), st.integers(0, 99))
def test_prompts_of_an_epoch_are_distinct_while_they_last(size: int, number: int, seed: int, epoch: int) -> None:
    prompts = [str(i) for i in range(size)]
    drawn = draw_prompts(prompts, number, seed, epoch)
    assert drawn == draw_prompts(prompts, number, seed, epoch) and len(drawn) == number
    for start in range(0, number, size):
        assert len(set(drawn[start : start + size])) == len(drawn[start : start + size])


def test_prompts_change_with_seed_and_epoch() -> None:
    prompts = [str(i) for i in range(50)]
    assert len({tuple(draw_prompts(prompts, 10, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_epoch_has_noise_of_its_own(policy: Policy) -> None:
    one = settings(prompts_per_epoch=1)
    first, second = (sample_groups(policy, PROMPTS[:1], one, 5, epoch, ALONE).generated.latents for epoch in (0, 1))
    assert not torch.allclose(first, second)
