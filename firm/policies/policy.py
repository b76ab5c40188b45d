"""What a policy is: a family (one file each) and the parameter sets that RL keeps of it.

The RL loop, the sampler and evaluation speak of latents, sigmas and conditions only. A new family is one file with
a class like :class:`firm.policies.sd3.SD3` and one line in ``FAMILIES``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from firm.config import LoraConfig, PolicyConfig
from firm.dist import Ranks, gather
from firm.images import Limits
from firm.locate import load_named
from firm.policies.encoders import Encoders
from firm.policies.parameters import ParameterSets
from firm.policies.sharding import shard_base
from firm.records import Prompt, UserError
from firm.seeds import seed_for
from firm.storage.files import parallel
from firm.storage.pictures import image_size

CARD = "policy.json"


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts: every tensor has the prompts as its first dimension."""

    tensors: dict[str, Tensor]

    def select(self, index: Tensor) -> Conditions:
        """Rows ``index`` [B] of every tensor."""
        return Conditions({k: t[index] for k, t in self.tensors.items()})

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        return Conditions({k: t.to(device) for k, t in self.tensors.items()})


class Family(Protocol):
    """What a model family supplies.

    Latents are [B, *latent_shape], of any rank: [B, C, H, W], or packed [B, L, C].

    Attributes:
        edits: Whether its prompts are instructions with a source image; those of a generator have none.
        denoiser: What RL trains.
        encoders: What :meth:`encode` alone computes with; ``policy.offload_encoders`` is about them.
        lora_targets: Names of the denoiser's layers that a LoRA adapts.
        latent_shape: Shape of one sample's latents.
    """

    edits: ClassVar[bool]
    denoiser: nn.Module
    encoders: tuple[nn.Module, ...]
    lora_targets: tuple[str, ...]
    latent_shape: tuple[int, ...]

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load the model.

        Raises:
            UserError: The folder does not hold a model of this family.
        """

    @classmethod
    def check(cls, model: str, key: str) -> None:
        """Check, without loading weights, that ``model`` is of this family; ``key`` is named in the error.

        Raises:
            UserError: It is not.
        """

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """Encode prompts, one row each, that :func:`check_prompts` has checked.

        Raises:
            UserError: A source image cannot be used.
        """

    def blank(self, number: int, tokens: int) -> Conditions:
        """Conditions of the shapes that those of ``number`` prompts of so many ``tokens`` have; for planning."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity noise - x0 [B, ...] at ``latents`` [B, ...] and ``sigma`` [B] in [0, 1]."""

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Velocity [B, ...] under guidance: ``scale`` times as far from the negative prompt's velocity [B, ...]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] of clean latents [B, ...]."""

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """The scheduler's own sigmas [num_inference_steps + 1], from 1 down to 0."""

    def save(self, folder: Path) -> None:
        """Write the denoiser's LoRA, or the whole denoiser where it has none, as the model's own pipeline reads it."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote into the denoiser, which has got its LoRA again.

        Raises:
            OSError, ValueError, KeyError, RuntimeError: The files are damaged, or do not fit the denoiser.
        """


FAMILIES: dict[str, str] = {
    "qwen_image_edit": "firm.policies.qwen_image_edit:QwenImageEdit",
    "sd3": "firm.policies.sd3:SD3",
}


def find_family(name: str, key: str) -> type[Family]:
    """The class of a family.

    Raises:
        UserError: There is no such family; the message names the configuration's ``key``.
    """
    found: type[Family] = load_named(FAMILIES, name, key)
    return found


def check_prompts(prompts: Iterable[Prompt], family: str, key: str, limits: Limits | None = None) -> None:
    """Check that each prompt has a square source image if the family edits, and none if it does not.

    Sources are read no further than their size. A critic would compare the whole of one that is cropped with the edit
    of a part, so they are to be square, as what a policy makes is.

    Raises:
        UserError: One has not; the message names it, and the configuration's ``key`` of the family.
    """
    edits = find_family(family, key).edits
    prompts = list(prompts)
    for prompt in prompts:
        where = f"{key}, prompt {prompt.text!r}"
        if edits and prompt.image is None:
            fix = "give every prompt a source_image, or choose a family of generators"
            raise UserError(f"the family {family} edits, and needs a source image", where, fix, usage=True)
        if not edits and prompt.image is not None:
            fix = "leave source_image out of the prompts, or choose a family of editors"
            raise UserError(f"the family {family} generates and does not edit", where, fix, usage=True)
    if edits:
        parallel(lambda prompt: _check_square(prompt, limits), prompts)  # images may be far away


def _check_square(prompt: Prompt, limits: Limits | None) -> None:
    assert prompt.image is not None
    where = f"{prompt.image[:200]}, prompt {prompt.text!r}"  # a data URL is long
    width, height = image_size(prompt.image, where, limits)
    if width != height:
        what = f"a source image must be square, and this one is {width} x {height}"
        raise UserError(what, where, "crop it, or leave it out", usage=True)


class Policy:
    """A family's model with its trainable parameters and their named copies."""

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load the model frozen; :meth:`train` makes it trainable.

        Raises:
            UserError: There is no such family, or the folder does not hold a model of it.
        """
        self.config = config
        self.device = device
        self.family = find_family(config.family, "policy.family")(config, device)
        self.family.denoiser.requires_grad_(False).eval()
        self.encoders = Encoders(self.family.encoders, device, wait=config.offload_encoders)
        self.parameters: ParameterSets | None = None
        self.lora: LoraConfig | None = None
        self.sharers: Ranks | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return self.family.latent_shape

    def train(
        self, lora: LoraConfig | None, copies: tuple[str, ...], seed: int, start: Path | None = None
    ) -> ParameterSets:
        """Make the denoiser trainable, whole or through a LoRA, and start the named copies.

        What trains is float32, and so are its copies, averages and an optimizer's moments of it, whatever the base is:
        in bfloat16 a step smaller than 1/256 of a value is lost.

        Args:
            lora: The LoRA, None for the whole denoiser.
            copies: Names of the copies.
            seed: Draws the values that the LoRA starts from.
            start: Folder of a policy trained from this one, from whose values all start.

        Raises:
            UserError: The folder holds no policy of this base and LoRA.
        """
        self._make_trainable(lora, seed)
        if start is not None:
            base, trained = _card(start)
            if (base, trained) != (self.config, lora):
                fix = "rounds go on with the policy and the rl.lora of the first"
                raise UserError("the policy to start from has another base or LoRA", str(start), fix, usage=True)
            self._load(start)
        self.parameters = ParameterSets(self.family.denoiser, copies)
        return self.parameters

    def shard(self, ranks: Ranks) -> None:
        """Share the frozen base among ranks, all of which train the same LoRA; nothing changes for one alone."""
        assert self.lora is not None and self.parameters is not None
        if ranks.size > 1:
            shard_base(self.family.denoiser, self.parameters.trainable, ranks)
            self.sharers = ranks

    def passes(self, needed: int) -> int:
        """How many batches all ranks go through where this one has ``needed``: with a shared base the most of any.

        All ranks ask together, before the first of them.
        """
        return needed if self.sharers is None else max(gather([needed], self.sharers))

    def _make_trainable(self, lora: LoraConfig | None, seed: int) -> None:
        self.lora = lora
        if lora is None:
            self.family.denoiser.requires_grad_(True)
        else:
            self._add_lora(lora, seed)
        for parameter in self.family.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _add_lora(self, lora: LoraConfig, seed: int) -> None:
        from peft import LoraConfig as PeftLora
        from peft import inject_adapter_in_model

        targets = list(self.family.lora_targets)
        adapter = PeftLora(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets)
        with torch.random.fork_rng():  # peft draws from the global generator
            torch.manual_seed(seed_for(seed, "lora"))
            inject_adapter_in_model(adapter, self.family.denoiser)

    def _load(self, folder: Path) -> None:
        try:
            self.family.load(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot load a trained policy: {error}", str(folder), "was the base replaced?") from error

    def using(self, name: str) -> AbstractContextManager[None]:
        """Evaluate under "policy" or a named copy."""
        return self.parameters.using(name) if self.parameters else nullcontext()

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """Conditions of prompts, one row each.

        Raises:
            UserError: The family cannot use one, see :func:`check_prompts`.
        """
        check_prompts(prompts, self.config.family, "policy.family")
        with torch.no_grad(), self.encoders.here():
            return self.family.encode(prompts)

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, ...] under the set in use, computed in the type of ``policy.dtype``."""
        with self._autocast():
            return self.family.velocity(latents, sigma, conditions)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.dtype == "float32":
            return nullcontext()
        # Its cache of cast weights would hand the old policy's to the policy: they share the parameter objects.
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype), cache_enabled=False)

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Velocity [B, ...] under guidance of this scale, away from the negative prompt's velocity [B, ...]."""
        return self.family.guided(velocity, negative, scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3]."""
        with torch.no_grad():
            return self.family.decode(latents)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """The scheduler's own sigmas, from 1 down to 0."""
        return self.family.sigmas(num_inference_steps)


def save_policy(folder: Path, policy: Policy) -> None:
    """Write the values in use as the family's own pipeline reads them, and a card naming base and LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.family.save(folder)
    lora = policy.lora.model_dump() if policy.lora else None
    card = {"base": policy.config.model_dump(mode="json"), "lora": lora}
    (folder / CARD).write_text(json.dumps(card, indent=1, sort_keys=True))


def load_policy(folder: Path, device: torch.device) -> Policy:
    """Load a trained policy: its base, then the trained parameters over it.

    Raises:
        UserError: The folder holds no policy, or one whose parameters do not fit its base.
    """
    base, lora = _card(folder)
    policy = Policy(base, device)
    policy._make_trainable(lora, seed=0)
    policy._load(folder)
    policy.family.denoiser.requires_grad_(False)
    return policy


def _card(folder: Path) -> tuple[PolicyConfig, LoraConfig | None]:
    """Base and LoRA of the trained policy in a folder."""
    if not (folder / CARD).is_file():
        raise UserError("this folder holds no trained policy", str(folder), f"it should contain {CARD}")
    card = json.loads((folder / CARD).read_text())
    return PolicyConfig.model_validate(card["base"]), LoraConfig.model_validate(card["lora"]) if card["lora"] else None
