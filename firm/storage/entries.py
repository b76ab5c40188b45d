"""Entries: size and hash of files, and whether files are still what an entry says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from firm.records import Entry, UserError
from firm.storage.files import check_key, disk_error, parallel, sha256_file
from firm.storage.store import Store

RESTORE = "restore the file, or delete the artifact and run its stage again"


def entries_of(folder: Path, names: Sequence[str]) -> list[Entry]:
    """Entries of files, whose names are relative to a folder.

    Raises:
        UserError: One cannot be read.
    """
    return parallel(lambda name: Entry(path=name, bytes=_size(folder / name), sha256=sha256_file(folder / name)), names)


def fault_of(folder: Path, entry: Entry) -> str:
    """What is wrong with a file; empty where it is what its entry says.

    Raises:
        UserError: It cannot be read.
    """
    path = folder / check_key(entry.path)
    if not path.is_file():
        return "file is missing"
    if (size := _size(path)) != entry.bytes:
        return f"file has {size} bytes, expected {entry.bytes}"
    return "" if sha256_file(path) == entry.sha256 else "SHA-256 of the file differs"


def check_sizes(store: Store, entries: Iterable[Entry]) -> None:
    """Check that all files of an artifact are there and as long as they were, without reading them.

    Raises:
        UserError: One is not; it is named.
    """
    for entry, fault in size_faults(store, entries):
        raise UserError(f"corrupt artifact: {fault}", f"{store.uri}/{entry.path}", RESTORE)


def size_faults(store: Store, entries: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Files that are not there or not as long as they were, each with what is wrong."""
    sizes = dict(store.list())
    for entry in entries:
        if (size := sizes.get(check_key(entry.path))) != entry.bytes:
            yield entry, "file is missing" if size is None else f"file has {size} bytes, expected {entry.bytes}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise disk_error(error, path) from error
