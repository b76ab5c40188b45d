"""The update: equivalent ways of splitting it give the same step, and nothing is computed in vain."""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from shared import ALONE, CPU, TINY
from torch import Tensor

from firm.config import LoraConfig, PolicyConfig, RLConfig
from firm.policies.policy import Policy
from firm.policies.sampler import noise_for
from firm.records import Prompt
from firm.rl.nft import add_noise, kl_loss, nft_loss, optimality
from firm.rl.rollout import Rollout
from firm.rl.update import Updater

PROMPTS = [Prompt(text=text) for text in ("a red circle", "a blue square")]
N = 6
Make = Callable[..., Updater]


@pytest.fixture
def make() -> Make:
    """make(**settings): an updater on a fresh policy whose old and reference parameters differ from it."""

    def made(
        lora: LoraConfig | None = None, spread: float = 0.02, seed: int = 3, dtype: str = "float32", **changes: Any
    ) -> Updater:
        few: dict[str, Any] = {
            "prompts_per_epoch": 2, "group_size": 3, "max_epochs": 1, "num_inference_steps": 4, "kl_weight": 0,
            "batch_size": N, "learning_rate": 1e-4, "lora": lora,
        }  # fmt: skip
        rl = RLConfig(**{**few, **changes})
        policy = Policy(PolicyConfig(**{**TINY.model_dump(), "dtype": dtype}), CPU)
        sets = policy.train(lora, ("old", "ema", *(("reference",) if rl.kl_weight else ())), seed=0)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in [t for s in ("old", "reference") for t in sets.sets.get(s, [])]:
                tensor.add_(torch.randn(tensor.shape, generator=g) * spread)
        return Updater(policy, rl, seed, ALONE)

    return made


def rolled(policy: Policy, trained: list[bool] | None = None, advantage: Tensor | None = None) -> Rollout:
    mask = torch.tensor(trained or [True] * N)
    values = torch.linspace(-2, 2, N) if advantage is None else advantage
    return Rollout(
        latents=noise_for(policy.latent_shape, 0, "x0", range(N)),
        conditions=policy.encode(PROMPTS),
        rows=torch.arange(2).repeat_interleave(3),
        advantage=torch.where(mask, values, 0.0),
        first=0,
        trained=mask,
        stats={},
    )


def gradients(updater: Updater, rollout: Rollout) -> list[Tensor]:
    """Of the last step of an epoch."""
    updater.epoch(rollout, 0)
    return [p.grad.clone() for p in updater.sets.trainable if p.grad is not None]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=tolerance)


def count_forwards(policy: Policy) -> list[int]:
    """Batch sizes of the denoiser's forward passes from now on."""
    seen: list[int] = []
    policy.family.denoiser.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("timesteps", ["scheduler", "uniform"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_micro_batches_give_the_step_of_the_whole_batch(make: Make, timesteps: str, batch_size: int) -> None:
    whole = make(timesteps=timesteps, kl_weight=0.1)
    expected = gradients(whole, rolled(whole.policy))
    parts = make(timesteps=timesteps, kl_weight=0.1, batch_size=batch_size)
    close(gradients(parts, rolled(parts.policy)), expected)
    for a, b, g in zip(whole.sets.trainable, parts.sets.trainable, expected, strict=True):
        clear = g.abs() > 1e-5  # below that Adam's first step is the sign of what may be rounding
        torch.testing.assert_close(a[clear], b[clear], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kl", "on_policy", "forwards"), [(0.0, False, 2), (1e-4, False, 3), (0.0, True, 1), (1e-4, True, 2)]
)
def test_only_the_passes_that_are_needed_are_made(make: Make, kl: float, on_policy: bool, forwards: int) -> None:
    """The reference is run for a KL, the old policy where it is not the policy; every pass has its own backward."""
    updater = make(kl_weight=kl, batch_size=4, spread=0.0 if on_policy else 0.02)
    rollout = rolled(updater.policy)
    seen = count_forwards(updater.policy)
    values = updater.epoch(rollout, 0, on_policy)
    assert sorted(seen) == sorted([4, 2] * 3 * forwards)  # 2 batches, int(0.99 * 4) = 3 timesteps
    assert (values["kl"] == 0) is (kl == 0 or on_policy)
    assert (values["old_deviation"] == 0) is on_policy


def test_on_policy_the_first_step_saves_a_pass_and_changes_no_bit(make: Make) -> None:
    lora = LoraConfig(rank=2, alpha=4)
    updaters = [make(lora, spread=0.0, kl_weight=0.1, optimizer_steps=2, learning_rate=1e-2) for _ in range(2)]
    passes = []
    for updater, on_policy in zip(updaters, (False, True), strict=True):
        rollout = rolled(updater.policy)
        seen = count_forwards(updater.policy)
        assert updater.epoch(rollout, 0, on_policy)["old_deviation"], "after a step the old policy is another one"
        passes.append(len(seen))
    assert passes == [2 * 3 * 3, 3 * 2 + 3 * 3]
    known, skipped = (updater.sets.tensors() for updater in updaters)
    assert all(torch.equal(tensor, skipped[key]) for key, tensor in known.items())


def test_flat_groups_can_leave_without_a_change_of_the_step(make: Make) -> None:
    """On policy and without a KL their gradient is 0."""
    flat = torch.tensor([0.0, 0, 0, 1, -2, 1])
    found = []
    for skip in (False, True):
        updater = make(spread=0.0, skip_flat_groups=skip)
        rollout = rolled(updater.policy, advantage=flat)
        seen = count_forwards(updater.policy)
        found.append((gradients(updater, rollout), seen))
    close(found[0][0], found[1][0], 1e-8)
    assert found[0][1] == [6] * 6 and found[1][1] == [3] * 6
    nothing = make(spread=0.0, skip_flat_groups=True)
    values = nothing.epoch(rolled(nothing.policy, advantage=torch.zeros(N)), 0)
    assert values == {"loss": None, "kl": None, "old_deviation": None, "grad_norm": 0} and nothing.steps == 1


def test_a_step_without_any_gradient_has_its_momentum_all_the_same(make: Make) -> None:
    """As it has on several ranks, where gradients are summed."""
    moved = make(skip_flat_groups=True, learning_rate=1e-2)
    moved.epoch(rolled(moved.policy), 0)
    before = [tensor.clone() for tensor in moved.sets.trainable]
    moved.epoch(rolled(moved.policy, advantage=torch.zeros(N)), 1)
    assert not any(torch.equal(*pair) for pair in zip(before, moved.sets.trainable, strict=True))


def test_a_step_on_the_most_different_is_theirs_alone(make: Make) -> None:
    advantage = torch.tensor([0.5, -1.5, 1.0, 2.0, -1.0, -1.0])
    updater, expected = make(most_different=2, max_grad_norm=1e9), make(max_grad_norm=1e9)
    seen = count_forwards(updater.policy)
    found = gradients(updater, rolled(updater.policy, advantage=advantage))
    assert seen == [4] * 6
    few = rolled(expected.policy, [False, True, True, True, True, False], advantage)
    theirs = [g * 4 / N for g in gradients(expected, few)]  # the others count as if their gradient were 0
    close(found, theirs)


def test_the_kl_of_some_samples_costs_less_and_is_drawn_for_each_alone(make: Make) -> None:
    updater = make(kl_weight=0.1, kl_share=0.25, num_inference_steps=40)
    rollout = rolled(updater.policy)
    compared = updater._compared(rollout, torch.arange(N), 39, 0, 0)
    share = compared.float().mean().item()
    assert compared.shape == (N, 39) and 0.15 < share < 0.35
    half = replace(
        rollout, latents=rollout.latents[3:], rows=rollout.rows[3:], advantage=rollout.advantage[3:], first=3
    )
    alone = updater._compared(half, torch.tensor([1]), 39, 0, 0)  # of another rank, in another batch
    assert torch.equal(alone[0], compared[4])
    others = [updater._compared(rollout, torch.arange(N), 39, *when) for when in ((1, 0), (0, 1))]
    assert not any(torch.equal(other, compared) for other in others)
    few = make(kl_weight=0.1, kl_share=0.25)
    seen = count_forwards(few.policy)
    few.epoch(rollout, 0)
    assert sum(seen) == 2 * N * 3 + few._compared(rollout, torch.arange(N), 3, 0, 0).sum()


def test_the_kl_of_some_samples_does_not_depend_on_the_batches(make: Make) -> None:
    whole, parts = (make(kl_weight=10, kl_share=0.5, batch_size=size) for size in (N, 4))
    close(gradients(parts, rolled(parts.policy)), gradients(whole, rolled(whole.policy)), 1e-5)


def test_the_kl_pulls_towards_the_reference(make: Make) -> None:
    without, weak = make(), make(kl_weight=1e-12)
    close(gradients(without, rolled(without.policy)), gradients(weak, rolled(weak.policy)))
    strong = make(kl_weight=1e6, spread=0.01)
    found = strong.epoch(rolled(strong.policy), 0)
    assert strong.epoch(rolled(strong.policy), 0)["kl"] < found["kl"]


def test_masked_samples_contribute_nothing(make: Make) -> None:
    keep = [True, False, True, True, False, True]
    spoilt, clean = make(), make()
    rollout = rolled(spoilt.policy, keep)
    junk = rolled(clean.policy, keep)
    junk.latents[[1, 4]] = torch.nan
    junk.advantage[[1, 4]] = 1e9
    close(gradients(spoilt, rollout), gradients(clean, junk), 0)


def test_the_mean_is_over_trained_samples_only(make: Make) -> None:
    one, two = make(max_grad_norm=1e9), make(max_grad_norm=1e9)
    alone = gradients(one, rolled(one.policy, [True, *[False] * 5]))
    pair = gradients(two, rolled(two.policy, [False] * 3 + [True] + [False] * 2))
    both = make(max_grad_norm=1e9)
    expected = [(a + b) / 2 for a, b in zip(alone, pair, strict=True)]
    close(gradients(both, rolled(both.policy, [True, False, False, True, False, False])), expected)


def test_an_epoch_without_a_trained_sample_changes_nothing(make: Make) -> None:
    updater = make(inner_epochs=2, optimizer_steps=2)
    before = {k: t.clone() for k, t in updater.sets.tensors().items()}
    assert set(updater.epoch(rolled(updater.policy, [False] * N), 0).values()) == {None}, "no loss, not a loss of 0"
    assert updater.steps == 0
    assert all(torch.equal(t, before[k]) for k, t in updater.sets.tensors().items())


def test_the_loss_is_reported_in_every_epoch_alike(make: Make) -> None:
    """Curves of rl/run.py read these names from every line of the metrics."""
    updater = make()
    names = set(updater.epoch(rolled(updater.policy), 0))
    assert {"loss", "old_deviation", "grad_norm"} <= names
    assert set(updater.epoch(rolled(updater.policy, [False] * N), 1)) == names


def test_equal_rewards_on_policy_change_nothing(make: Make) -> None:
    updater = make(spread=0.0, weight_decay=0.0)
    found = gradients(updater, rolled(updater.policy, advantage=torch.zeros(N)))
    assert max(g.abs().max().item() for g in found) < 1e-8


def test_steps_and_inner_epochs(make: Make) -> None:
    updater = make(inner_epochs=2, optimizer_steps=3, batch_size=2, max_grad_norm=1e-3)
    rollout = rolled(updater.policy)
    seen = count_forwards(updater.policy)
    before = [p.detach().clone() for p in updater.sets.trainable]
    values = updater.epoch(rollout, 0)
    assert updater.steps == 6 and len(seen) == 6 * 3 * 2 and values["grad_norm"] > 1e-3
    norm = torch.stack([p.grad.norm() for p in updater.sets.trainable if p.grad is not None]).norm()
    assert norm <= 1.001e-3
    assert any(not torch.equal(a, b) for a, b in zip(before, updater.sets.trainable, strict=True))
    ema = zip(before, updater.sets.trainable, updater.sets.sets["ema"], strict=True)
    assert all(torch.all((e - b).abs() <= (p - b).abs().max() + 1e-6) for b, p, e in ema)


def test_the_draws_of_a_sample_are_its_own(make: Make) -> None:
    updater = make(num_inference_steps=10)
    rollout = rolled(updater.policy)
    sigmas, noise = updater._draw(rollout, torch.arange(N), 4, 1)
    assert sigmas.shape == (N, 9) and noise.shape == (N, 9, 8, 8, 8)
    alone = updater._draw(rollout, torch.tensor([5]), 4, 1)
    assert torch.equal(alone[0][0], sigmas[5]) and torch.equal(alone[1][0], noise[5])
    grid = set(updater.policy.sigmas(10)[:-1].tolist())
    assert all(len(set(row)) == 9 and set(row) < grid for row in sigmas.tolist())
    assert len({tuple(row) for row in sigmas.tolist()}) > 1
    again, _ = updater._draw(rollout, torch.arange(N), 5, 1)
    assert not torch.equal(again, sigmas)
    uniform, _ = make(timesteps="uniform", num_timesteps=3)._draw(rollout, torch.arange(N), 0, 0)
    assert uniform.shape == (N, 3) and bool(((uniform > 0) & (uniform < 1)).all())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4)], ids=["full", "lora"])
def test_bfloat16_trains_the_same_parameters_in_nearly_the_same_direction(make: Make, lora: LoraConfig | None) -> None:
    exact, rough = make(lora, kl_weight=0.01), make(lora, kl_weight=0.01, dtype="bfloat16")
    a, b = (gradients(u, rolled(u.policy)) for u in (exact, rough))
    assert len(a) == len(b), "under autocast some parameters get no gradient"
    x, y = (torch.cat([g.flatten() for g in grads]) for grads in (a, b))
    assert torch.cosine_similarity(x, y, dim=0) > 0.9


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4)], ids=["full", "lora"])
def test_steps_smaller_than_bfloat16_can_tell_are_not_lost(make: Make, lora: LoraConfig | None) -> None:
    """The base is bfloat16; what trains, its copies and the optimizer's moments are float32."""
    updater = make(lora, spread=0, dtype="bfloat16", learning_rate=1e-5, ema_decay=0.9)
    sets = updater.sets
    before = [p.detach().clone() for p in sets.trainable]
    rollout = rolled(updater.policy)
    for epoch in range(5):
        updater.epoch(rollout, epoch)
    moments = [t for state in updater.optimizer.state.values() for t in state.values() if t.dim()]
    everything = [*sets.trainable, *moments, *(t for copies in sets.sets.values() for t in copies)]
    assert {t.dtype for t in everything} == {torch.float32}
    have_gradients = [i for i, p in enumerate(sets.trainable) if p.grad is not None and bool(p.grad.any())]
    for values in (sets.trainable, sets.sets["ema"]):
        moved = [(values[i] != before[i]).float().mean().item() for i in have_gradients]
        assert fmean(moved) > 0.9, f"only {fmean(moved):.1%} of what trains has moved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_and_policy_are_told_apart(make: Make, dtype: str) -> None:
    updater = make(dtype=dtype, spread=0.05)
    assert updater.epoch(rolled(updater.policy), 0)["old_deviation"] > 1e-3


def test_gradient_checkpointing_changes_nothing_but_memory(make: Make) -> None:
    plain, saving = make(), make()
    saving.policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    close(gradients(saving, rolled(saving.policy)), gradients(plain, rolled(plain.policy)), 1e-7)


def expected_loss(updater: Updater, rollout: Rollout) -> tuple[float, float]:
    """Policy loss and KL of the first step, by hand: the mean over samples and timesteps, each with its own draw."""
    rl, policy = updater.rl, updater.policy
    sigmas, noise = updater._draw(rollout, torch.arange(N), 0, 0)
    weights = updater._compared(rollout, torch.arange(N), sigmas.shape[1], 0, 0) / rl.kl_share
    conditions = rollout.conditions.select(rollout.rows)
    r = optimality(rollout.advantage, rl.adv_clip_max, rl.adv_mode)
    losses = []
    for sigma, e, weight in zip(sigmas.unbind(1), noise.unbind(1), weights.unbind(1), strict=True):
        x_t = add_noise(rollout.latents, e, sigma)
        velocities = []
        for name in ("policy", "old", "reference"):
            with policy.using(name), torch.no_grad():
                velocities.append(policy.velocity(x_t, sigma, conditions))
        v, v_old, v_ref = velocities
        loss = nft_loss(
            rollout.latents, x_t, sigma, v, v_old, weight * kl_loss(v, v_ref), r,
            beta=rl.beta, adv_clip_max=rl.adv_clip_max, kl_weight=0.5,
        )  # fmt: skip
        losses.append((loss.policy.mean().item(), loss.kl.mean().item()))
    policy_losses, kls = zip(*losses, strict=True)
    return fmean(policy_losses), fmean(kls)


@pytest.mark.parametrize(("batch_size", "kl_share"), [(N, 1.0), (4, 0.5)])
def test_the_loss_is_the_mean_over_samples_and_timesteps_of_their_own_draws(
    make: Make, batch_size: int, kl_share: float
) -> None:
    updater = make(kl_weight=0.5, batch_size=batch_size, kl_share=kl_share)
    with torch.no_grad():  # old and reference differ from each other, too
        for tensor in updater.sets.sets["reference"]:
            tensor.mul_(1.05)
    rollout = rolled(updater.policy)
    loss, kl = expected_loss(updater, rollout)
    values = updater.epoch(rollout, 0)
    assert values["loss"] == pytest.approx(loss, rel=1e-4) and values["kl"] == pytest.approx(kl, rel=1e-4)


def test_inner_epochs_and_epochs_draw_noise_of_their_own(make: Make) -> None:
    updater = make()
    rollout = rolled(updater.policy)
    draws = [updater._draw(rollout, torch.arange(N), epoch, inner) for epoch in (0, 1) for inner in (0, 1)]
    noises = [noise for _, noise in draws]
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_a_step_moves_the_average_and_leaves_the_old_policy(make: Make) -> None:
    updater = make()
    before = {name: [t.clone() for t in updater.sets.sets[name]] for name in ("old", "ema")}
    updater.epoch(rolled(updater.policy), 0)
    assert all(torch.equal(a, b) for a, b in zip(before["old"], updater.sets.sets["old"], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before["ema"], updater.sets.sets["ema"], strict=True))
