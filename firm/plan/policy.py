"""What a policy costs: sampling with it, and one pass of RL's update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from firm.config import PolicyConfig, RLConfig
from firm.dist import Ranks
from firm.plan.assumptions import Cost
from firm.plan.meter import Meter, bytes_of
from firm.plan.origins import going_through
from firm.policies.encoders import tensors_of
from firm.policies.policy import Policy
from firm.policies.sharding import blocks_of
from firm.rl.train import COPIES
from firm.rl.update import Batch, Updater
from firm.storage.checkpoint import optimizer_tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """Work on one GPU.

    Attributes:
        memory: Bytes by part, at the moment when they are most.
        item: Cost of one image, or one sample at one timestep.
    """

    memory: Counter[str]
    item: Cost


class PolicyMeter:
    """Measures a policy, whose ``model`` is a folder; what it has been made to train stays so.

    Attributes:
        encoders: Bytes that are on the GPU only while prompts are encoded, by part; they are in no other memory here.
        checkpoint: Bytes of a checkpoint of RL.
        saving: Bytes of memory by part while one is written.
    """

    def __init__(self, config: PolicyConfig, prompt_tokens: int) -> None:
        self._model = config.model
        self._tokens = prompt_tokens
        self._meter = Meter()
        self.encoders = Counter[str]()
        self.checkpoint = 0
        self.saving = Counter[str]()
        with self._measuring():
            self._policy = Policy(config, CPU)
            self._meter.watch(self._policy.family.denoiser)
            if config.offload_encoders:
                self.encoders["weights"] = bytes_of(tensors_of(self._policy.family.encoders))

    @contextmanager
    def _measuring(self) -> Iterator[Meter]:
        with going_through(self._model, "policy.model"), self._meter:
            yield self._meter

    def train(self, rl: RLConfig) -> None:
        """Make it what RL trains, with its copies and the optimizer's states."""
        with self._measuring() as meter:
            denoiser = self._policy.family.denoiser
            sets = self._policy.train(rl.lora, COPIES, seed=0)
            self._updater = Updater(self._policy, rl, 0, Ranks(0, 1, CPU))
            meter.watch(denoiser)
            copies = meter.mark((t for copy in sets.sets.values() for t in copy), "states")
            for parameter in sets.trainable:
                parameter.grad = torch.zeros_like(parameter)
            gradients = meter.mark((p.grad for p in sets.trainable if p.grad is not None), "gradients")
            optimizer = self._updater.optimizer
            optimizer.step()
            states = meter.mark((t for state in optimizer.state.values() for t in state.values()), "states")
            self.checkpoint = gradients + copies + states  # gradients are as large as what is trained
            meter.reset()
            optimizer_tensors(optimizer, sets.names)
            self.saving = self._peak()
            if rl.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def sampling(self, batch: int, steps: int, guidance: float = 1.0) -> Measured:
        """Images sampled and decoded ``batch`` at a time."""
        policy = self._policy
        with self._measuring() as meter, torch.no_grad():
            meter.reset()
            latents = torch.empty(batch, *policy.latent_shape)
            conditions = policy.family.blank(batch, self._tokens)
            velocity = policy.velocity(latents, torch.empty(batch), conditions)
            if guidance != 1:
                velocity = policy.guided(velocity, velocity.clone(), guidance)
            step = meter.flops * (1 if guidance == 1 else 2)
            denoising = self._peak()
            del velocity, conditions
            meter.reset()
            policy.decode(latents)
            memory = max(denoising, self._peak(), key=Counter.total)
            return Measured(memory, Cost(steps * step + meter.flops) * (1 / batch))

    def update(self, batch: int) -> Measured:
        """One pass of an update, of ``batch`` samples at one timestep each; see :meth:`train`."""
        policy = self._policy
        with self._measuring() as meter:
            latents = torch.empty(batch, *policy.latent_shape)
            compared = [torch.arange(batch if self._updater.rl.kl_weight else 0)]
            conditions = policy.family.blank(batch, self._tokens)
            drawn = Batch(
                latents,
                conditions,
                torch.empty(batch),
                torch.empty(batch, 1),
                torch.empty_like(latents[:, None]),
                compared,
            )
            meter.reset()
            self._updater.backward(drawn, 0, False, batch)
            return Measured(self._peak(), Cost(meter.flops) * (1 / batch))

    def shared(self, ranks: int) -> Counter[str]:
        """Bytes by part that a GPU has more, or less, where ranks share the frozen base; see :meth:`train`.

        As in training of a critic, what is outside of blocks stays together from the first pass on; buckets are two
        blocks, one of them ahead of time.
        """
        denoiser = self._policy.family.denoiser
        blocks = [bytes_of(p for p in block.parameters() if not p.requires_grad) for block in blocks_of(denoiser)]
        frozen = bytes_of(p for p in denoiser.parameters() if not p.requires_grad)
        return Counter(weights=frozen // ranks - sum(blocks), buckets=2 * max(blocks, default=0))

    def _peak(self) -> Counter[str]:
        return self._meter.peak - self.encoders
