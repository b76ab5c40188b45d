"""Supervised fine-tuning of the critic."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from firm.config.lora import LoraConfig
from firm.config.section import NonNegative, Positive, Section, Share


class SFTConfig(Section):
    """Supervised fine-tuning of the critic (paper section 4)."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: learns from scratch in fewer steps
    learning_rate: Positive = 1e-5
    lr_scheduler: str = "cosine"
    lr_scheduler_kwargs: dict[str, float] = {}
    warmup_ratio: Share = 0.1
    weight_decay: NonNegative = 0.0
    adam_beta2: Share = 0.999
    max_grad_norm: Positive = 1.0
    batch_size: PositiveInt = 5  # per device
    gradient_accumulation: PositiveInt = 2
    epochs: Positive = 1.0
    max_steps: PositiveInt | None = None
    checkpoint_steps: PositiveInt = 500
    checkpoint_minutes: Positive = 30  # at the latest
    eval_steps: NonNegativeInt = 0  # how often test examples are judged; 0: never
    eval_examples: PositiveInt = 256  # at most
    train_vision: bool = True  # false: the vision tower stays as it is
    gradient_checkpointing: bool = False
    sharding: Literal["none", "full"] = "none"  # full: a GPU holds its share of parameters, gradients and moments
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> SFTConfig:
        if self.optimizer == "muon" and self.sharding == "full":
            raise ValueError("muon updates whole matrices, and none is whole when sharded: set optimizer to adamw")
        return self
