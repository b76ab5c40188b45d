"""Encoders of a policy: on its device, or waiting on the host except while something is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


class Encoders:
    """What a policy encodes prompts and sources with; nothing else computes with it, and none of it trains."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, *, wait: bool) -> None:
        """``wait``: they are on the host, and on ``device`` inside :meth:`here` only."""
        self.modules = modules
        self.device = device
        self.waiting = wait

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside they are on the device. May be nested: around several passes they are moved once."""
        if not self.waiting:
            yield
            return
        tensors = tensors_of(self.modules)
        values = [tensor.data for tensor in tensors]
        self.waiting = False
        try:
            place(tensors, self.device)
            yield
        finally:
            self.waiting = True
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data = value  # it never left the host, so nothing is copied back
            torch.cuda.empty_cache()  # the room of a weight, kept for another, would be of no use to activations


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list(dict.fromkeys(t for module in modules for t in (*module.parameters(), *module.buffers())))


def place(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move values to a device, as ``nn.Module.to`` does."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
