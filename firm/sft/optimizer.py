"""Muon (https://kellerjordan.github.io/posts/muon): it learns from scratch in fewer steps than AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from firm.config import SFTConfig

MOMENTUM = 0.95


class Muon(Optimizer):
    """Muon for hidden matrices, which are the first group, and AdamW for the rest.

    Updates of the matrices are scaled to the size of AdamW's, so that both share the learning rate. `torch.optim.Muon`
    is neither of the two in one, nor fit for most CPUs: it computes in bfloat16, there ten times slower than float32.
    """

    def __init__(self, model: nn.Module, sft: SFTConfig) -> None:
        """Hidden matrices are the weights of linear layers but the head."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        trained = [p for p in model.parameters() if p.requires_grad]
        rest = [p for p in trained if p not in linear]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim >= 2]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        shared: dict[str, Any] = {"lr": sft.learning_rate, "weight_decay": sft.weight_decay}
        self._adamw = AdamW(groups, **shared, betas=(0.9, sft.adam_beta2), fused=True)
        super().__init__([{"params": [p for p in trained if p in linear]}, *self._adamw.param_groups], shared)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        group, *others = self.param_groups
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                momentum = state["momentum"] = state.get("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonal(p.grad.lerp(momentum, MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
        # replaced when a state is loaded
        self._adamw.param_groups = others
        self._adamw.state = self.state
        self._adamw.step()


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal matrix next to ``matrix``: five Newton-Schulz steps bring singular values to 0.7 .. 1.2."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x
