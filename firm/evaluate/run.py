"""The evaluate stage: sample base and final policy for a suite, which scores and compares both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from firm.chat.journal import Journals
from firm.config import EvaluateConfig, PolicyConfig, SteeredRun
from firm.critics.child import served
from firm.critics.load import trained_critic
from firm.evaluate.suite import Suite, find_suite
from firm.policies.encoders import HOST
from firm.policies.generate import Encoded, draw, encode
from firm.policies.policy import Policy, load_policy
from firm.progress import Task
from firm.prompts import with_source
from firm.records import Prompt, Sample, SampledPolicy, Stage, Summary
from firm.seeds import seed_for
from firm.storage.artifacts import WORK, Output
from firm.storage.published import PublishedShards
from firm.storage.shards import iter_shards

STAGE = Stage(
    name="evaluate",
    sections=("seed", "prompts", "policy", "critic", "bench.point_estimate", "reward", "auditor", "evaluate"),
    compares=True,
)


def run(config: SteeredRun, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Compare ``config.policy`` with the policy in ``inputs["policy"]``, on the same prompts and noise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = trained_critic(inputs)
    with served(config.critic, folder, out.folder / WORK) as critic, Journals(out.folder / WORK) as open_chat:
        asked = config.model_copy(update={"critic": critic})
        suite = find_suite(config.evaluate.suite)(asked, folder, device, open_chat)
        _judge(config, suite, inputs["policy"] / "policy", device, out)
        return suite.summary(list(iter_shards(out.folder / "samples", Sample)))


def _judge(config: SteeredRun, suite: Suite, trained: Path, device: torch.device, out: Output) -> None:
    """Sample all policies and have the suite score; finished shards and answered requests are never repeated."""
    prompts = suite.prompts()
    size = config.evaluate.batch_size
    policies: list[SampledPolicy] = ["base", "final"]
    if config.evaluate.base_guidance_scale is not None:
        policies.append("guided")
    pieces = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    batches = [(which, indices) for which in policies for indices in pieces]
    shards = PublishedShards(out, "samples", Sample, size)
    done = shards.rows_done
    task = Task("evaluate", "judging held-out samples", len(policies) * len(prompts), "images", done)
    policy: Policy | None = None
    loaded = ""
    encoded: dict[range, Encoded] = {}
    encoder: PolicyConfig | None = None
    for which, indices in batches:
        if done >= len(indices):
            done -= len(indices)
            continue
        if policy is None or loaded != which:
            final = which == "final"
            policy = load_policy(trained, device) if final else Policy(config.policy, device)
            loaded = which
        if encoder != policy.config:  # a trained policy has the encoders of its base
            encoded = _encoded(config.evaluate, policy, prompts, pieces)
            encoder = policy.config
        # A batch is made whole, as images may differ in the last bit with its size; what a shard has of it is kept.
        samples = _samples(config, policy, which, prompts, indices, encoded[indices], suite)[done:]
        done = 0
        shards.write(samples)
        task.advance(len(samples))
    shards.close()


def _encoded(
    settings: EvaluateConfig, policy: Policy, prompts: Sequence[Prompt], pieces: Sequence[range]
) -> dict[range, Encoded]:
    """Prompts of all batches, kept on the host."""
    guided = any(scale not in (None, 1) for scale in (settings.guidance_scale, settings.base_guidance_scale))
    with policy.encoders.here():
        return {piece: encode(policy, [prompts[i] for i in piece], guided).to(HOST) for piece in pieces}


def _samples(
    config: SteeredRun,
    policy: Policy,
    which: SampledPolicy,
    prompts: Sequence[Prompt],
    indices: range,
    encoded: Encoded,
    suite: Suite,
) -> list[Sample]:
    asked = [prompts[i] for i in indices]
    settings = config.evaluate
    guidance = settings.base_guidance_scale if which == "guided" else settings.guidance_scale
    assert guidance is not None, "guided samples have a scale"
    images = draw(
        policy,
        encoded,
        indices,
        config.seed,
        "evaluate",
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=guidance,
    )
    return [
        Sample(
            index=i,
            prompt=prompt,
            seed=seed_for(config.seed, "evaluate", i),
            policy=which,
            images=with_source(prompt, png),
            scores=scores,
        )
        for i, prompt, png, scores in zip(indices, asked, images, suite.score(asked, images), strict=True)
    ]
