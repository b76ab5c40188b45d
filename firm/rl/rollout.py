"""Rollout: sample groups from the old policy, score them, turn rewards into advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from firm.config import RewardConfig, RLConfig
from firm.critics.judge import Judge, JudgeInput
from firm.dist import BatchPlan, Ranks, gather, generator
from firm.images import encode_image
from firm.policies.policy import Conditions, Policy
from firm.policies.sampler import noise_for, sample
from firm.records import Assessment, Invalid
from firm.rewards import reward
from firm.rl.nft import advantages


@dataclass(frozen=True)
class Rollout:
    """This rank's samples of one epoch; N = its groups x group_size.

    Attributes:
        latents: Clean latents [N, C, H, W].
        conditions: Encoded prompts of this rank's groups, one row each.
        rows: Row of ``conditions`` for each sample [N].
        advantage: [N], 0 where masked.
        first: Index of this rank's first sample among those of all ranks.
        trained: [all samples] bool on the CPU: which may train, since their judgement and group are valid.
        stats: Numbers of the epoch over all ranks.
    """

    latents: Tensor
    conditions: Conditions
    rows: Tensor
    advantage: Tensor
    first: int
    trained: Tensor
    stats: dict[str, float]


def draw_prompts(prompts: Sequence[str], number: int, seed: int, epoch: int) -> list[int]:
    """Indices of the epoch's distinct prompts (with repetition only where there are fewer prompts than groups)."""
    order: list[int] = []
    while len(order) < number:
        permutation = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch, len(order)))
        order += permutation.tolist()
    return order[:number]


def generate(policy: Policy, conditions: Conditions, rows: Tensor, noise: Tensor, config: RLConfig) -> Tensor:
    """Sample latents [N, C, H, W] in batches under the parameter set in use."""
    parts = [
        sample(policy, conditions.select(r), n, config.num_inference_steps, config.solver)
        for r, n in zip(rows.split(config.batch_size), noise.split(config.batch_size), strict=True)
    ]
    return torch.cat(parts)


def decode(policy: Policy, latents: Tensor, batch_size: int) -> list[bytes]:
    """PNG images of latents."""
    images = torch.cat([policy.decode(part) for part in latents.split(batch_size)])
    return [encode_image(Image.fromarray(image)) for image in images.cpu().numpy()]


def rewards_of(assessments: Sequence[Assessment], config: RewardConfig) -> tuple[Tensor, Tensor]:
    """Rewards [N] in [0, 1] and a mask [N]: False where a judgement that the formula needs is invalid."""
    needed = [config.base, *(config.bonuses if config.formula != "base_only" else ())]
    valid = [all(not isinstance(a[d], Invalid) for d in needed) for a in assessments]
    scores = {
        d: torch.tensor([_score(a, d, config.soft) for a, ok in zip(assessments, valid, strict=True) if ok])
        for d in needed
    }
    mask = torch.tensor(valid)
    rewards = torch.zeros(len(assessments))
    if any(valid):
        rewards[mask] = reward(config, scores).float()
    return rewards, mask


def _score(assessment: Assessment, dimension: str, soft: bool) -> float:
    outcome = assessment[dimension]
    assert not isinstance(outcome, Invalid)
    return outcome.soft_score if soft else float(outcome.score)


def rollout(
    policy: Policy,
    critic: Judge,
    prompts: Sequence[str],
    rl: RLConfig,
    formula: RewardConfig,
    seed: int,
    epoch: int,
    ranks: Ranks,
) -> Rollout:
    """Sample and score one epoch.

    A group is one drawn prompt with ``group_size`` noises; its key is its place in the draw, never the prompt's text.
    Noise depends on (seed, epoch, sample) only, so any number of ranks samples the same.
    """
    plan = BatchPlan.of(rl.prompts_per_epoch, rl.group_size, ranks)
    drawn = draw_prompts(prompts, rl.prompts_per_epoch, seed, epoch)
    mine = [prompts[drawn[g]] for g in plan.groups]
    conditions = policy.encode(mine)
    rows = torch.arange(len(mine), device=policy.device).repeat_interleave(rl.group_size)
    indices = [g * rl.group_size + k for g in plan.groups for k in range(rl.group_size)]
    noise = noise_for(policy.latent_shape, seed, f"rollout/{epoch}", indices)
    with policy.using("old"):
        latents = generate(policy, conditions, rows, noise, rl)
    images = decode(policy, latents, rl.batch_size)
    items = [JudgeInput(mine[i // rl.group_size], [png]) for i, png in enumerate(images)]
    rewards, valid = rewards_of(critic.judge(items), formula)
    pairs = gather(list(zip(rewards.tolist(), valid.tolist(), strict=True)), ranks)
    shape = (rl.prompts_per_epoch, rl.group_size)
    all_rewards = torch.tensor([r for r, _ in pairs]).view(shape)
    all_valid = torch.tensor([v for _, v in pairs]).view(shape)
    advantage, mask = advantages(all_rewards, all_valid, rl.std)
    here = slice(plan.groups.start, plan.groups.stop)
    return Rollout(
        latents=latents,
        conditions=conditions,
        rows=rows,
        advantage=advantage[here].flatten().to(policy.device),
        first=plan.groups.start * rl.group_size,
        trained=mask.flatten(),
        stats=_stats(all_rewards, all_valid, mask),
    )


def _stats(rewards: Tensor, valid: Tensor, mask: Tensor) -> dict[str, float]:
    kept = rewards[valid]
    spread = torch.stack(
        [g[v].std(unbiased=False) if v.any() else g.new_zeros(()) for g, v in zip(rewards, valid, strict=True)]
    )
    return {
        "reward": kept.mean().item() if len(kept) else 0.0,
        "reward_std": kept.std(unbiased=False).item() if len(kept) else 0.0,
        "zero_std_groups": (spread < 1e-6).float().mean().item(),
        "invalid_judgements": float((~valid).sum()),
        "masked_samples": float((~mask).sum()),
    }
