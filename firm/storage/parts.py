"""Tensors of a job in parts: each rank writes what it holds, and reads what it needs, whoever wrote it.

A tensor that is divided over ranks (a `DTensor`) is divided by rows, and a rank's part has its rows; one that is not is
in the one part of the first rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from firm.dist import Ranks
from firm.storage.files import disk_error

_NAME = re.compile(r"part-(\d+)-of-(\d+)\.safetensors")


def part_name(index: int, number: int) -> str:
    """Name of the file of one part of ``number``; ``index`` counts from 0."""
    return f"part-{index}-of-{number}.safetensors"


def place_of(name: str) -> tuple[int, int] | None:
    """Index and number of the parts in a file's name, with or without its folder; None where it is no part."""
    found = _NAME.fullmatch(name.rpartition("/")[2])
    return (int(found[1]), int(found[2])) if found else None


def write_part(folder: Path, index: int, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the rows that this rank holds, one of ``number`` parts; those of another number go from the folder.

    Raises:
        UserError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            if (place := place_of(other.name)) and place[1] != number:
                other.unlink(missing_ok=True)
        held = {name: local(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, folder / part_name(index, number))
    except OSError as error:
        raise disk_error(error, folder) from error


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(held: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor as that tensor, divided over ranks as ``like`` is."""
    if not isinstance(like, DTensor):
        return held
    return DTensor.from_local(held, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def rows_of(tensor: Tensor) -> range:
    """Which rows of a tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return range(tensor.shape[0] if tensor.dim() else 0)
    assert tensor.placements == (Shard(0),), "FSDP divides by rows"
    share = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_rank() * share, tensor.shape[0])
    held = range(start, start + tensor.to_local().shape[0])
    assert held.stop == min(start + share, tensor.shape[0]), "as torch.chunk divides"
    return held


class Parts:
    """All parts that a rank needs of what some ranks have written."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Open the files in ``folder``, which has the parts of one moment."""
        places = {place_of(path.name): path for path in folder.iterdir()}
        [number] = {place[1] for place in places if place}
        self._own = number == ranks.size
        indices = [ranks.rank] if self._own else range(number)
        self._files: Sequence[Any] = [safe_open(places[index, number], "pt") for index in indices]

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files[0].keys())

    def read(self, name: str, like: Tensor) -> Tensor:
        """The rows of the tensor ``name`` that this rank holds of ``like``; the whole where it is a number."""
        pieces = [file.get_slice(name) for file in self._files]
        if self._own or not pieces[0].get_shape():
            return self._files[0].get_tensor(name)
        wanted, start, found = rows_of(like), 0, []
        for piece in pieces:
            stop = start + piece.get_shape()[0]
            first, last = max(wanted.start, start), min(wanted.stop, stop)
            if first < last:
                found.append(piece[first - start : last - start])
            start = stop
        return torch.cat(found) if found else pieces[0][:0]
