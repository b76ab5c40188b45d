"""Checkpoints without pickle: tensors as safetensors, the rest as JSON, and what they hold verified by hash."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

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
from firm.storage.parts import laid_out, place_of

FOLDER = f"{WORK}/checkpoints"
CONTENTS = "checkpoint.json"
"""File of a checkpoint that is written last: its place in the sequence, and size and hash of the others."""
OTHERS = "others"
KEPT = 2
SET_ASIDE = f"{WORK}/set-aside"
T = TypeVar("T")


class Contents(Record):
    """What a checkpoint holds; ``order`` counts them from 1."""

    order: int
    entries: list[Entry]


class Checkpoints:
    """The last two checkpoints of a job, each a folder in ``work/checkpoints`` of its output.

    A checkpoint exists once its table of contents does, on a disk and in a remote store alike. What is resumed from has
    the bytes that were saved; a damaged one is set aside, and the one before is used.

    Either the first rank keeps all of it (`keep`), or each rank stores its part, see `firm.storage.parts`, while it
    trains on (`begin`).
    """

    def __init__(self, out: Output, minutes: float = math.inf) -> None:
        """``minutes`` is the longest time from one checkpoint to the next."""
        self._out = out
        self._minutes = minutes
        self._saved = time.monotonic()
        self._begun: tuple[str, Future[list[Entry]]] | None = None
        self.folder = out.folder / FOLDER

    def overdue(self) -> bool:
        """Whether the last checkpoint is too long ago, by the first rank's clock. All ranks get the same answer.

        One that was begun and that all ranks have stored is brought to its end.
        """
        ranks = dist.start()
        late = time.monotonic() - self._saved >= 60 * self._minutes
        stored = self._begun is not None and self._begun[1].done()
        said = dist.gather([[late, stored]], ranks)
        if all(is_stored for _, is_stored in said):
            self.finish()
        return bool(said[0][0])

    def last(self) -> Path | None:
        """The last sound checkpoint, the same on all ranks; those after it are set aside, with a message.

        Of its parts a rank gets those that it needs.

        Raises:
            UserError: A rank on another machine has a damaged copy of what all have.
        """
        ranks = dist.start()
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        while True:
            [name] = dist.gather([self._newest_sound()] if ranks.is_main else [], ranks)
            if not name:
                return None
            if first_here and not ranks.is_main and (fault := self._fault(name, self._shared(name))):
                raise UserError(f"a damaged checkpoint: {fault}", str(self.folder / name), "run again to resume")
            faults = dist.gather([self._fault(name, self._parts(name, ranks, first_here))], ranks)
            if ranks.is_main:
                self._take(name, next(filter(None, faults), ""))
            if not any(faults):
                return self.folder / name

    def _newest_sound(self) -> str | None:
        for name in reversed(self._all()):
            fault = self._fault(name, self._shared(name))
            if not fault:
                return name
            self._set_aside(name, fault)
        return None

    def _take(self, name: str, fault: str) -> None:
        if fault:
            return self._set_aside(name, fault)
        log_line(f"going on from {name}")
        self._restore(name)

    def _shared(self, name: str) -> list[Entry] | None:
        """Files that all ranks need; None where the table of contents cannot be read."""
        contents = _contents(self.folder / name / CONTENTS)
        return None if contents is None else [entry for entry in contents.entries if not place_of(entry.path)]

    def _parts(self, name: str, ranks: dist.Ranks, first_here: bool) -> list[Entry]:
        """Parts that this rank sees to: its own; where there are not as many as ranks, a machine's first has all."""
        contents = _contents(self.folder / name / CONTENTS)
        entries = contents.entries if contents else []
        places = {place: entry for entry in entries if (place := place_of(entry.path))}
        own = places.get((ranks.rank, ranks.size))
        needed = [own] if own else list(places.values()) if first_here else []
        self._out.fetch(*(f"{FOLDER}/{name}/{entry.path}" for entry in needed))
        return needed

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

    def _fault(self, name: str, entries: Sequence[Entry] | None) -> str:
        """What is wrong with files of a checkpoint; empty where they are as they were saved."""
        if entries is None:
            return f"{CONTENTS} cannot be read"
        try:
            faults = parallel(partial(fault_of, self.folder / name), entries)
        except UserError as error:  # a file or a name that cannot be read
            return error.what
        return next((f"{entry.path}: {f}" for entry, f in zip(entries, faults, strict=True) if f), "")

    def keep(self, name: str, *others: str) -> None:
        """Make the checkpoint ``name`` the last one, with ``others`` of the output's files; one of those before stays.

        Raises:
            UserError: It cannot be stored.
        """
        path = self.folder / name
        path.joinpath(CONTENTS).unlink(missing_ok=True)
        for other in others:
            with atomic_write(path / OTHERS / other) as file:
                file.write((self._out.folder / other).read_bytes())
        self._end(name, self._store(name, [file.relative_to(path).as_posix() for file in files_below(path)]))

    def begin(self, name: str, *files: str) -> None:
        """Store this rank's ``files`` of the checkpoint ``name`` while work goes on. All ranks call it.

        The checkpoint exists once all ranks have stored theirs and call `overdue` or `finish`; one that was begun
        before comes to its end first.

        Raises:
            UserError: The one before cannot be stored.
        """
        dist.barrier()  # writing its files may have taken a rank longer than others wait in a step
        self.finish()
        if dist.start().is_main:
            self._discard_unfinished(name)
        self.folder.joinpath(name, CONTENTS).unlink(missing_ok=True)
        entries: Future[list[Entry]] = Future()
        Thread(target=_resolve, args=(entries, partial(self._store, name, files)), daemon=True).start()
        self._begun = name, entries
        self._saved = time.monotonic()

    def _discard_unfinished(self, but: str) -> None:
        """Remove what a job that was killed has left of checkpoints that never came to their end."""
        left = [path.name for path in self.folder.glob("*") if not path.joinpath(CONTENTS).exists()]
        self._out.discard(*(f"{FOLDER}/{name}" for name in left if name != but))

    def finish(self) -> None:
        """Wait for the checkpoint that was begun, if any, and bring it to its end. All ranks call it.

        Raises:
            UserError: It cannot be stored.
        """
        if self._begun is None:
            return
        (name, stored), self._begun = self._begun, None
        ranks = dist.start()
        entries = dist.gather([entry.model_dump() for entry in stored.result()], ranks)
        removed = self._end(name, [Entry(**entry) for entry in entries]) if ranks.is_main else []
        for old in dist.gather(removed, ranks):
            shutil.rmtree(self.folder / old, ignore_errors=True)  # there still, on another machine

    def _store(self, name: str, files: Sequence[str]) -> list[Entry]:
        entries = entries_of(self.folder / name, sorted(files))
        self._out.publish(*(f"{FOLDER}/{name}/{file}" for file in files))
        return entries

    def _end(self, name: str, entries: Sequence[Entry]) -> list[str]:
        """Let a checkpoint exist, as the last one, now that its files are stored; returns those that went."""
        before = self._all()
        before.pop(name, None)
        order = 1 + max((contents.order for contents in before.values() if contents), default=0)
        with atomic_write(self.folder / name / CONTENTS) as file:
            file.write(canonical(Contents(order=order, entries=list(entries)).model_dump()))
        self._out.publish(f"{FOLDER}/{name}/{CONTENTS}")
        sound = [old for old, there in before.items() if there]
        removed = [old for old in before if old not in sound[1 - KEPT :]]
        self._out.discard(*(f"{FOLDER}/{old}" for old in removed))
        self._saved = time.monotonic()
        return removed


def _resolve(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


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
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(copies, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps(state, sort_keys=True))
    except OSError as error:
        raise disk_error(error, folder) from error


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`save_state`."""
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Flatten an optimizer's per-parameter state, as it is; ``names`` follows the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`, of what this rank holds of each tensor."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer/"):
            _, key, name = full_name.split("/", 2)
            target, group = by_name[name]
            # torch counts steps on the CPU, but where one kernel updates all parameters
            counts_there = group.get("fused") or group.get("capturable")
            device = "cpu" if key == "step" and not counts_there else target.device
            held = value.to(device, copy=True)
            optimizer.state[target][key] = laid_out(held, target) if held.dim() else held
