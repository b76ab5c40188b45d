"""Solvers on velocity fields with known solutions, noise, guidance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from firm.policies.policy import Conditions
from firm.policies.sampler import SOLVERS, noise_for, sample

NOISE = torch.tensor([[1.5], [-0.5], [0.2]], dtype=torch.float64)


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def affine(x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma = x + sigma, so x + sigma + 1 grows by a factor of e from 0 to 1."""
    return x + sigma.view(-1, 1)


def orders(solver: str, start: float, end: float, *numbers: int) -> list[float]:
    """Observed orders of convergence when the number of steps doubles."""
    exact = (NOISE + start + 1) * math.exp(end - start) - end - 1
    grids = (torch.linspace(start, end, number + 1, dtype=torch.float64) for number in numbers)
    errors = [(SOLVERS[solver](affine, NOISE, sigmas) - exact).abs().max().item() for sigmas in grids]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm2", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    assert orders(solver, 0.9, 0.1, 80, 160, 320) == pytest.approx([order] * 2, abs=0.25)
    # from pure noise to the end the log of the signal-to-noise ratio is infinite, which costs a logarithm
    assert orders(solver, 1, 0, 320, 640)[0] > order - 0.25


def test_at_few_steps_the_second_order_is_the_better() -> None:
    exact = (NOISE + 2) * math.exp(-1) - 1
    euler, dpm2 = ((SOLVERS[s](affine, NOISE, grid(10)) - exact).abs().max() for s in ("euler", "dpm2"))
    assert dpm2 < euler / 10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_straight_path_is_exact_at_any_number_of_steps(solver: str, steps: int) -> None:
    x0 = torch.tensor([[0.3], [0.1], [-2.0]], dtype=torch.float64)
    found = SOLVERS[solver](lambda x, _: NOISE - x0, NOISE, grid(steps))
    torch.testing.assert_close(found, x0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_end_is_the_last_prediction_of_x0(solver: str) -> None:
    predictions: list[Tensor] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = affine(x, sigma)
        predictions.append(x - sigma.view(-1, 1) * v)
        return v

    found = SOLVERS[solver](velocity, NOISE, grid(7))
    torch.testing.assert_close(found, predictions[-1])
    assert len(predictions) == 7  # one velocity a step
    assert found.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_uneven_grid_is_followed(solver: str) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (3,)
        seen.append(sigma[0].item())
        return affine(x, sigma)

    sigmas = torch.tensor([1.0, 0.9, 0.4, 0.0], dtype=torch.float64)
    SOLVERS[solver](velocity, NOISE, sigmas)
    assert seen == sigmas[:-1].tolist()


def test_noise_depends_on_seed_purpose_and_index_only() -> None:
    together = noise_for((2, 3), 7, "rollout/0", [4, 0, 9])
    alone = torch.cat([noise_for((2, 3), 7, "rollout/0", [i]) for i in (4, 0, 9)])
    assert torch.equal(together, alone)
    others = [noise_for((2, 3), 8, "rollout/0", [4]), noise_for((2, 3), 7, "rollout/1", [4]), together[1:2]]
    assert not any(torch.equal(other, alone[:1]) for other in others)
    many = noise_for((1000,), 0, "n", range(4))
    assert abs(many.mean().item()) < 0.1 and many.std().item() == pytest.approx(1, abs=0.05)


@dataclass
class Linear:
    """A policy whose velocity is its condition times sigma, and which notes what it is asked."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    asked: list[float] = field(default_factory=list)
    schedule: Sequence[float] = (1.0, 0.75, 0.2, 0.0)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        assert num_inference_steps == len(self.schedule) - 1
        return torch.tensor(self.schedule)

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.asked.append(sigma[0].item())
        return conditions.tensors["c"].view(-1, 1, 1, 1).expand_as(latents)

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (velocity - negative)


def condition(*values: float) -> Conditions:
    return Conditions({"c": torch.tensor(values)})


def run(policy: Linear, sampler: Callable[..., Tensor] = sample, **options: object) -> Tensor:
    return sampler(policy, condition(1.0, 3.0), torch.zeros(2, 1, 2, 2), 3, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_moves_from_the_negative_prompt_through_the_prompt(solver: str) -> None:
    policy = Linear()
    guided = run(policy, solver=solver, guidance_scale=4.0, negative=condition(-1.0, 2.0))
    velocities = torch.tensor([-1 + 4 * (1 + 1), 2 + 4 * (3 - 2)])
    torch.testing.assert_close(guided, -velocities.view(2, 1, 1, 1).expand(2, 1, 2, 2).float())
    assert len(policy.asked) == 6


def test_without_guidance_one_forward_a_step_on_the_schedulers_own_sigmas() -> None:
    policy = Linear()
    plain = run(policy)
    assert policy.asked == pytest.approx([1.0, 0.75, 0.2])
    torch.testing.assert_close(plain, -torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2))
    assert torch.equal(run(policy, guidance_scale=1.0, negative=condition(-1.0, 2.0)), plain)
    with pytest.raises(AssertionError, match="negative"):
        run(policy, guidance_scale=2.0)
