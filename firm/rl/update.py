"""The update phase of an epoch: DiffusionNFT steps on a rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from firm.config import RLConfig
from firm.dist import Ranks, gather, generator, sum_gradients
from firm.policies.policy import Conditions, Policy
from firm.rl.nft import add_noise, ema_decay, kl_loss, nft_loss, optimality, sampled_kl, worth_a_step
from firm.rl.rollout import Rollout

MIN_SIGMA = 1e-3
SUMS = ("loss", "kl", "old_deviation")


@dataclass(frozen=True)
class Batch:
    """B samples of a rollout and what is drawn for T timesteps of each.

    Attributes:
        x0: Clean latents [B, ...].
        conditions: Of each sample, B rows.
        r: Optimality probabilities [B].
        sigmas: [B, T].
        noise: [B, T, ...].
        compared: For each timestep the rows [b] at which the KL is taken; T of them.
    """

    x0: Tensor
    conditions: Conditions
    r: Tensor
    sigmas: Tensor
    noise: Tensor
    compared: Sequence[Tensor]


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

    def epoch(self, rollout: Rollout, epoch: int, on_policy: bool = False) -> dict[str, float | None]:
        """Run ``inner_epochs x optimizer_steps`` steps; returns means over them of the loss and its parts.

        A step for which no sample may train is left out. A mean is None where no step has a value of it.

        Args:
            rollout: What to train on.
            epoch: Its number, of which the draws depend.
            on_policy: Whether the old policy is equal to the policy: until the first step its velocities are, too.
        """
        values = []
        for inner in range(self.rl.inner_epochs):
            for chosen, count in self._parts(rollout, epoch, inner):
                values.append(self._step(rollout, chosen, count, epoch, inner, on_policy))
                on_policy = False
        known = {name: [v[name] for v in values if name in v] for name in (*SUMS, "grad_norm")}
        return {name: fmean(found) if found else None for name, found in known.items()}

    def _parts(self, rollout: Rollout, epoch: int, inner: int) -> Iterator[tuple[Tensor, int]]:
        """For each optimizer step: this rank's samples that get one, and how many samples of all ranks may train."""
        total = len(rollout.trained)
        own = range(rollout.first, rollout.first + len(rollout.latents))
        mask = rollout.trained[own.start : own.stop].view(-1, self.rl.group_size)
        advantage = rollout.advantage.cpu().view(mask.shape)
        worth = worth_a_step(advantage, mask, self.rl.skip_flat_groups, self.rl.most_different).flatten()
        order = torch.randperm(total, generator=generator(self.seed, "order", epoch, inner))
        for chunk in order.chunk(self.rl.optimizer_steps):
            part = chunk[rollout.trained[chunk]]
            local = part[(part >= own.start) & (part < own.stop)].sort().values - own.start
            if len(part):
                yield local[worth[local]], len(part)

    def _step(
        self, rollout: Rollout, chosen: Tensor, count: int, epoch: int, inner: int, on_policy: bool
    ) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMS), device=self.policy.device)
        rows = 0
        # A rank all of whose samples are masked has no batch; it takes the step of the others with a gradient of zero.
        batches = chosen.split(self.rl.batch_size) if len(chosen) else ()
        idle = self.policy.passes(len(batches)) - len(batches)
        for samples in batches:
            batch = self._batch(rollout, samples, epoch, inner)
            for j in range(batch.sigmas.shape[1]):
                sums += self.backward(batch, j, on_policy, count * batch.sigmas.shape[1])
            rows += batch.sigmas.numel()
        for _ in range(idle):  # others have more batches, and need this rank's share
            batch = self._batch(rollout, torch.tensor([0]), epoch, inner)
            for j in range(batch.sigmas.shape[1]):
                self.backward(batch, j, on_policy, math.inf)
        sum_gradients(self.sets.trainable, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(self.sets.trainable, self.rl.max_grad_norm)
        self.optimizer.step()
        self.steps += 1
        self.sets.update_average("ema", ema_decay(self.rl.ema_decay, self.steps))
        *totals, rows = torch.tensor(gather([[*sums.tolist(), rows]], self.ranks)).sum(0).tolist()
        means = {name: total / rows for name, total in zip(SUMS, totals, strict=True)} if rows else {}
        return {**means, "grad_norm": float(norm)}

    def _batch(self, rollout: Rollout, samples: Tensor, epoch: int, inner: int) -> Batch:
        sigmas, noise = self._draw(rollout, samples, epoch, inner)
        compared = self._compared(rollout, samples, sigmas.shape[1], epoch, inner)
        samples = samples.to(self.policy.device)
        return Batch(
            x0=rollout.latents[samples].float(),
            conditions=rollout.conditions.select(rollout.rows[samples]),
            r=optimality(rollout.advantage[samples], self.rl.adv_clip_max, self.rl.adv_mode),
            sigmas=sigmas,
            noise=noise,
            compared=[at.nonzero().flatten().to(self.policy.device) for at in compared.unbind(1)],
        )

    def _compared(self, rollout: Rollout, samples: Tensor, timesteps: int, epoch: int, inner: int) -> Tensor:
        """Where the KL is taken, [B, T] bool; each sample has its own generator, as in :meth:`_draw`."""
        if self.rl.kl_share == 1 or not self.rl.kl_weight:
            return torch.full((len(samples), timesteps), self.rl.kl_weight > 0)
        own = (generator(self.seed, "kl", epoch, inner, i) for i in (samples + rollout.first).tolist())
        return torch.stack([torch.rand(timesteps, generator=g) for g in own]) < self.rl.kl_share

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

    def backward(self, batch: Batch, j: int, on_policy: bool, denominator: float) -> Tensor:
        """Accumulate the gradient of timestep ``j``; returns the sums of ``SUMS`` over the batch."""
        rl = self.rl
        sigma = batch.sigmas[:, j]
        x_t = add_noise(batch.x0, batch.noise[:, j], sigma)
        # What needs no gradient comes first, before there is a graph in memory.
        v_old = None if on_policy else self._fixed("old", x_t, sigma, batch.conditions)
        rows = batch.compared[j]
        v_ref = self._reference(x_t, sigma, batch.conditions, rows) if rl.kl_weight else None
        v = self.policy.velocity(x_t, sigma, batch.conditions)
        v_old = v.detach() if v_old is None else v_old
        kl = None if v_ref is None else sampled_kl(v, v_ref, rows, rl.kl_share)
        loss = nft_loss(
            batch.x0, x_t, sigma, v, v_old, kl, batch.r,
            beta=rl.beta, adv_clip_max=rl.adv_clip_max, kl_weight=rl.kl_weight,
        )  # fmt: skip
        (loss.total.sum() / denominator).backward()
        return torch.stack([loss.policy.detach().sum(), loss.kl.detach().sum(), kl_loss(v.detach(), v_old).sum()])

    def _reference(self, x_t: Tensor, sigma: Tensor, conditions: Conditions, rows: Tensor) -> Tensor | None:
        """Velocities [b, ...] of the reference at ``rows`` [b]; None where there are none."""
        if len(rows):
            return self._fixed("reference", x_t[rows], sigma[rows], conditions.select(rows))
        if self.policy.sharers:  # others may have rows, and need this rank's share
            self._fixed("reference", x_t, sigma, conditions)
        return None

    def _fixed(self, name: str, x_t: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocities [B, ...] under a named copy, without gradient."""
        with self.policy.using(name):
            return self.policy.velocity(x_t, sigma, conditions)
