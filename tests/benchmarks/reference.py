"""A re-statement of the update of NVlabs/DiffusionNFT: its order of calls and its arithmetic, none of its text.

Two LoRA adapters of peft, "old" and "default", toggled by name; the reference is the base with both switched off. Every
timestep has three forward passes, the reference's also without a KL and while the policy's graph is in memory.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from firm.config import RLConfig
from firm.policies.policy import Conditions, Policy


class Reference:
    """The policy, its optimizer, and one step at a time."""

    def __init__(self, policy: Policy, rl: RLConfig) -> None:
        """``policy`` has a LoRA, named "default" by peft; the adapter "old" starts as a copy of it."""
        self.policy, self.rl = policy, rl
        self.trainable = [p for p in policy.family.denoiser.parameters() if p.requires_grad]
        self.layers = [m for m in policy.family.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:
            for kind in (layer.lora_A, layer.lora_B):
                kind["old"] = deepcopy(kind["default"])
            for settings in (layer.scaling, layer.r, layer.lora_alpha, layer.use_dora):
                settings["old"] = settings["default"]
            layer.lora_dropout["old"] = nn.Identity()
        self._use("default")
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=rl.learning_rate, betas=(0.9, rl.adam_beta2), weight_decay=rl.weight_decay
        )

    def _use(self, adapter: str) -> None:
        for layer in self.layers:
            layer.set_adapter(adapter)

    def refresh(self) -> None:
        """Make the old policy the policy."""
        for layer in self.layers:
            for kind in (layer.lora_A, layer.lora_B):
                kind["old"].weight.data.copy_(kind["default"].weight.data)

    def step(self, x0: Tensor, sigmas: Tensor, noise: Tensor, conditions: Conditions, r: Tensor) -> None:
        """One optimizer step on clean latents [B, C, H, W] at sigmas [B, T] with noise [B, T, C, H, W]."""
        for j in range(sigmas.shape[1]):
            self._backward(x0, sigmas[:, j], noise[:, j], conditions, r, sigmas.shape[1])
        torch.nn.utils.clip_grad_norm_(self.trainable, self.rl.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(
        self, x0: Tensor, sigma: Tensor, noise: Tensor, conditions: Conditions, r: Tensor, timesteps: int
    ) -> None:
        rl = self.rl
        t = sigma.view(-1, 1, 1, 1)
        x_t = (1 - t) * x0 + t * noise
        self._use("old")
        with torch.no_grad():
            old = self.policy.velocity(x_t, sigma, conditions).detach()
        self._use("default")
        v = self.policy.velocity(x_t, sigma, conditions)
        with torch.no_grad():
            for layer in self.layers:
                layer.enable_adapters(False)
            base = self.policy.velocity(x_t, sigma, conditions)
            for layer in self.layers:
                layer.enable_adapters(True)
            self._use("default")
        positive = rl.beta * v + (1 - rl.beta) * old
        negative = (1 + rl.beta) * old - rl.beta * v
        losses = []
        for branch in (positive, negative):
            x0_hat = x_t - t * branch
            with torch.no_grad():
                weight = (x0_hat.double() - x0.double()).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
            losses.append(((x0_hat - x0) ** 2 / weight).mean((1, 2, 3)))
        policy = (rl.adv_clip_max * (r * losses[0] + (1 - r) * losses[1]) / rl.beta).mean()
        kl = ((v - base) ** 2).mean()
        ((policy + rl.kl_weight * kl) / timesteps).backward()
