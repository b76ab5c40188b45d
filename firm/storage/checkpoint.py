"""Checkpoints without pickle: tensors as safetensors, the rest as JSON; the last complete one named by a pointer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from firm.storage.artifacts import WORK, Output
from firm.storage.files import atomic_write, disk_error

FOLDER = f"{WORK}/checkpoints"
POINTER = f"{WORK}/checkpoint.json"


class Checkpoints:
    """The checkpoints of a job, each a folder in ``work/checkpoints`` of its output.

    The pointer to the last one is written when its folder is durable: a reader sees the old checkpoint or the new one,
    on a disk and in a remote store alike.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self.folder = out.folder / FOLDER

    def last(self) -> Path | None:
        """The last complete checkpoint."""
        pointer = self._out.folder / POINTER
        return self.folder / json.loads(pointer.read_text())["name"] if pointer.is_file() else None

    def keep(self, name: str, *others: str) -> None:
        """Make the checkpoint ``name`` the last one, with ``others`` of the output's files; the one before goes."""
        before = self.last()
        self._out.publish(*others, f"{FOLDER}/{name}")
        with atomic_write(self._out.folder / POINTER) as file:
            file.write(json.dumps({"name": name}).encode())
        self._out.publish(POINTER)
        if before and before.name != name:
            self._out.discard(f"{FOLDER}/{before.name}")


def save_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write all state of a job into a new folder.

    Raises:
        UserError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / "tensors.safetensors"
        )
        (folder / "state.json").write_text(json.dumps(state, sort_keys=True))
    except OSError as error:
        raise disk_error(error, folder) from error


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`save_state`."""
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text())


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
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer/"):
            _, key, name = full_name.split("/", 2)
            target, group = by_name[name]
            # torch counts steps on the CPU, but where one kernel updates all parameters
            counts_there = group.get("fused") or group.get("capturable")
            device = "cpu" if key == "step" and not counts_there else target.device
            optimizer.state[target][key] = value.clone().to(device)
