"""Supervised fine-tuning of the critic."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

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
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
