"""DiffusionNFT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from firm.config.lora import LoraConfig
from firm.config.monitors import MonitorsConfig
from firm.config.section import NonNegative, Positive, Section, Share


class RLConfig(Section):
    """DiffusionNFT (arXiv 2509.16117); names are those of NVlabs/DiffusionNFT where it has one."""

    prompts_per_epoch: PositiveInt
    group_size: int = Field(ge=2)
    max_epochs: PositiveInt
    num_inference_steps: PositiveInt = 10
    solver: Literal["euler", "dpm2"] = "dpm2"
    batch_size: PositiveInt = 8  # images per forward pass
    inner_epochs: PositiveInt = 1
    optimizer_steps: PositiveInt = 1  # per inner epoch
    timesteps: Literal["scheduler", "uniform"] = "scheduler"
    timestep_fraction: Share = 0.99  # scheduler: int(fraction * num_inference_steps) timesteps per sample
    num_timesteps: PositiveInt = 1  # uniform: draws per sample
    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 1e-4
    adam_beta2: Share = 0.999
    max_grad_norm: Positive = 1.0
    lora: LoraConfig | None = None  # null: full fine-tuning
    beta: Positive = 1.0
    adv_clip_max: Positive = 5.0
    min_valid_share: Share = 0.0  # of a group's samples; a group with fewer valid rewards is left out
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    std: Literal["global", "group"] = "global"
    kl_weight: NonNegative = 1e-4
    # Of samples and timesteps on which the KL is taken, with 1 / share the weight.
    kl_share: float = Field(1.0, gt=0, le=1)
    skip_flat_groups: bool = False  # no gradient step on groups whose rewards are equal, nor a KL
    most_different: PositiveInt | None = None  # samples a group with a gradient step, by |advantage|; null: all
    decay: Literal["copy", "linear_to_0.5", "delayed_linear_to_0.999"] = "linear_to_0.5"
    ema_decay: Share = 0.9
    gradient_checkpointing: bool = False
    sharding: Literal["none", "base"] = "none"  # base: a GPU holds its share of what a LoRA leaves frozen
    checkpoint_epochs: PositiveInt = 30
    checkpoint_minutes: Positive = 30  # at the latest, after the epoch or audit that is going on then
    monitors: MonitorsConfig = MonitorsConfig()

    @model_validator(mode="after")
    def _only_a_frozen_base_is_sharded(self) -> RLConfig:
        if self.sharding == "base" and self.lora is None:
            raise ValueError("sharding: base needs a lora, since full fine-tuning leaves no base frozen")
        return self
