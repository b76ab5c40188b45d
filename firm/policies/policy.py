"""What a policy is: a family (one file each) and the parameter sets that RL keeps of it.

The RL loop, the sampler and evaluation speak of latents, sigmas and conditions only. A new family is one file with
a class like :class:`firm.policies.sd3.SD3` and one line in ``FAMILIES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firm.config import LoraConfig, PolicyConfig
from firm.locate import load_object
from firm.policies.parameters import ParameterSets
from firm.records import UserError
from firm.seeds import seed_for

WEIGHTS = "policy.safetensors"
CARD = "policy.json"


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts: every tensor has the prompts as its first dimension."""

    tensors: dict[str, Tensor]

    def select(self, index: Tensor) -> Conditions:
        """Rows ``index`` [B] of every tensor."""
        return Conditions({k: t[index] for k, t in self.tensors.items()})


class Family(Protocol):
    """What a model family supplies."""

    denoiser: nn.Module
    lora_targets: tuple[str, ...]
    latent_shape: tuple[int, int, int]
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Encode prompts, one row each."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity noise - x0 [B, C, H, W] at ``latents`` [B, C, H, W] and ``sigma`` [B] in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] of clean latents [B, C, H, W]."""

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """The scheduler's own sigmas [num_inference_steps + 1], from 1 down to 0."""


FAMILIES: dict[str, str] = {"sd3": "firm.policies.sd3:SD3"}


class Policy:
    """A family's model with its trainable parameters and their named copies."""

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load the model frozen; :meth:`train` makes it trainable.

        Raises:
            UserError: The folder does not hold a model of this family.
        """
        build: Callable[[PolicyConfig, torch.device], Family] = load_object(FAMILIES[config.family], "policy.family")
        self.config, self.family, self.device = config, build(config, device), device
        self.family.denoiser.requires_grad_(False).eval()
        self.parameters: ParameterSets | None = None
        self.lora: LoraConfig | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return self.family.latent_shape

    def train(self, lora: LoraConfig | None, copies: tuple[str, ...], seed: int) -> ParameterSets:
        """Make the denoiser trainable, whole or through a LoRA, and start the named copies."""
        self._make_trainable(lora, seed)
        self.parameters = ParameterSets(self.family.denoiser, copies)
        return self.parameters

    def _make_trainable(self, lora: LoraConfig | None, seed: int) -> None:
        self.lora = lora
        if lora is None:
            self.family.denoiser.requires_grad_(True)
            return
        from peft import LoraConfig as PeftLora
        from peft import inject_adapter_in_model

        targets = list(self.family.lora_targets)
        adapter = PeftLora(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets)
        with torch.random.fork_rng():  # peft draws from the global generator
            torch.manual_seed(seed_for(seed, "lora"))
            inject_adapter_in_model(adapter, self.family.denoiser)

    def using(self, name: str) -> AbstractContextManager[None]:
        """Evaluate under "policy" or a named copy."""
        return self.parameters.using(name) if self.parameters else nullcontext()

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of prompts, one row each."""
        with torch.no_grad():
            return self.family.encode(prompts)

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, C, H, W] under the set in use."""
        return self.family.velocity(latents, sigma, conditions)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3]."""
        with torch.no_grad():
            return self.family.decode(latents)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """The scheduler's own sigmas, from 1 down to 0."""
        return self.family.sigmas(num_inference_steps)


def save_policy(folder: Path, policy: Policy, weights: dict[str, Tensor]) -> list[str]:
    """Write the trained parameters (LoRA or whole denoiser) and a card naming their base; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in sorted(weights.items())}, folder / WEIGHTS)
    lora = policy.lora.model_dump() if policy.lora else None
    card = {"base": policy.config.model_dump(mode="json"), "lora": lora}
    (folder / CARD).write_text(json.dumps(card, indent=1, sort_keys=True))
    return [WEIGHTS, CARD]


def load_policy(folder: Path, device: torch.device) -> Policy:
    """Load a trained policy: its base, then the trained parameters over it.

    Raises:
        UserError: The folder holds no policy, or one whose parameters do not fit its base.
    """
    if not (folder / CARD).is_file():
        raise UserError("this folder holds no trained policy", str(folder), f"it should contain {CARD}")
    card = json.loads((folder / CARD).read_text())
    policy = Policy(PolicyConfig.model_validate(card["base"]), device)
    policy._make_trainable(LoraConfig.model_validate(card["lora"]) if card["lora"] else None, seed=0)
    weights, targets = load_file(folder / WEIGHTS), dict(policy.family.denoiser.named_parameters())
    if unfit := sorted(n for n, w in weights.items() if n not in targets or targets[n].shape != w.shape):
        raise UserError(f"parameter {unfit[0]} does not fit the base model", str(folder), "was the base replaced?")
    with torch.no_grad():
        for name, value in weights.items():
            targets[name].copy_(value)
    policy.family.denoiser.requires_grad_(False)
    return policy
