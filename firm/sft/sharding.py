"""Fully sharded training (FSDP2): of each parameter, its gradient and its moments a rank holds some rows.

A block's parameters are together on a rank while it computes, and those outside of blocks, such as embeddings and
head, during a whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from firm import dist
from firm.dist import Ranks


def in_float32(module: nn.Module) -> None:
    """Make what trains float32: in bfloat16 a step smaller than 1/256 of a weight is lost."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def shard(model: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
    """Leave each of several ranks its rows of the parameters, on its device; what trains becomes float32.

    Args:
        model: On the CPU, the same on all ranks.
        dtype: In which parameters are gathered for a block's computation. Gradients are summed in float32.
        ranks: All that train.
    """
    if ranks.size == 1:
        return in_float32(model)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    for module in (*blocks_of(model), model):
        in_float32(module)  # one after the other, so that the host never holds all of them in float32
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")  # of a LoRA, it goes past its own forward pass


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What a model repeats, inner ones first: the members of its lists of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in reversed(lists) for block in blocks]


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds some rows only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left whole: the parameters outside of blocks."""
    if isinstance(model, FSDPModule):
        model.reshard()


def unsharded(model: nn.Module, make: Callable[[], nn.Module], ranks: Ranks) -> nn.Module | None:
    """The trained model as a whole on the first rank, put together on its CPU; None on the others. All ranks call it.

    Args:
        model: Sharded or not.
        make: Makes the model that training started from, whose parameters have the same names.
        ranks: All that train.
    """
    if not is_sharded(model):
        return model if ranks.is_main else None
    whole = make() if ranks.is_main else None
    dist.barrier()  # reading it may take the first rank longer than others wait in a step
    places = dict(whole.named_parameters()) if whole else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gathered = cast(DTensor, parameter).full_tensor()
            if name in places:
                places[name].data.copy_(gathered)
    return whole
