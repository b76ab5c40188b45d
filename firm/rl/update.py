"""The update phase of an epoch: DiffusionNFT steps on a rollout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from firm.config import RLConfig
from firm.dist import Ranks, gather, generator, sum_gradients
from firm.policies.policy import Conditions, Policy
from firm.rl.nft import add_noise, ema_decay, kl_loss, nft_loss, optimality
from firm.rl.rollout import Rollout

MIN_SIGMA = 1e-3
SUMS = ("loss", "kl", "old_deviation")


class Updater:
    """Holds the optimizer and counts its steps; one call of :meth:`epoch` trains on one rollout."""

    def __init__(self, policy: Policy, rl: RLConfig, seed: int, ranks: Ranks) -> None:
        """``policy`` must have been made trainable with the copies "old", "ema" and "reference"."""
        assert policy.parameters is not None
        self.policy = policy
        self.sets = policy.parameters
        self.rl = rl
        self.seed = seed
        self.ranks = ranks
        self.optimizer = torch.optim.AdamW(
            self.sets.trainable, lr=rl.learning_rate, betas=(0.9, rl.adam_beta2), weight_decay=rl.weight_decay
        )
        self.steps = 0
        self._grid = policy.sigmas(rl.num_inference_steps)[:-1].cpu()

    def epoch(self, rollout: Rollout, epoch: int) -> dict[str, float | None]:
        """Run ``inner_epochs x optimizer_steps`` steps; returns means over them of the loss and its parts.

        A step for which no sample may train is left out; all means are None where that is every one.
        """
        totals = dict.fromkeys((*SUMS, "grad_norm"), 0.0)
        parts = 0
        for inner in range(self.rl.inner_epochs):
            for chosen, count in self._parts(rollout, epoch, inner):
                values = self._step(rollout, chosen, count, epoch, inner)
                totals = {name: totals[name] + values[name] for name in totals}
                parts += 1
        return {name: total / parts if parts else None for name, total in totals.items()}

    def _parts(self, rollout: Rollout, epoch: int, inner: int) -> Iterator[tuple[Tensor, int]]:
        """For each optimizer step: this rank's trained samples and how many samples all ranks train in it."""
        total = len(rollout.trained)
        order = torch.randperm(total, generator=generator(self.seed, "order", epoch, inner))
        for chunk in order.chunk(self.rl.optimizer_steps):
            part = chunk[rollout.trained[chunk]]
            local = part[(part >= rollout.first) & (part < rollout.first + len(rollout.latents))] - rollout.first
            if len(part):
                yield local.sort().values, len(part)

    def _step(self, rollout: Rollout, chosen: Tensor, count: int, epoch: int, inner: int) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMS))
        # A rank all of whose samples are masked has no batch; it takes the step of the others with a gradient of zero.
        for samples in chosen.split(self.rl.batch_size) if len(chosen) else ():
            sigmas, noise = self._draw(rollout, samples, epoch, inner)
            denominator = count * sigmas.shape[1]
            for j in range(sigmas.shape[1]):
                sums += self.backward(rollout, samples, sigmas[:, j], noise[:, j], denominator)
        sum_gradients(self.sets.trainable, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(self.sets.trainable, self.rl.max_grad_norm)
        self.optimizer.step()
        self.steps += 1
        self.sets.update_average("ema", ema_decay(self.rl.ema_decay, self.steps))
        everywhere = torch.tensor(gather([sums.tolist()], self.ranks)).sum(0)
        return {**dict(zip(SUMS, everywhere.tolist(), strict=True)), "grad_norm": float(norm)}

    def _draw(self, rollout: Rollout, samples: Tensor, epoch: int, inner: int) -> tuple[Tensor, Tensor]:
        """Sigmas [B, T] and noise [B, T, ...]; each sample has its own generator, whatever the batch or rank."""
        sigmas = []
        noise = []
        for index in (samples + rollout.first).tolist():
            random = generator(self.seed, "update", epoch, inner, index)
            if self.rl.timesteps == "scheduler":
                number = max(int(len(self._grid) * self.rl.timestep_fraction), 1)
                drawn = self._grid[torch.randperm(len(self._grid), generator=random)[:number]]
            else:
                drawn = torch.rand(self.rl.num_timesteps, generator=random).clamp(min=MIN_SIGMA)
            sigmas.append(drawn)
            noise.append(torch.randn(len(drawn), *rollout.latents.shape[1:], generator=random))
        device = self.policy.device
        return torch.stack(sigmas).to(device), torch.stack(noise).to(device)

    def backward(self, rollout: Rollout, samples: Tensor, sigma: Tensor, noise: Tensor, denominator: int) -> Tensor:
        """Accumulate the gradient of one timestep; returns this rank's share of ``SUMS``."""
        rl = self.rl
        samples = samples.to(self.policy.device)
        x0 = rollout.latents[samples].float()
        x_t = add_noise(x0, noise, sigma)
        v, v_old, v_ref = self._velocities(x_t, sigma, rollout.conditions.select(rollout.rows[samples]))
        r = optimality(rollout.advantage[samples], rl.adv_clip_max, rl.adv_mode)
        loss = nft_loss(
            x0, x_t, sigma, v, v_old, v_ref, r, beta=rl.beta, adv_clip_max=rl.adv_clip_max, kl_weight=rl.kl_weight
        )
        (loss.total.sum() / denominator).backward()
        sums = [loss.policy.detach().sum(), loss.kl.detach().sum(), kl_loss(v.detach(), v_old).sum()]
        return torch.stack(sums).cpu() / denominator

    def _velocities(self, x_t: Tensor, sigma: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor | None]:
        """Velocities [B, ...] of the policy, with gradient, of the old policy and, for a KL, of the reference."""
        policy = self.policy
        with policy.using("old"):
            v_old = policy.velocity(x_t, sigma, conditions)
        v = policy.velocity(x_t, sigma, conditions)
        if self.rl.kl_weight == 0:
            return v, v_old, None
        with policy.using("reference"):
            return v, v_old, policy.velocity(x_t, sigma, conditions)
