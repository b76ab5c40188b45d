"""From prompts and noise to latents, and from latents to PNG images: the same way in every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from firm.dist import generator
from firm.images import encode_image
from firm.policies.policy import Conditions, Policy
from firm.policies.sampler import noise_for, sample
from firm.records import Prompt


@dataclass(frozen=True)
class Generated:
    """N samples.

    Attributes:
        latents: Clean latents [N, ...].
        conditions: The distinct prompts encoded, one row each, in the order of their first sample.
        rows: Row of ``conditions`` for each sample [N].
    """

    latents: Tensor
    conditions: Conditions
    rows: Tensor


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    noise: Tensor,
    *,
    num_inference_steps: int,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    batch_size: int,
    each: Callable[[Tensor], None] = lambda _: None,
) -> Generated:
    """Sample one image per prompt under the parameter set in use.

    Args:
        policy: The policy.
        prompts: Prompt of each sample, N > 0; equal ones are encoded once.
        noise: Initial noise [N, ...], see :func:`firm.policies.sampler.noise_for`.
        num_inference_steps: Denoising steps.
        solver: "euler" or "dpm2".
        guidance_scale: Classifier-free guidance against the empty prompt, with the same source; 1 means none.
        batch_size: Samples denoised together.
        each: Called with the latents of each batch, in order, before the next one is denoised.
    """
    conditions, rows = _encode(policy, prompts)
    negative: list[Conditions | None] = [None] * len(rows.split(batch_size))
    if guidance_scale != 1:
        away, away_rows = _encode(policy, [Prompt(text="", image=prompt.image) for prompt in prompts])
        negative = [away.select(r) for r in away_rows.split(batch_size)]
    idle = policy.passes(len(negative)) - len(negative)
    parts = []
    for r, n, other in zip(rows.split(batch_size), noise.split(batch_size), negative, strict=True):
        parts.append(sample(policy, conditions.select(r), n, num_inference_steps, solver, guidance_scale, other))
        each(parts[-1])
    for _ in range(idle):  # others have more batches, and need this rank's share
        sample(policy, conditions.select(rows[:1]), noise[:1], num_inference_steps, solver, guidance_scale, negative[0])
    return Generated(torch.cat(parts), conditions, rows)


def _encode(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Conditions, Tensor]:
    """The distinct prompts encoded, in the order of their first, and the row of each [N]."""
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return policy.encode(list(row)), torch.tensor([row[prompt] for prompt in prompts], device=policy.device)


def to_images(policy: Policy, latents: Tensor, batch_size: int) -> list[bytes]:
    """PNG images of clean latents [N, ...], decoded ``batch_size`` at a time."""
    images = torch.cat([policy.decode(part) for part in latents.split(batch_size)])
    return [encode_image(Image.fromarray(image)) for image in images.cpu().numpy()]


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    seed: int,
    purpose: str,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> list[bytes]:
    """PNG images of prompts [N], as one batch; the noise of each depends on (seed, purpose, its index) only."""
    generated = generate(
        policy,
        prompts,
        noise_for(policy.latent_shape, seed, purpose, indices),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=len(prompts),
    )
    return to_images(policy, generated.latents, len(prompts))


def equally_often(prompts: Sequence[Prompt], number: int, seed: int, purpose: str) -> list[Prompt]:
    """The prompt of each of ``number`` samples: every prompt equally often, in seeded order."""
    order = torch.randperm(len(prompts), generator=generator(seed, purpose)).tolist()
    return [prompts[order[i % len(order)]] for i in range(number)]
