"""Audits: how critic and auditor judge the policy's images of fixed prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from firm.config import RunConfig
from firm.critics.judge import Judge, JudgeInput, soft_scores
from firm.critics.load import open_judge
from firm.policies.generate import generate, to_images
from firm.policies.policy import Policy
from firm.policies.sampler import noise_for
from firm.records import Assessment, Invalid, Prompt, UserError
from firm.rl.audit import Audit
from firm.rl.rollout import draw_prompts, rewards_of
from firm.stats import spearman


class Auditor:
    """Audits the EMA policy on fixed training prompts and noise."""

    def __init__(self, policy: Policy, critic: Judge, prompts: Sequence[Prompt], config: RunConfig) -> None:
        self.policy = policy
        self.critic = critic
        self.config = config
        number = config.auditor.num_images
        self.prompts = [prompts[i] for i in draw_prompts(prompts, number, config.seed, -1)]
        self.noise = noise_for(policy.latent_shape, config.seed, "audit", range(number))
        self.judge = open_judge(config.auditor.judge, config.auditor.rubrics)

    def check(self, epoch: int) -> Audit:
        """Sample with the EMA parameters and judge."""
        rl = self.config.rl
        with self.policy.using("ema"):
            generated = generate(
                self.policy,
                self.prompts,
                self.noise,
                num_inference_steps=rl.num_inference_steps,
                solver=rl.solver,
                batch_size=rl.batch_size,
            )
        images = to_images(self.policy, generated.latents, rl.batch_size)
        items = [JudgeInput(prompt, [png]) for prompt, png in zip(self.prompts, images, strict=True)]
        return audit(epoch, self.critic.judge(items), self.judge.judge(items), self.config)


def audit(epoch: int, critic: Sequence[Assessment], auditor: Sequence[Assessment], config: RunConfig) -> Audit:
    """Summarise two judges' assessments of the same images.

    Raises:
        UserError: A judge gave no valid judgement.
    """
    base = config.reward.base
    rewards, valid = rewards_of(critic, config.reward)
    mine = soft_scores(critic, base)
    theirs = soft_scores(auditor, base)
    pairs = [(c, a) for c, a in zip(mine, theirs, strict=True) if c is not None and a is not None]
    if not pairs or not bool(valid.any()):
        outcome = next((a[base] for a in (*auditor, *critic) if isinstance(a.get(base), Invalid)), "no answers")
        raise UserError("the auditor or the critic judged none of the images", "auditor.judge", str(outcome))
    agreement = spearman([c for c, _ in pairs], [a for _, a in pairs])
    return Audit(
        epoch=epoch,
        reward=rewards[valid].mean().item(),
        critic=fmean(c for c, _ in pairs),
        auditor=fmean(a for _, a in pairs),
        agreement=agreement,
        invalid=len(mine) - len(pairs),
    )
