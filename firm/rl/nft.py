"""DiffusionNFT mathematics (arXiv 2509.16117 eqs 1-8, as in NVlabs/DiffusionNFT): pure functions on tensors.

Notation: clean latents ``x0``, noise ``e``, sigma in (0, 1], ``x_t = (1 - sigma) x0 + sigma e``, velocity
``v = e - x0``, so ``x_t - sigma v`` predicts x0. ``r`` in [0, 1] is the optimality probability of a sample.
Legend of shapes: B samples, G groups, K members of a group; "..." are the latent dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPS = 1e-4
WEIGHT_CLIP = 1e-5
FLAT = 1e-6
"""Advantages closer to 0 are rounding: their group has no spread of reward."""


def advantages(rewards: Tensor, mask: Tensor, std: str = "global") -> tuple[Tensor, Tensor]:
    """Group-relative advantages that ignore masked samples.

    Args:
        rewards: [G, K]; masked entries may hold anything, NaN included.
        mask: [G, K] bool, True where the judgement is valid.
        std: "global" (over all valid samples) or "group"; population standard deviation + 1e-4.

    Returns:
        Advantages [G, K] (0 where masked) and the mask [G, K] of the samples that may train: members of groups with
        at least two valid samples, since one sample alone has nothing to be compared with.
    """
    mask = mask & (mask.sum(1, keepdim=True) >= 2)
    values = torch.where(mask, rewards, torch.zeros_like(rewards)).double()
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(mask, values - values.sum(1, keepdim=True) / count, torch.zeros_like(values))
    if std == "group":
        scale = (centred.square().sum(1, keepdim=True) / count).sqrt()
    else:
        mean = values.sum() / mask.sum().clamp(min=1)
        deviation = torch.where(mask, values - mean, torch.zeros_like(values))
        scale = (deviation.square().sum() / mask.sum().clamp(min=1)).sqrt()
    return (centred / (scale + STD_EPS)).to(rewards.dtype), mask


def worth_a_step(advantage: Tensor, mask: Tensor, skip_flat: bool, most: int | None) -> Tensor:
    """Which samples get a gradient step of those that may train; the others count as if their gradient were 0.

    Args:
        advantage: [G, K].
        mask: [G, K] bool, True where a sample may train.
        skip_flat: Leave out groups without any spread of reward.
        most: Keep only so many of a group, those with the largest absolute advantages, the first of equals; None: all.

    Returns:
        [G, K] bool, False wherever ``mask`` is.
    """
    size = torch.where(mask, advantage.abs(), -1.0)
    if skip_flat:
        mask = mask & (size > FLAT).any(1, keepdim=True)
    if most is not None:
        order = size.sort(dim=1, descending=True, stable=True).indices
        mask = mask & torch.zeros_like(mask).scatter(1, order[:, :most], True)
    return mask


def optimality(advantage: Tensor, clip: float, mode: str = "all") -> Tensor:
    """Map advantages to optimality probabilities r = clamp(A / (2 clip) + 1/2, 0, 1), after the mode's change of A."""
    clipped = advantage.clamp(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clamp(min=0)
    elif mode == "negative_only":
        clipped = clipped.clamp(max=0)
    elif mode == "one_only":
        clipped = (clipped > 0).to(advantage.dtype)
    elif mode == "binary":
        clipped = clipped.sign()
    elif mode != "all":
        raise ValueError(f"unknown advantage mode {mode!r}")
    return (clipped / (2 * clip) + 0.5).clamp(0, 1)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noised latents ``x_t`` [B, ...] of clean latents and noise [B, ...] at noise levels ``sigma`` [B] in (0, 1]."""
    s = _per_sample(sigma, x0)
    return (1 - s) * x0 + s * noise


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to multiply ``like`` [B, ...] sample by sample, whatever its rank."""
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Branches:
    """Self-normalised errors of the positive and the negative branch, each [B]."""

    positive: Tensor
    negative: Tensor


def branch_errors(x0: Tensor, x_t: Tensor, sigma: Tensor, v: Tensor, v_old: Tensor, beta: float) -> Branches:
    """Errors of the implicit positive and negative policies (eq. 5) in x0 form with the detached adaptive weight.

    ``v+ = (1 - beta) v_old + beta v`` and ``v- = (1 + beta) v_old - beta v``; the error of a branch is
    ``mean((x0_hat - x0)^2 / w)`` with ``w = max(mean |x0_hat - x0|, 1e-5)`` taken without gradient.

    Args:
        x0: Clean latents [B, ...].
        x_t: Noised latents [B, ...].
        sigma: Noise level of each sample [B].
        v: Velocity of the policy [B, ...]; carries the gradient.
        v_old: Velocity of the old policy [B, ...]; detached here.
        beta: Guidance strength, > 0.
    """
    if beta <= 0:
        raise ValueError("beta must be positive")
    s = _per_sample(sigma, x0)
    old_error = x_t - s * v_old.detach() - x0  # both branches are this error, moved by the same step either way
    move = s * beta * (v - v_old.detach())
    return Branches(_self_normalised(old_error - move), _self_normalised(old_error + move))


def _self_normalised(error: Tensor) -> Tensor:
    flat = error.flatten(1)
    weight = flat.detach().abs().mean(1, dtype=torch.float64).clamp(min=WEIGHT_CLIP).to(flat.dtype)
    return flat.square().mean(1) / weight


def policy_loss(errors: Branches, r: Tensor, beta: float, adv_clip_max: float) -> Tensor:
    """Per-sample loss [B]: ``adv_clip_max * (r L+ + (1 - r) L-) / beta``."""
    return adv_clip_max * (r * errors.positive + (1 - r) * errors.negative) / beta


def kl_loss(v: Tensor, v_ref: Tensor) -> Tensor:
    """Per-sample KL surrogate [B]: mean squared distance of the velocities of the policy and the reference."""
    return (v - v_ref.detach()).flatten(1).square().mean(1)


def sampled_kl(v: Tensor, v_ref: Tensor, rows: Tensor, share: float) -> Tensor:
    """Estimate [B] of :func:`kl_loss` from some rows, with the same expectation: theirs over ``share``, 0 for the rest.

    Args:
        v: Velocity of the policy [B, ...].
        v_ref: Velocity of the reference for ``rows`` [b, ...].
        rows: Rows of ``v`` that were drawn [b], each with probability ``share``.
        share: In (0, 1].
    """
    return v.new_zeros(len(v)).index_add(0, rows, kl_loss(v[rows], v_ref) / share)


@dataclass(frozen=True)
class Loss:
    """The loss and its parts, each [B].

    Attributes:
        total: ``policy + kl_weight * kl``; what is minimised.
        policy: :func:`policy_loss`.
        kl: :func:`kl_loss` or its estimate, 0 without a reference.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor


def nft_loss(
    x0: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    v: Tensor,
    v_old: Tensor,
    kl: Tensor | None,
    r: Tensor,
    *,
    beta: float,
    adv_clip_max: float,
    kl_weight: float,
) -> Loss:
    """The loss of DiffusionNFT (eq. 5 weighted by ``r`` [B]) with a KL to the reference where there is one.

    Shapes are those of :func:`branch_errors`; ``kl`` [B] carries its gradient, None without one.
    """
    policy = policy_loss(branch_errors(x0, x_t, sigma, v, v_old, beta), r, beta, adv_clip_max)
    if kl is None:
        return Loss(policy, policy, torch.zeros_like(policy))
    return Loss(policy + kl_weight * kl, policy, kl)


def old_decay(kind: str, step: int) -> float:
    """Share d of the old policy that survives a refresh ``old <- d old + (1 - d) policy`` after ``step`` updates."""
    if kind == "copy":
        return 0.0
    if kind == "linear_to_0.5":
        return min(0.001 * step, 0.5)
    if kind == "delayed_linear_to_0.999":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"unknown decay {kind!r}")


def ema_decay(maximum: float, step: int) -> float:
    """Decay of the exponential moving average after ``step`` updates: min((1 + s) / (10 + s), maximum)."""
    return min((1 + step) / (10 + step), maximum)
