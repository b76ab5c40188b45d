"""Muon for the hidden matrices of a critic and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from firm.config import SFTConfig


class MuonAdamW(Optimizer):
    """Two optimizers over one list of groups and one state, so that a schedule or checkpoint sees a single one.

    Muon's updates are scaled to the size of AdamW's, so that both share the learning rate.
    """

    def __init__(self, model: nn.Module, sft: SFTConfig) -> None:
        """Weights of linear layers but the head go to Muon; embeddings, convolutions, norms, biases to AdamW."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        trained = [p for p in model.parameters() if p.requires_grad]
        rest = [p for p in trained if p not in linear]
        shared: dict[str, Any] = {"lr": sft.learning_rate, "weight_decay": sft.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim >= 2]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._parts: list[Optimizer] = [
            Muon([p for p in trained if p in linear], **shared, adjust_lr_fn="match_rms_adamw"),
            AdamW(groups, **shared, betas=(0.9, sft.adam_beta2), fused=True),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = closure() if closure else None
        groups = iter(self.param_groups)  # replaced, as is the state, when a state is loaded
        for part in self._parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
            part.step()
        return loss
