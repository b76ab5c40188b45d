"""Content hashes of the files and folders that people name, remembered for as long as these do not change.

A file's hash is looked up by its path, size and time of change, so that the weights of a large model are read once and
not once a stage. It is the inode's time, which no copy with its times kept can set back as it can that of the content.
The memory is a file in the temporary folder; without it everything is hashed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from firm.records import UserError
from firm.storage.files import atomic_write, disk_error, parallel, sha256, sha256_file, temporary_folder
from firm.storage.rows import iter_rows

MEMORY = "digests.json"
SETTLED_S = 2.0  # a file changed later than this may change again without a new time

Known = dict[str, list[int | str]]
"""Absolute path -> size, time of change in nanoseconds, SHA-256."""


def content_hash(path: Path, follow: Sequence[str] = ()) -> str:
    """Hash of a file's content, or of the names and contents of all files in a folder.

    Args:
        path: The file or folder.
        follow: Keys of the rows of a JSON, JSONL or Parquet file that name further files, relative to it: these count.

    Raises:
        UserError: The file or a followed one is missing or cannot be read.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    else:
        names = [path.name, *_followed(path, follow)]
    folder = path if path.is_dir() else path.parent
    return sha256(json.dumps(list(zip(names, _hashes(folder / name for name in names), strict=True))).encode())


def _followed(path: Path, keys: Sequence[str]) -> list[str]:
    """Names of further files in the rows of a JSON, JSONL or Parquet file; malformed rows are left to the reader."""
    if not keys:
        return []
    if path.suffix == ".parquet":
        return _named([row for _, row in iter_rows(path)], keys)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise disk_error(error, path) from error
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", str(path), "save it as UTF-8", usage=True) from error
    value = _parsed(text) if path.suffix == ".json" else None
    return _named(value if isinstance(value, list) else [_parsed(line) for line in text.split("\n")], keys)


def _named(rows: Iterable[object], keys: Sequence[str]) -> list[str]:
    """What is named under these keys, also in lists."""
    values = [row.get(key) for row in rows if isinstance(row, dict) for key in keys]
    names = (name for value in values for name in (value if isinstance(value, list) else [value]))
    return sorted({name for name in names if isinstance(name, str)})


def _parsed(text: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError:
        return None
    return value


def _hashes(paths: Iterable[Path]) -> list[str]:
    memory = temporary_folder() / MEMORY
    known = _recall(memory)
    fresh: Known = {}

    def hash_of(path: Path) -> str:
        try:
            status = path.stat()
        except OSError as error:
            raise disk_error(error, path) from error
        size, changed, digest = known.get(str(path.absolute()), [-1, -1, ""])
        if (size, changed) == (status.st_size, status.st_ctime_ns):
            return str(digest)
        digest = sha256_file(path)
        if time.time() - status.st_ctime > SETTLED_S:
            fresh[str(path.absolute())] = [status.st_size, status.st_ctime_ns, digest]
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
