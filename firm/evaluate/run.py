"""The evaluate stage: sample base and final policy on held-out prompts, judge both, compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from firm.config import RunConfig
from firm.critics.judge import Judge, JudgeInput, soft_scores
from firm.critics.load import load_critic, open_judge
from firm.dist import generator
from firm.policies.generate import generate, to_images
from firm.policies.policy import Policy, load_policy
from firm.policies.sampler import noise_for
from firm.progress import Task
from firm.prompts import load_prompts
from firm.records import Sample, Stage, Summary
from firm.seeds import seed_for
from firm.stats import mean_ci
from firm.storage.artifacts import Output
from firm.storage.shards import ShardWriter, iter_shards

STAGE = Stage(name="evaluate", sections=("seed", "prompts", "policy", "critic", "reward", "auditor", "evaluate"))
Which = Literal["base", "final"]


def run(config: RunConfig, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Compare ``config.policy`` with the policy in ``inputs["policy"]``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    critic = load_critic(inputs["critic"] / "critic", config.critic, device)
    auditor = open_judge(config.auditor.judge, config.auditor.rubrics)
    prompts = held_out(config)
    size = config.evaluate.batch_size
    batches = [(which, range(i, min(i + size, len(prompts)))) for which in _WHICH for i in range(0, len(prompts), size)]
    writer = ShardWriter(out.folder / "samples", Sample, size)
    done = sum(1 for _ in batches[: -(-writer.rows_done // size)])
    task = Task("evaluate", "judging held-out samples", 2 * len(prompts), "images", writer.rows_done)
    policy: Policy | None = None
    loaded = ""
    for which, indices in batches[done:]:
        if policy is None or loaded != which:
            policy = (
                Policy(config.policy, device) if which == "base" else load_policy(inputs["policy"] / "policy", device)
            )
            loaded = which
        written = writer.write(_samples(config, policy, which, prompts, indices, critic, auditor))
        out.publish(*(f"samples/{name}" for name in written))
        task.advance(len(indices))
    writer.close()
    return _summary(config, list(iter_shards(out.folder / "samples", Sample)))


_WHICH: tuple[Which, ...] = ("base", "final")


def held_out(config: RunConfig) -> list[str]:
    """The held-out prompt of each sample: every prompt equally often, in seeded order."""
    prompts = load_prompts(config.prompts, "test")
    order = torch.randperm(len(prompts), generator=generator(config.seed, "evaluate")).tolist()
    return [prompts[order[i % len(order)]] for i in range(config.evaluate.num_images)]


def _samples(
    config: RunConfig,
    policy: Policy,
    which: Which,
    prompts: Sequence[str],
    indices: range,
    critic: Judge,
    auditor: Judge,
) -> list[Sample]:
    asked = [prompts[i] for i in indices]
    generated = generate(
        policy,
        asked,
        noise_for(policy.latent_shape, config.seed, "evaluate", indices),
        num_inference_steps=config.evaluate.num_inference_steps,
        guidance_scale=config.evaluate.guidance_scale,
        batch_size=len(indices),
    )
    images = to_images(policy, generated.latents, len(indices))
    items = [JudgeInput(prompt, [png]) for prompt, png in zip(asked, images, strict=True)]
    judged = zip(indices, items, critic.judge(items), auditor.judge(items), strict=True)
    return [
        Sample(
            index=i,
            prompt=item.prompt,
            seed=seed_for(config.seed, "evaluate", i),
            policy=which,
            images=item.images,
            critic=by_critic,
            auditor=by_auditor,
        )
        for i, item, by_critic, by_auditor in judged
    ]


def _summary(config: RunConfig, samples: Sequence[Sample]) -> Summary:
    by = {which: [s for s in samples if s.policy == which] for which in _WHICH}
    rows = []
    metrics = {}
    for judge, dimension in _judged(config):
        scores = {w: soft_scores([getattr(s, judge) for s in by[w]], dimension) for w in _WHICH}
        differences = [
            f - b for b, f in zip(scores["base"], scores["final"], strict=True) if b is not None and f is not None
        ]
        if not differences:
            continue
        values = {w: [x for x in scores[w] if x is not None] for w in _WHICH} | {"gain": differences}
        for name, column in values.items():
            mean, low, high = mean_ci(column, config.evaluate.num_bootstrap, config.seed)
            metrics[f"{judge}_{dimension}_{name}"] = mean
            row = {"judge": judge, "dimension": dimension, "policy": name, "mean": mean, "low": low, "high": high}
            rows.append({**row, "n": len(column), "invalid": len(by["base"]) - len(column)})
        for which in _WHICH:
            full = [x >= 4.5 for x in values[which]]
            metrics[f"{judge}_{dimension}_full_marks_{which}"] = sum(full) / len(full)
    return Summary(stage="evaluate", metrics=metrics, tables={"scores": rows})


def _judged(config: RunConfig) -> Iterator[tuple[Literal["critic", "auditor"], str]]:
    yield from (("auditor", d) for d in config.auditor.rubrics)
    yield from (("critic", d) for d in config.critic.rubrics)
