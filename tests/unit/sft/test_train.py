"""The Trainer's arguments."""

from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from firm.config import SFTConfig
from firm.config.loading import load_config
from firm.sft import train


def test_a_process_uses_one_gpu_of_a_machine_with_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Workstation(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            device: torch.device = super()._setup_devices
            self._n_gpu = 3
            return device

    monkeypatch.setattr(train, "TrainingArguments", Workstation)
    made = train.arguments(load_config("gen-shapes").critic, SFTConfig(batch_size=4), 0, tmp_path)
    assert made.train_batch_size == 4
