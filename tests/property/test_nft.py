"""The mathematics of DiffusionNFT: numerical invariants T1-T14 of the method, in float64."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firm.rl.nft import (
    Loss,
    add_noise,
    advantages,
    branch_errors,
    ema_decay,
    kl_loss,
    nft_loss,
    old_decay,
    optimality,
    policy_loss,
    sampled_kl,
    worth_a_step,
)

B, SHAPE, CLIP = 3, (2, 4, 4), 5.0
D = math.prod(SHAPE)
SEEDS = st.integers(0, 2**32)
BETAS = st.floats(0.05, 3.0)
PROBABILITIES = st.floats(0.0, 1.0)
MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


@dataclass
class Draw:
    """Random tensors of one update; ``target`` is the true velocity."""

    x0: Tensor
    x_t: Tensor
    sigma: Tensor
    target: Tensor
    v: Tensor
    v_old: Tensor

    @property
    def s(self) -> Tensor:
        return self.sigma.view(-1, 1, 1, 1)

    def loss(self, v: Tensor, r: Tensor, beta: float, clip: float = CLIP) -> Tensor:
        return policy_loss(branch_errors(self.x0, self.x_t, self.sigma, v, self.v_old, beta), r, beta, clip)

    def gradient(self, v: Tensor, r: Tensor, beta: float) -> Tensor:
        leaf = v.clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, r, beta).sum(), leaf)[0]


def draw(seed: int) -> Draw:
    g = torch.Generator().manual_seed(seed)
    x0, noise, v, v_old = (torch.randn(B, *SHAPE, generator=g, dtype=torch.float64) for _ in range(4))
    sigma = torch.rand(B, generator=g, dtype=torch.float64) * 0.999 + 0.001
    s = sigma.view(-1, 1, 1, 1)
    return Draw(x0, (1 - s) * x0 + s * noise, sigma, noise - x0, v, v_old)


def all_r(r: float) -> Tensor:
    return torch.full((B,), r, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the loss on-policy (v = v_old)


@given(SEEDS, PROBABILITIES, BETAS)
def test_on_policy_the_branches_are_equal_and_the_loss_does_not_depend_on_r(seed: int, r: float, beta: float) -> None:
    d = draw(seed)
    errors = branch_errors(d.x0, d.x_t, d.sigma, d.v_old, d.v_old, beta)
    assert torch.equal(errors.positive, errors.negative)
    close(d.loss(d.v_old, all_r(r), beta), CLIP * errors.positive / beta)
    close(d.loss(d.v_old, all_r(r), beta) * beta, d.loss(d.v_old, all_r(0.3), 1.0))


@given(SEEDS, PROBABILITIES, BETAS)
def test_on_policy_the_gradient_has_its_closed_form(seed: int, r: float, beta: float) -> None:
    d = draw(seed)
    gap = d.v_old - d.target
    weight = (d.s * gap).abs().mean((1, 2, 3), keepdim=True)
    expected = (2 * r - 1) * CLIP * 2 * d.s**2 * gap / (weight * D)
    close(d.gradient(d.v_old, all_r(r), beta), expected)
    close(d.gradient(d.v_old, all_r(r), beta), -d.gradient(d.v_old, all_r(1 - r), beta))


@given(SEEDS, BETAS)
def test_on_policy_an_average_sample_does_not_pull(seed: int, beta: float) -> None:
    d = draw(seed)
    assert d.gradient(d.v_old, all_r(0.5), beta).abs().max() < 1e-13


@given(SEEDS, st.lists(st.floats(-5, 5), min_size=B, max_size=B))
def test_on_policy_the_gradient_is_the_advantage_times_flow_matching(seed: int, values: list[float]) -> None:
    d, advantage = draw(seed), torch.tensor(values, dtype=torch.float64)
    leaf = d.v_old.clone().requires_grad_()
    error = d.x_t - d.s * leaf - d.x0
    matching = (error.square().mean((1, 2, 3)) / error.detach().abs().mean((1, 2, 3))).sum()
    expected = advantage.view(-1, 1, 1, 1) * torch.autograd.grad(matching, leaf)[0]
    close(d.gradient(d.v_old, optimality(advantage, CLIP), 1.0), expected)


@given(SEEDS, BETAS)
def test_good_samples_attract_and_bad_ones_repel(seed: int, beta: float) -> None:
    d = draw(seed)

    def distance_after_step(r: float) -> Tensor:
        v = d.v_old - 1e-3 * d.gradient(d.v_old, all_r(r), beta)
        return (d.x_t - d.s * v - d.x0).square().mean((1, 2, 3))

    now = (d.x_t - d.s * d.v_old - d.x0).square().mean((1, 2, 3))
    assert bool((distance_after_step(1.0) < now).all()) and bool((distance_after_step(0.0) > now).all())


# ---- the loss in general


@given(SEEDS)
def test_beta_one_makes_the_positive_branch_the_policy_itself(seed: int) -> None:
    d = draw(seed)
    other = Draw(d.x0, d.x_t, d.sigma, d.target, d.v, d.v_old + 1)
    close(d.loss(d.v, all_r(1), 1.0), other.loss(d.v, all_r(1), 1.0))  # supervised: the old policy has no part in it
    error = d.x_t - d.s * d.v - d.x0
    close(d.loss(d.v, all_r(1), 1.0), CLIP * error.square().mean((1, 2, 3)) / error.abs().mean((1, 2, 3)))
    assert not torch.allclose(d.loss(d.v, all_r(0), 1.0), other.loss(d.v, all_r(0), 1.0))


@given(SEEDS, PROBABILITIES)
def test_a_small_beta_gives_the_gradient_of_the_old_policy(seed: int, r: float) -> None:
    d = draw(seed)
    close(d.gradient(d.v, all_r(r), 1e-7), d.gradient(d.v_old, all_r(r), 1.0), 1e-4)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta: float) -> None:
    d = draw(0)
    with pytest.raises(ValueError, match="beta"):
        d.loss(d.v, all_r(1), beta)


@given(SEEDS, PROBABILITIES, BETAS)
def test_swapping_the_branches_mirrors_r_and_the_loss_is_affine_in_r(seed: int, r: float, beta: float) -> None:
    d = draw(seed)
    close(d.loss(d.v, all_r(r), beta), d.loss(2 * d.v_old - d.v, all_r(1 - r), beta))
    mixed = r * d.loss(d.v, all_r(1), beta) + (1 - r) * d.loss(d.v, all_r(0), beta)
    close(d.loss(d.v, all_r(r), beta), mixed)


@given(SEEDS, BETAS)
def test_the_x0_form_is_the_velocity_form_times_sigma(seed: int, beta: float) -> None:
    d = draw(seed)
    errors = branch_errors(d.x0, d.x_t, d.sigma, d.v, d.v_old, beta)
    plus, minus = (1 - beta) * d.v_old + beta * d.v, (1 + beta) * d.v_old - beta * d.v
    for found, v in ((errors.positive, plus), (errors.negative, minus)):
        gap = v - d.target
        close(found, d.sigma * gap.square().mean((1, 2, 3)) / gap.abs().mean((1, 2, 3)))


@given(SEEDS, PROBABILITIES, BETAS)
def test_the_adaptive_weight_carries_no_gradient(seed: int, r: float, beta: float) -> None:
    d = draw(seed)

    def parts(v: Tensor) -> tuple[Tensor, Tensor]:
        old_error, move = d.x_t - d.s * d.v_old - d.x0, d.s * beta * (v - d.v_old)
        return old_error - move, old_error + move

    weights = [e.abs().mean((1, 2, 3)) for e in parts(d.v)]

    def surrogate(v: Tensor, fixed: bool) -> Tensor:
        w = weights if fixed else [e.abs().mean((1, 2, 3)) for e in parts(v)]
        positive, negative = (e.square().mean((1, 2, 3)) / w for e, w in zip(parts(v), w, strict=True))
        return (CLIP * (r * positive + (1 - r) * negative) / beta).sum()

    found = d.gradient(d.v, all_r(r), beta)
    leaf = d.v.clone().requires_grad_()
    assert not torch.allclose(found, torch.autograd.grad(surrogate(leaf, fixed=False), leaf)[0])
    direction = torch.randn(d.v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ahead, behind = (surrogate(d.v + sign * 1e-5 * direction, fixed=True) for sign in (1, -1))
    close((ahead - behind) / 2e-5, (found * direction).sum(), 1e-6)


def test_no_gradient_reaches_the_old_policy_or_the_reference() -> None:
    d = draw(1)
    v, v_old, v_ref = (t.clone().requires_grad_() for t in (d.v, d.v_old, d.target))
    errors = branch_errors(d.x0, d.x_t, d.sigma, v, v_old, 0.5)
    (policy_loss(errors, all_r(0.8), 0.5, CLIP) + kl_loss(v, v_ref)).sum().backward()
    assert v.grad is not None and v_old.grad is None and v_ref.grad is None


def test_a_perfect_prediction_is_finite_and_a_tiny_error_meets_the_clipped_weight() -> None:
    d = draw(2)
    assert d.loss(d.target, all_r(1), 1.0).tolist() == pytest.approx([0.0] * B, abs=1e-9)
    assert d.gradient(d.target, all_r(1), 1.0).isfinite().all()
    tiny = branch_errors(d.x0, d.x0 + 1e-7, torch.ones(B), torch.zeros_like(d.v), torch.zeros_like(d.v), 1.0)
    close(tiny.positive, torch.full((B,), 1e-14 / 1e-5, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_velocities_give_a_finite_loss_at_sigma_one(dtype: torch.dtype) -> None:
    d = draw(3)
    v = d.v.to(dtype).requires_grad_()
    errors = branch_errors(d.x0.float(), d.x_t.float(), torch.ones(B), v, d.v_old.to(dtype), 1.0)
    loss = policy_loss(errors, all_r(1).float(), 1.0, CLIP)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and v.grad is not None and v.grad.isfinite().all()


@given(SEEDS)
def test_kl_is_zero_with_zero_gradient_at_the_start_and_the_mean_square_elsewhere(seed: int) -> None:
    d = draw(seed)
    leaf = d.v.clone().requires_grad_()
    start = kl_loss(leaf, d.v)
    assert start.tolist() == [0.0] * B
    assert not torch.autograd.grad(start.sum(), leaf)[0].any()
    close(kl_loss(d.v, d.v_old), (d.v - d.v_old).square().mean((1, 2, 3)))


@given(SEEDS, st.floats(0.05, 1))
def test_the_kl_of_some_samples_has_the_expectation_and_gradient_of_that_of_all(seed: int, share: float) -> None:
    d = draw(seed)
    leaf = d.v.clone().requires_grad_()
    expected = torch.zeros(B, dtype=torch.float64)
    for drawn in itertools.product([False, True], repeat=B):  # all that may be drawn, by how likely it is
        rows = torch.tensor(drawn).nonzero().flatten()
        chance = share ** len(rows) * (1 - share) ** (B - len(rows))
        expected = expected + chance * sampled_kl(leaf, d.target[rows], rows, share)
    close(expected, kl_loss(d.v, d.target))
    everything = kl_loss(leaf, d.target).sum()
    close(torch.autograd.grad(expected.sum(), leaf)[0], torch.autograd.grad(everything, leaf)[0])


@given(SEEDS, PROBABILITIES, BETAS, st.sampled_from([0.0, 0.5]))
def test_packed_latents_have_the_loss_of_the_same_numbers(seed: int, r: float, beta: float, kl_weight: float) -> None:
    d = draw(seed)

    def loss(pack: Callable[[Tensor], Tensor]) -> Loss:
        x0, v, v_old = pack(d.x0), pack(d.v), pack(d.v_old)
        x_t = add_noise(x0, pack(d.target + d.x0), d.sigma)
        close(x_t, pack(d.x_t))
        kl = kl_loss(v, pack(d.target)) if kl_weight else None
        return nft_loss(x0, x_t, d.sigma, v, v_old, kl, all_r(r), beta=beta, adv_clip_max=CLIP, kl_weight=kl_weight)

    images, packed = loss(lambda x: x), loss(lambda x: x.flatten(2).transpose(1, 2))  # [B, C, H, W], [B, H * W, C]
    for a, b in ((images.total, packed.total), (images.policy, packed.policy), (images.kl, packed.kl)):
        assert a.shape == (B,)
        close(a, b)
    close(images.total, d.loss(d.v, all_r(r), beta) + kl_weight * kl_loss(d.v, d.target))


# ---- from rewards to r


@given(st.floats(-50, 50), st.floats(0.1, 10), st.sampled_from(MODES))
def test_optimality_in_all_modes(value: float, clip: float, mode: str) -> None:
    r = optimality(torch.tensor([value], dtype=torch.float64), clip, mode).item()
    clipped = max(-clip, min(clip, value))
    changed = {
        "all": clipped,
        "positive_only": max(clipped, 0.0),
        "negative_only": min(clipped, 0.0),
        "one_only": float(clipped > 0),
        "binary": math.copysign(1, clipped) if clipped else 0.0,
    }[mode]
    assert r == pytest.approx(min(max(changed / (2 * clip) + 0.5, 0), 1), abs=1e-12)


def test_optimality_saturates_and_knows_its_modes() -> None:
    r = optimality(torch.tensor([0.0, 5, -5, 99, -99]), 5.0)
    assert r.tolist() == [0.5, 1, 0, 1, 0]
    assert optimality(torch.tensor([3.0, 0, -3]), 5.0, "binary").tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert optimality(torch.tensor([3.0, 0, -3]), 5.0, "one_only").tolist() == pytest.approx([0.6, 0.5, 0.5])
    with pytest.raises(ValueError, match="unknown advantage mode"):
        optimality(torch.zeros(1), 5.0, "positive")


GROUPS = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=k, max_size=k), min_size=1)
)
STDS = st.sampled_from(["global", "group"])


def split(groups: list[list[tuple[float, bool]]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(groups, dtype=torch.float64)
    return table[..., 0], table[..., 1].bool()


@given(GROUPS, STDS)
def test_advantages_follow_their_definition_over_valid_samples(
    groups: list[list[tuple[float, bool]]], std: str
) -> None:
    rewards, valid = split(groups)
    found, mask = advantages(rewards, valid, std)
    assert torch.equal(mask, valid & (valid.sum(1, keepdim=True) >= 2))
    assert not found[~mask].any()
    everything = rewards[mask]
    for row, kept, of in zip(found, mask, rewards, strict=True):
        if kept.any():
            scale = (of[kept] if std == "group" else everything).std(unbiased=False)
            close(row[kept], (of[kept] - of[kept].mean()) / (scale + 1e-4), 1e-7)


@given(GROUPS, STDS, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_a_masked_sample_holds_does_not_matter(
    groups: list[list[tuple[float, bool]]], std: str, junk: float
) -> None:
    rewards, valid = split(groups)
    spoilt = torch.where(valid, rewards, torch.full_like(rewards, junk))
    assert torch.equal(advantages(spoilt, valid, std)[0], advantages(rewards, valid, std)[0])


@given(GROUPS, STDS, st.floats(-1, 1), st.randoms())
def test_advantages_ignore_a_shift_and_follow_a_permutation(
    groups: list[list[tuple[float, bool]]], std: str, shift: float, random: Random
) -> None:
    rewards, valid = split(groups)
    found, _ = advantages(rewards, valid, std)
    close(advantages(rewards + shift, valid, std)[0], found, 1e-7)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    close(advantages(rewards[:, order], valid[:, order], std)[0], found[:, order])


@pytest.mark.parametrize("std", ["global", "group"])
def test_constant_rewards_give_zeros_and_a_lone_valid_sample_is_masked(std: str) -> None:
    found, mask = advantages(torch.full((3, 4), 0.7), torch.ones(3, 4, dtype=torch.bool), std)
    assert not found.any() and mask.all()
    found, mask = advantages(torch.rand(2, 3), torch.tensor([[True, False, False], [True, True, False]]), std)
    assert mask.tolist() == [[False] * 3, [True, True, False]] and not found[0].any() and found[1, 0] != 0
    found, mask = advantages(torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool), std)
    assert not found.any() and not mask.any()


# ---- schedules


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("copy", {0: 0, 1: 0, 500: 0}),
        ("linear_to_0.5", {0: 0, 1: 0.001, 74: 0.074, 75: 0.075, 76: 0.076, 209: 0.209, 500: 0.5, 9999: 0.5}),
        (
            "delayed_linear_to_0.999",
            {0: 0, 1: 0, 74: 0, 75: 0, 76: 0.0075, 100: 0.1875, 150: 0.5625, 200: 0.9375, 208: 0.9975, 209: 0.999},
        ),
    ],
)
def test_decay_of_the_old_policy(kind: str, table: dict[int, float]) -> None:
    assert {step: old_decay(kind, step) for step in table} == pytest.approx(table)


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown decay"):
        old_decay("linear", 1)


def test_decay_of_the_average() -> None:
    assert [ema_decay(0.9, s) for s in (0, 1, 8, 79, 80, 10**6)] == pytest.approx([0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9])


# ---- which samples get a gradient step


ADVANTAGES = st.integers(2, 5).flatmap(
    lambda k: st.lists(
        st.lists(st.tuples(st.sampled_from([-2.0, -1, 0, 0, 1, 1.5]), st.booleans()), min_size=k, max_size=k),
        min_size=1,
    )
)


@given(ADVANTAGES, st.booleans(), st.none() | st.integers(1, 6))
def test_the_most_different_samples_of_groups_with_a_spread_get_a_step(
    groups: list[list[tuple[float, bool]]], skip_flat: bool, most: int | None
) -> None:
    advantage, mask = split(groups)
    chosen = worth_a_step(advantage, mask, skip_flat, most)
    assert not chosen[~mask].any()
    for values, valid, kept in zip(advantage, mask, chosen, strict=True):
        if skip_flat and not values[valid].any():
            assert not kept.any()
            continue
        number = int(valid.sum())
        assert kept.sum() == (number if most is None else min(most, number))
        left = [(abs(v), -i) for i, v in enumerate(values.tolist()) if valid[i] and not kept[i]]
        taken = [(abs(v), -i) for i, v in enumerate(values.tolist()) if kept[i]]
        assert all(a > b for a in taken for b in left), "the first of equals"


def test_equal_rewards_are_flat_however_they_are_rounded() -> None:
    advantage, mask = advantages(torch.tensor([[0.1] * 7, [0.1] * 6 + [0.2]]), torch.ones(2, 7, dtype=torch.bool))
    assert worth_a_step(advantage + 1e-9, mask, True, None).any(1).tolist() == [False, True]
