"""Rollout in three separate steps: sample groups from the old policy, score them, compute advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firm.config import RewardConfig, RLConfig
from firm.critics.judge import JudgeInput, Judging, judge_inputs, soft_scores
from firm.critics.soft import soft_share
from firm.dist import BatchPlan, Ranks, gather, generator
from firm.looks import look
from firm.policies.generate import Encoded, Generated, encode, generate, to_images
from firm.policies.policy import Conditions, Policy
from firm.policies.sampler import noise_for
from firm.records import Assessment, Prompt
from firm.rewards import rewards_of
from firm.rl.monitors import SCORE, means
from firm.rl.nft import advantages

Seen = dict[str, float | None]
"""What is watched of one sample, besides its reward, by name."""


@dataclass(frozen=True)
class Groups:
    """This rank's samples of one epoch without their rewards; N = its groups x group_size.

    Attributes:
        items: What is judged of each sample (N).
        generated: Latents and conditions of the samples.
        first: Index of this rank's first sample among those of all ranks.
    """

    items: list[JudgeInput]
    generated: Generated
    first: int


@dataclass(frozen=True)
class Rollout:
    """What an update trains on: this rank's samples of one epoch; N = its groups x group_size.

    Attributes:
        latents: Clean latents [N, ...].
        conditions: Encoded distinct prompts of this rank's groups, one row each.
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
    stats: dict[str, float | None]


def draw_prompts(prompts: Sequence[object], number: int, seed: int, epoch: int) -> list[int]:
    """Indices of the epoch's distinct prompts (with repetition only where there are fewer prompts than groups)."""
    order: list[int] = []
    while len(order) < number:
        permutation = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch, len(order)))
        order += permutation.tolist()
    return order[:number]


def sample_groups(
    policy: Policy, prompts: Sequence[Prompt], rl: RLConfig, seed: int, epoch: int, ranks: Ranks, *critics: Judging
) -> Groups:
    """Sample this rank's groups of one epoch from the old policy; critics get each batch as soon as it is decoded.

    A group is one drawn prompt with ``group_size`` noises; its key is its place in the draw, never the prompt's text.
    Noise depends on (seed, epoch, sample) only, so any number of ranks samples the same.

    Raises:
        UserError: The groups do not divide evenly over the ranks, or a critic cannot be used.
    """
    plan = BatchPlan.of(rl.prompts_per_epoch, rl.group_size, ranks)
    drawn = draw_prompts(prompts, rl.prompts_per_epoch, seed, epoch)
    indices = range(plan.groups.start * rl.group_size, plan.groups.stop * rl.group_size)
    asked = [prompts[drawn[i // rl.group_size]] for i in indices]
    noise = noise_for(policy.latent_shape, seed, f"rollout/{epoch}", indices)
    with policy.using("old"):
        generated, items = sample_for(critics, policy, asked, encode(policy, asked), noise, rl)
    return Groups(items, generated, indices.start)


def sample_for(
    judges: Sequence[Judging],
    policy: Policy,
    prompts: Sequence[Prompt],
    encoded: Encoded,
    noise: Tensor,
    rl: RLConfig,
) -> tuple[Generated, list[JudgeInput]]:
    """Sample one image per prompt (N) from noise [N, ...]; judges get each batch as soon as it is decoded."""
    items: list[JudgeInput] = []

    def hand_over(latents: Tensor) -> None:
        images = to_images(policy, latents, rl.batch_size)
        batch = judge_inputs(prompts[len(items) : len(items) + len(images)], images)
        items.extend(batch)
        for judge in judges:
            judge.add(batch)

    generated = generate(
        policy,
        encoded,
        noise,
        num_inference_steps=rl.num_inference_steps,
        solver=rl.solver,
        batch_size=rl.batch_size,
        each=hand_over,
    )
    return generated, items


def score(critic: Judging, groups: Groups, formula: RewardConfig) -> tuple[Tensor, Tensor, list[Seen]]:
    """Rewards [N] in [0, 1] of this rank's samples, a mask [N], see :func:`rewards_of`, and what is watched (N).

    ``critic`` has been given these groups by `sample_groups`.
    """
    assessments = critic.assessments()
    seen = [_seen(item.images, a, formula) for item, a in zip(groups.items, assessments, strict=True)]
    return *rewards_of(assessments, formula), seen


def _seen(images: Sequence[bytes], assessment: Assessment, formula: RewardConfig) -> Seen:
    outcomes = {d: assessment[d] for d in formula.dimensions}
    scores = {SCORE + d: soft_scores([assessment], d, formula.soft)[0] for d in outcomes}
    return {"soft_share": soft_share(outcomes.values()), **look(images), **scores}


def with_advantages(
    groups: Groups, rewards: Tensor, valid: Tensor, seen: Sequence[Seen], rl: RLConfig, ranks: Ranks
) -> Rollout:
    """What an update trains on: groups with the advantages of their rewards [N], where ``valid`` [N], over all ranks.

    ``seen`` (N) is for the statistics only. All ranks take part.
    """
    scored = gather(list(zip(rewards.tolist(), valid.tolist(), seen, strict=True)), ranks)
    shape = (rl.prompts_per_epoch, rl.group_size)
    all_rewards = torch.tensor([r for r, _, _ in scored]).view(shape)
    all_valid = torch.tensor([v for _, v, _ in scored]).view(shape)
    enough = all_valid.float().mean(1, keepdim=True) >= rl.min_valid_share
    advantage, mask = advantages(all_rewards, all_valid & enough, rl.std)
    latents = groups.generated.latents
    return Rollout(
        latents=latents,
        conditions=groups.generated.encoded.conditions,
        rows=groups.generated.encoded.rows,
        advantage=advantage.flatten()[groups.first : groups.first + len(latents)].to(latents.device),
        first=groups.first,
        trained=mask.flatten(),
        stats={**_stats(all_rewards, all_valid, mask), **means([s for _, _, s in scored], rl.group_size)},
    )


def _stats(rewards: Tensor, valid: Tensor, mask: Tensor) -> dict[str, float | None]:
    """Numbers of an epoch; those of rewards are None where no judgement was valid."""
    kept = rewards[valid]
    spread = torch.stack(
        [g[v].std(unbiased=False) if v.any() else g.new_zeros(()) for g, v in zip(rewards, valid, strict=True)]
    )
    return {
        "reward": kept.mean().item() if len(kept) else None,
        "reward_std": kept.std(unbiased=False).item() if len(kept) else None,
        "zero_std_groups": (spread < 1e-6).float().mean().item(),
        "invalid_judgements": float((~valid).sum()),
        "invalid_share": (~valid).float().mean().item(),
        "masked_samples": float((~mask).sum()),
    }
