"""Denoising: deterministic ODE solvers on the scheduler's own sigmas, optional classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from firm.dist import generator
from firm.policies.policy import Conditions, Policy

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], sigma [B]) -> velocity [B, ...]."""


def noise_for(shape: tuple[int, ...], seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """Initial noise [len(indices), *shape]; row i depends on (seed, purpose, index) only, not on the batching."""
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose, i)) for i in indices])


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """First-order integration of dx = v dsigma from sigma = sigmas[0] to sigmas[-1]."""
    x = noise
    for now, after in pairwise(sigmas):
        x = x + (after - now) * velocity(x, now.expand(len(x)))
    return x


def dpm2(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Second-order multistep DPM-Solver++ on x0 predictions (alpha = 1 - sigma), first and last step of first order.

    One velocity per step. Coefficients in float64: with s the signal-to-noise ratio (1 - sigma) / sigma, a first-order
    step is ``x <- (sigma' / sigma) x + (1 - sigma') (1 - s / s') x0``.
    """
    x = noise
    previous = None
    last = len(sigmas) - 2
    grid = [float(s) for s in sigmas.double()]
    for i, (now, after) in enumerate(pairwise(grid)):
        x0 = x - now * velocity(x, sigmas[i].expand(len(x)))
        target = x0
        if previous is not None and 0 < i < last and grid[i - 1] < 1:
            ratio = _log_snr_step(grid[i - 1], now) / _log_snr_step(now, after)
            target = x0 + (x0 - previous) / (2 * ratio)
        decay = (1 - now) * after / (now * (1 - after))
        x = (after / now) * x + (1 - after) * (1 - decay) * target
        previous = x0
    return x


def _log_snr_step(now: float, after: float) -> float:
    log = torch.tensor([now, after], dtype=torch.float64)
    snr = torch.log((1 - log) / log)
    return float(snr[1] - snr[0])


SOLVERS: dict[str, Callable[[Velocity, Tensor, Tensor], Tensor]] = {"euler": euler, "dpm2": dpm2}


@torch.no_grad()
def sample(
    policy: Policy,
    conditions: Conditions,
    noise: Tensor,
    num_inference_steps: int,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    negative: Conditions | None = None,
) -> Tensor:
    """Clean latents [B, ...] from ``noise`` [B, ...] under the parameter set in use.

    Args:
        policy: The policy.
        conditions: Encoded prompts, B rows.
        noise: Initial noise.
        num_inference_steps: Denoising steps.
        solver: "euler" or "dpm2".
        guidance_scale: 1 means no classifier-free guidance and one forward pass per step.
        negative: Encoded negative prompts, B rows; needed when guidance_scale is not 1.
    """
    noise = noise.to(policy.device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = policy.velocity(x, sigma, conditions)
        if guidance_scale == 1.0:
            return v
        assert negative is not None, "guidance needs the encoded negative prompts"
        return policy.guided(v, policy.velocity(x, sigma, negative), guidance_scale)

    return SOLVERS[solver](velocity, noise, policy.sigmas(num_inference_steps))
