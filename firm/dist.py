"""Processes, devices and randomness.

Randomness is passed, never global: every random draw has a seed derived from the run's seed and the purpose of the
draw, so a run gives the same result whatever the number of processes, interrupted and resumed or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from firm.records import UserError
from firm.seeds import seed_for

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: the first one audits alone."""


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """CPU generator for one purpose."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a training job."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes."""
        return self.rank == 0


def start() -> Ranks:
    """Join the process group that torchrun (or a PyTorchJob) describes in the environment; alone without one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not torch_dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # without torchrun: one process per pod
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return Ranks(rank, size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def gather(items: Sequence[T], ranks: Ranks) -> list[T]:
    """Concatenate the ranks' plain-data lists in rank order, on every rank."""
    if ranks.size == 1:
        return list(items)
    parts: list[Any] = [None] * ranks.size
    torch_dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def sum_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Sum gradients over the ranks, once per optimizer step. Losses carry global denominators, so a sum is exact."""
    if ranks.size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch_dist.all_reduce(parameter.grad)


@dataclass(frozen=True)
class BatchPlan:
    """Which groups of an epoch this rank samples and trains on; whole groups only.

    Derived from the world size at start-up, never configured for a number of GPUs.
    """

    groups: range
    group_size: int

    @classmethod
    def of(cls, num_groups: int, group_size: int, ranks: Ranks) -> BatchPlan:
        """Split ``num_groups`` evenly over the ranks.

        Raises:
            UserError: The groups do not divide evenly.
        """
        if num_groups % ranks.size:
            raise UserError(
                f"{num_groups} prompts an epoch cannot be split evenly over {ranks.size} workers",
                "rl.prompts_per_epoch",
                f"use a multiple of {ranks.size}",
                usage=True,
            )
        share = num_groups // ranks.size
        return cls(range(ranks.rank * share, (ranks.rank + 1) * share), group_size)
