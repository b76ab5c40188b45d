"""Content hashes of the files and folders that people name, remembered for as long as these do not change.

A file's hash is looked up by its path, inode, size and time of change, so that the weights of a large model are read
once and not once a stage. It is the inode's time, which no copy with its times kept can set back as it can that of the
content. Links are followed: one that points elsewhere has another inode. The memory is a file in the temporary folder;
without it everything is hashed again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from firm.records import UserError
from firm.storage.files import atomic_write, disk_error, parallel, sha256, sha256_file, temporary_folder
from firm.storage.rows import iter_rows
from firm.texts import parse_json, read_text

MEMORY = "digests.json"
SETTLED_S = 2.0  # a file changed later than this may change again without a new time

Known = dict[str, list[int | str]]
"""Absolute path -> inode, size, time of change in nanoseconds, SHA-256."""


def content_hash(path: Path, follow: Sequence[str] = (), suffix: str = "") -> str:
    """Hash of a file's content, or of the names and contents of the files in a folder.

    Args:
        path: The file or folder.
        follow: Keys of the rows of a JSON, JSONL or Parquet file that name further files, relative to it: these count.
        suffix: How the names of the files in a folder end that count.

    Raises:
        UserError: The file or a followed one is missing or cannot be read.
    """
    names = sorted(_names(path, suffix)) if path.is_dir() else [path.name, *followed(path, follow)]
    folder = path if path.is_dir() else path.parent
    return digest_of(names, hashes_of(folder / name for name in names))


def digest_of(names: Sequence[str], hashes: Iterable[str]) -> str:
    """One hash of files, by their names and the hashes of their contents."""
    return sha256(json.dumps(list(zip(names, hashes, strict=True))).encode())


def _names(folder: Path, suffix: str) -> Iterator[str]:
    """Names of the files that end so in a folder and those inside it, links to folders included."""
    for here, folders, files in os.walk(folder, followlinks=True):
        above = f"{os.path.realpath(here)}/"
        folders[:] = [name for name in folders if not above.startswith(f"{os.path.realpath(Path(here, name))}/")]
        paths = (Path(here, name) for name in files if name.endswith(suffix))
        yield from (path.relative_to(folder).as_posix() for path in paths if path.is_file())


def followed(path: Path, keys: Sequence[str]) -> list[str]:
    """Names of further files in the rows of a JSON, JSONL or Parquet file; malformed rows are left to the reader."""
    if not keys:
        return []
    if path.suffix.lower() == ".parquet":
        return _named((row for _, row in iter_rows(path)), keys)
    text = read_text(path, "rows")
    value = _parsed(text) if path.suffix.lower() == ".json" else None
    return _named(value if isinstance(value, list) else map(_parsed, text.split("\n")), keys)


def _named(rows: Iterable[object], keys: Sequence[str]) -> list[str]:
    """What is named under these keys, also in lists."""
    values = (row.get(key) for row in rows if isinstance(row, dict) for key in keys)
    names = (name for value in values for name in (value if isinstance(value, list) else [value]))
    return sorted({name for name in names if isinstance(name, str)})


def _parsed(text: str) -> object:
    try:
        return parse_json(text, "", "")
    except UserError:
        return None


def hashes_of(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files; raises `UserError` where one is missing or cannot be read."""
    memory = temporary_folder() / MEMORY
    known = _recall(memory)
    fresh: Known = {}

    def hash_of(path: Path) -> str:
        try:
            status = path.stat()
        except OSError as error:
            raise disk_error(error, path) from error
        except ValueError as error:  # a name that no file can have
            raise UserError("no such file", repr(str(path)), "check the path", usage=True) from error
        state = [status.st_ino, status.st_size, status.st_ctime_ns]
        *before, digest = known.get(str(path.absolute()), [""])
        if before == state:
            return str(digest)
        digest = sha256_file(path)
        if time.time() - status.st_ctime > SETTLED_S:
            fresh[str(path.absolute())] = [*state, digest]
        return digest

    found = parallel(hash_of, list(paths))
    if fresh:
        with atomic_write(memory) as file:
            file.write(json.dumps(known | fresh).encode())
    return found


def _recall(memory: Path) -> Known:
    try:
        known: Known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known
