"""Parameter sets: policy, old policy, reference and EMA as values of one module's trainable parameters.

One module, several sets of values, swapped in by pointer (where FSDP has sharded them, by copy): no adapter toggling,
the same code for LoRA and full fine-tuning, and everything a resume needs in one dict of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class ParameterSets:
    """Named copies of the trainable parameters of ``module``. Its current values are the policy."""

    def __init__(self, module: nn.Module, copies: tuple[str, ...]) -> None:
        """Start every copy (for example "old", "ema", "reference") from the module's current values."""
        self.module = module
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.trainable = [p for _, p in named]
        self.sets = {copy: [t.clone() for t in self._values()] for copy in copies}

    def _values(self) -> list[Tensor]:
        """The policy's values in their own storage; of a sharded parameter, this rank's."""
        return [p.to_local().detach() if isinstance(p, DTensor) else p.data for p in self.trainable]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Evaluate the module under another set. Entered without gradients; the policy's values return exactly."""
        if name == "policy":
            yield
            return
        mine = [t.clone() if isinstance(p, DTensor) else t for p, t in zip(self.trainable, self._values(), strict=True)]
        try:
            self._put(self.sets[name])
            with torch.no_grad():
                yield
        finally:
            self._put(mine)

    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, now, value in zip(self.trainable, self._values(), values, strict=True):
            if isinstance(parameter, DTensor):
                now.copy_(value)  # FSDP gathers from this storage, and would not see another `data`
            else:
                parameter.data = value
        if any(isinstance(parameter, DTensor) for parameter in self.trainable):
            for module in self.module.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what is gathered still has the values from before

    @torch.no_grad()
    def update_average(self, name: str, decay: float) -> None:
        """``set <- decay * set + (1 - decay) * policy``; decay 0 copies bit for bit."""
        current = self._values()
        if decay == 0:
            torch._foreach_copy_(self.sets[name], current)
        else:
            torch._foreach_lerp_(self.sets[name], current, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All values, keyed ``set/parameter``."""
        sets = {"policy": self._values(), **self.sets}
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
