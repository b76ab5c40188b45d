"""Atomic checkpoints without pickle: tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from firm.records import UserError


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Flatten an optimizer's per-parameter state; ``names`` follows the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer/{key}/{name}": value.detach().clone()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer/"):
            _, key, name = full_name.split("/", 2)
            target = by_name[name]
            device = "cpu" if key == "step" else target.device
            optimizer.state[target][key] = value.clone().to(device)


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``folder``; a reader sees the old one or the new one, never half of either."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, new / "tensors.safetensors")
        (new / "state.json").write_text(json.dumps(state, sort_keys=True))
    except OSError as error:
        raise UserError(f"cannot write a checkpoint: {error.strerror or error}", str(folder), "free space") from error
    for file in new.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # otherwise a save was killed between its renames, and the old one is all there is
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last complete checkpoint at ``folder``, or None. Survives a kill between the two renames of a save."""
    old = folder.with_name(folder.name + ".old")
    for place in (folder, old):
        if (place / "state.json").is_file():
            return load_file(place / "tensors.safetensors"), json.loads((place / "state.json").read_text())
    return None
