"""Free disk: whether there is room for what a run is sure to write. Images, for example, are not counted."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from firm.records import UserError

GB = 10**9


class Need(NamedTuple):
    """Bytes that will be written below a folder, and what they are."""

    folder: Path
    what: str
    bytes: int


def check_disk(needs: Iterable[Need]) -> None:
    """Check that each disk has room for all that is to be written to it.

    Raises:
        UserError: One has not; says how much each thing takes.
    """
    disks: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        disks[_there(need.folder).stat().st_dev].append(need)
    for wanted in disks.values():
        total = sum(need.bytes for need in wanted)
        free = shutil.disk_usage(_there(wanted[0].folder)).free
        if total > free:
            parts = ", ".join(f"{need.what} {need.bytes / GB:,.1f}" for need in wanted if need.bytes)
            what = f"the disk has {free / GB:,.1f} GB free, and the run will write about {total / GB:,.1f} ({parts})"
            fix = "free some space, or set `store` or HF_HOME to a folder on another disk"
            raise UserError(what, str(wanted[0].folder), fix)


def _there(folder: Path) -> Path:
    """The nearest folder that exists already."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
