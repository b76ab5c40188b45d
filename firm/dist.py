"""Processes, devices and randomness.

Randomness is passed, never global: every random draw has a seed derived from the run's seed and the purpose of the
draw, so a run gives the same result whatever the number of processes, interrupted and resumed or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from firm.gpus import ASKED, check_gpus
from firm.records import UserError
from firm.seeds import seed_for

T = TypeVar("T")
_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
STEP = timedelta(minutes=10)
"""How long processes that compute the same step wait for one another."""
PATIENCE = timedelta(hours=2)
"""How long they wait for what takes some of them longer: files, uploads, judges that are asked again."""


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

    def share(self, number: int) -> range:
        """Which of ``number`` things are this rank's: consecutive, and as many as any other's or one more or less."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)


def start() -> Ranks:
    """Join the process group that torchrun (or a PyTorchJob) describes in the environment; alone without one.

    Raises:
        UserError: There are not the GPUs that the launcher promised, or not one for each process.
    """
    size, rank, here = (int(os.environ.get(name, alone)) for name, alone in _ENVIRONMENT)
    cuda = torch.cuda.is_available()
    check_gpus(max(int(os.environ.get(ASKED, "0")), here + 1 if cuda else 0))
    device = torch.device("cuda", here) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not torch_dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # without torchrun: one process per pod
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=STEP)
        _waiting()  # made by all at once
    return Ranks(rank, size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        _waiting.cache_clear()


@cache
def _waiting() -> Any:
    """The group in which processes wait with `PATIENCE`, so that one that died in a step is missed within `STEP`."""
    return torch_dist.new_group(backend="gloo", timeout=PATIENCE)


def barrier() -> None:
    """Wait for all processes."""
    if torch_dist.is_initialized():
        torch_dist.barrier(group=_waiting())


def gather(items: Sequence[T], ranks: Ranks) -> list[T]:
    """Concatenate the ranks' lists of plain data in rank order, on every rank; they travel as JSON."""
    if ranks.size == 1:
        return list(items)
    text = json.dumps(list(items)).encode()
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(ranks.size)]
    torch_dist.all_gather(sizes, torch.tensor([len(text)]), group=_waiting())
    longest = int(max(sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(ranks.size)]
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    torch_dist.all_gather(parts, padded, group=_waiting())
    return [item for part in parts for item in json.loads(part.numpy().tobytes())]


def sum_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Sum gradients over the ranks, once per optimizer step. Losses carry global denominators, so a sum is exact.

    What has no gradient gets zeros, also on a rank alone, so that a step does the same whatever the number of ranks.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if ranks.size > 1:
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
