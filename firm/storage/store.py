"""One small interface over a folder and an S3 bucket, and the folder behind it.

Keys are relative POSIX paths. Every failure surfaces as a `UserError` that names the culprit.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from firm.storage.files import TEMPORARY, atomic_write, check_key, disk_error


class Store(Protocol):
    """Bytes by key. All methods raise `UserError`, naming the key, where they cannot do their work."""

    uri: str

    def put(self, key: str, data: bytes | Path) -> None:
        """Write bytes, or the content of a file, atomically: readers see the old content or the new."""

    def create(self, key: str, data: bytes) -> bool:
        """Write bytes where nothing is; returns whether they are there now, False where something else was first.

        Of several that create the same key with different bytes at once, exactly one succeeds.
        """

    def get(self, key: str) -> bytes:
        """Return the content of `key`."""

    def fetch(self, key: str, path: Path) -> None:
        """Download `key` to the file `path`, which appears complete or not at all."""

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """Return (key, size in bytes) of all keys that start with `prefix`, sorted; no unfinished files."""

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is absent."""


class LocalStore:
    """A folder, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def put(self, key: str, data: bytes | Path) -> None:
        """See `Store.put`."""
        with atomic_write(self.root / check_key(key)) as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        with atomic_write(self.root / check_key(key), replace=False) as file:
            file.write(data)
        return self.get(key) == data

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        path = self.root / check_key(key)
        try:
            return path.read_bytes()
        except OSError as error:
            raise disk_error(error, path) from error

    def fetch(self, key: str, path: Path) -> None:
        """See `Store.fetch`."""
        source = self.root / check_key(key)
        try:
            file = source.open("rb")
        except OSError as error:
            raise disk_error(error, source) from error
        with file, atomic_write(path) as copy:
            shutil.copyfileobj(file, copy)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """See `Store.list`."""
        found = []
        try:
            for folder, _, names in os.walk(self.root, onerror=_reraise):
                for name in names:
                    path = Path(folder) / name
                    key = path.relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not name.startswith(TEMPORARY):
                        with suppress(FileNotFoundError):  # removed since
                            found.append((key, path.stat().st_size))
        except OSError as error:
            raise disk_error(error, self.root) from error
        return sorted(found)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        path = self.root / check_key(key)
        try:
            return path.is_file()
        except OSError as error:
            raise disk_error(error, path) from error

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = self.root / check_key(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error


def _reraise(error: OSError) -> None:
    if error.errno != errno.ENOENT:  # a folder that is not there yet is empty
        raise error
