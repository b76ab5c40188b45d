"""Checkpoints without pickle: tensors as safetensors, the rest as JSON, and what they hold verified by hash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from firm import dist
from firm.progress import log_line
from firm.records import Entry, Record, UserError
from firm.storage.artifacts import WORK, Output
from firm.storage.entries import entries_of, fault_of
from firm.storage.files import atomic_write, canonical, disk_error, files_below, parallel

FOLDER = f"{WORK}/checkpoints"
CONTENTS = "checkpoint.json"
"""File of a checkpoint that is written last: its place in the sequence, and size and hash of the others."""
OTHERS = "others"
KEPT = 2
SET_ASIDE = f"{WORK}/set-aside"


class Contents(Record):
    """What a checkpoint holds; ``order`` counts them from 1."""

    order: int
    entries: list[Entry]


class Checkpoints:
    """The last two checkpoints of a job, each a folder in ``work/checkpoints`` of its output.

    A checkpoint exists once its table of contents does, on a disk and in a remote store alike. What is resumed from has
    the bytes that were saved; a damaged one is set aside, and the one before is used.
    """

    def __init__(self, out: Output, minutes: float = math.inf) -> None:
        """``minutes`` is the longest time from one checkpoint to the next."""
        self._out = out
        self._minutes = minutes
        self._saved = time.monotonic()
        self.folder = out.folder / FOLDER

    def overdue(self) -> bool:
        """Whether the last checkpoint is too long ago, by the first rank's clock. All ranks get the same answer."""
        ranks = dist.start()
        late = time.monotonic() - self._saved >= 60 * self._minutes
        return any(dist.gather([late] if ranks.is_main else [], ranks))

    def last(self) -> Path | None:
        """The last sound checkpoint, the same on all ranks; those after it are set aside, with a message.

        Raises:
            UserError: A rank on another machine has a damaged copy of it.
        """
        ranks = dist.start()
        [name] = dist.gather([self._newest_sound()] if ranks.is_main else [], ranks)
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        if name and first_here and not ranks.is_main and (fault := self._fault(name)):
            raise UserError(f"a damaged checkpoint: {fault}", str(self.folder / name), "run again to resume")
        return self.folder / name if name else None

    def _newest_sound(self) -> str | None:
        for name in reversed(self._all()):
            fault = self._fault(name)
            if not fault:
                log_line(f"going on from {name}")
                self._restore(name)
                return name
            self._set_aside(name, fault)
        return None

    def _restore(self, name: str) -> None:
        """Give the output's other files the content they had."""
        copies = self.folder / name / OTHERS
        for copy in files_below(copies):
            with atomic_write(self._out.folder / copy.relative_to(copies)) as file:
                file.write(copy.read_bytes())

    def _set_aside(self, name: str, fault: str) -> None:
        log_line(f"the checkpoint {name} is damaged and set aside: {fault}")
        path = self._out.folder / SET_ASIDE / f"{name}-{time.time_ns()}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).rename(path)
        except OSError as error:
            raise disk_error(error, path) from error
        self._out.discard(f"{FOLDER}/{name}")

    def _all(self) -> dict[str, Contents | None]:
        """All that were brought to their end, oldest first; those whose contents cannot be read come last."""
        found = {path.parent.name: _contents(path) for path in self.folder.glob(f"*/{CONTENTS}")}
        return dict(sorted(found.items(), key=lambda item: item[1].order if item[1] else math.inf))

    def _fault(self, name: str) -> str:
        """What is wrong with a checkpoint; empty where it is as it was saved."""
        contents = _contents(self.folder / name / CONTENTS)
        if contents is None:
            return f"{CONTENTS} cannot be read"
        try:
            faults = parallel(partial(fault_of, self.folder / name), contents.entries)
        except UserError as error:  # a file or a name that cannot be read
            return error.what
        return next((f"{entry.path}: {f}" for entry, f in zip(contents.entries, faults, strict=True) if f), "")

    def keep(self, name: str, *others: str) -> None:
        """Make the checkpoint ``name`` the last one, with ``others`` of the output's files; one of those before stays.

        Raises:
            UserError: It cannot be stored.
        """
        before = self._all()
        before.pop(name, None)
        path = self.folder / name
        path.joinpath(CONTENTS).unlink(missing_ok=True)
        for other in others:
            with atomic_write(path / OTHERS / other) as file:
                file.write((self._out.folder / other).read_bytes())
        files = sorted(file.relative_to(path).as_posix() for file in files_below(path))
        order = 1 + max((contents.order for contents in before.values() if contents), default=0)
        contents = Contents(order=order, entries=entries_of(path, files))
        self._out.publish(f"{FOLDER}/{name}")
        with atomic_write(path / CONTENTS) as file:
            file.write(canonical(contents.model_dump()))
        self._out.publish(f"{FOLDER}/{name}/{CONTENTS}")
        sound = [old for old, there in before.items() if there]
        self._out.discard(*(f"{FOLDER}/{old}" for old in before if old not in sound[1 - KEPT :]))
        self._saved = time.monotonic()


def _contents(path: Path) -> Contents | None:
    """The contents of a checkpoint; None where they cannot be read."""
    try:
        return Contents.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


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
