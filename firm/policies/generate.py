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
class Encoded:
    """Prompts of N samples.

    Attributes:
        conditions: The distinct prompts encoded, one row each, in the order of their first sample.
        rows: Row of ``conditions`` for each sample [N].
        negative: What guidance moves away from: the empty prompt, with the same source. None without guidance.
    """

    conditions: Conditions
    rows: Tensor
    negative: Encoded | None = None

    def to(self, device: torch.device) -> Encoded:
        """The same on a device."""
        return Encoded(self.conditions.to(device), self.rows.to(device), self.negative and self.negative.to(device))

    def of(self, samples: slice) -> Conditions:
        """Conditions of some of the samples, one row each."""
        return self.conditions.select(self.rows[samples])


@dataclass(frozen=True)
class Generated:
    """N samples: clean latents [N, ...], and of what."""

    latents: Tensor
    encoded: Encoded


def encode(policy: Policy, prompts: Sequence[Prompt], guided: bool = False) -> Encoded:
    """Prompts of N > 0 samples, equal ones once; for guidance also what it moves away from."""
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    rows = torch.tensor([row[prompt] for prompt in prompts], device=policy.device)
    with policy.encoders.here():
        conditions = policy.encode(list(row))
        away = encode(policy, [Prompt(text="", image=prompt.image) for prompt in prompts]) if guided else None
    return Encoded(conditions, rows, away)


def generate(
    policy: Policy,
    encoded: Encoded,
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
        encoded: Prompts of the samples, on any device.
        noise: Initial noise [N, ...], see :func:`firm.policies.sampler.noise_for`.
        num_inference_steps: Denoising steps.
        solver: "euler" or "dpm2".
        guidance_scale: Classifier-free guidance against the empty prompt, with the same source; 1 means none.
        batch_size: Samples denoised together.
        each: Called with the latents of each batch, in order, before the next one is denoised.
    """
    encoded = encoded.to(policy.device)
    negative = encoded.negative if guidance_scale != 1 else None

    def denoised(samples: slice) -> Tensor:
        other = negative.of(samples) if negative else None
        given = encoded.of(samples), noise[samples]
        return sample(policy, *given, num_inference_steps, solver, guidance_scale, other)

    starts = range(0, len(noise), batch_size)
    idle = policy.passes(len(starts)) - len(starts)
    parts = []
    for start in starts:
        parts.append(denoised(slice(start, start + batch_size)))
        each(parts[-1])
    for _ in range(idle):  # others have more batches, and need this rank's share
        denoised(slice(1))
    return Generated(torch.cat(parts), encoded)


def to_images(policy: Policy, latents: Tensor, batch_size: int) -> list[bytes]:
    """PNG images of clean latents [N, ...], decoded ``batch_size`` at a time."""
    images = torch.cat([policy.decode(part) for part in latents.split(batch_size)])
    return [encode_image(Image.fromarray(image)) for image in images.cpu().numpy()]


def draw(
    policy: Policy,
    encoded: Encoded,
    indices: Sequence[int],
    seed: int,
    purpose: str,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> list[bytes]:
    """PNG images of N prompts, as one batch; the noise of each depends on (seed, purpose, its index) only."""
    generated = generate(
        policy,
        encoded,
        noise_for(policy.latent_shape, seed, purpose, indices),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=len(indices),
    )
    return to_images(policy, generated.latents, len(indices))


def equally_often(prompts: Sequence[Prompt], number: int, seed: int, purpose: str) -> list[Prompt]:
    """The prompt of each of ``number`` samples: every prompt equally often, in seeded order."""
    order = torch.randperm(len(prompts), generator=generator(seed, purpose)).tolist()
    return [prompts[order[i % len(order)]] for i in range(number)]
