"""A frozen base that is sharded with FSDP2: a rank holds its share, and gathers a block while it computes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from firm.dist import Ranks


def shard_base(denoiser: nn.Module, trained: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Leave each of several ranks its share of what does not train; ``trained`` stays whole on all of them.

    From then on every forward pass is one of all ranks, see :meth:`firm.policies.policy.Policy.passes`.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    whole = set(trained)
    for module in blocks_of(denoiser):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    fully_shard(denoiser, mesh=mesh, ignored_params=whole)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """What is gathered together, one after another; the rest is gathered for a whole pass."""
    names = getattr(denoiser, "_no_split_modules", None) or ()  # diffusers' names of the classes of its blocks
    return [module for module in denoiser.modules() if type(module).__name__ in names]
