"""Parameter sets: policy, old policy, reference and EMA as values of one module's trainable parameters.

One module, several sets of values, swapped in by pointer: no adapter toggling, the same code for LoRA and full
fine-tuning, and everything a resume needs in one dict of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ParameterSets:
    """Named copies of the trainable parameters of ``module``. Its current values are the policy."""

    def __init__(self, module: nn.Module, copies: tuple[str, ...]) -> None:
        """Start every copy (for example "old", "ema", "reference") from the module's current values."""
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.trainable = [p for _, p in named]
        self.sets = {copy: [p.detach().clone() for p in self.trainable] for copy in copies}

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Evaluate the module under another set. Entered without gradients; the policy's values return exactly."""
        if name == "policy":
            yield
            return
        mine = [p.data for p in self.trainable]
        try:
            for parameter, value in zip(self.trainable, self.sets[name], strict=True):
                parameter.data = value
            with torch.no_grad():
                yield
        finally:
            for parameter, value in zip(self.trainable, mine, strict=True):
                parameter.data = value

    @torch.no_grad()
    def update_average(self, name: str, decay: float) -> None:
        """``set <- decay * set + (1 - decay) * policy``; decay 0 copies bit for bit."""
        current = [p.data for p in self.trainable]
        if decay == 0:
            torch._foreach_copy_(self.sets[name], current)
        else:
            torch._foreach_lerp_(self.sets[name], current, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All values, keyed ``set/parameter``."""
        sets = {"policy": [p.data for p in self.trainable], **self.sets}
        return {f"{s}/{n}": t for s, values in sets.items() for n, t in zip(self.names, values, strict=True)}

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """``target <- source``, two of the named copies, bit for bit."""
        torch._foreach_copy_(self.sets[target], self.sets[source])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for key, target in self.tensors().items():
            target.copy_(tensors[key])
