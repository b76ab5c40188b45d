"""One small interface over a folder and an S3 bucket, and atomic files.

Keys are relative POSIX paths. Whatever goes wrong surfaces as a `UserError` that names the culprit. The environment
is read when a store is opened, never at import.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote

from firm.records import UserError

TEMPORARY = ".tmp-"  # start of the names of unfinished files
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Store(Protocol):
    """Bytes by key. All methods raise `UserError`, naming the key, where they cannot do their work."""

    uri: str

    def put(self, key: str, data: bytes | Path) -> None:
        """Write bytes, or the content of a file, at once: readers see the old content or the new."""

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


def open_store(uri: str) -> Store:
    """Open a folder path, ``file:///folder``, ``s3://bucket/prefix`` or ``minio://bucket/prefix``.

    An S3 endpoint comes from FIRM_S3_ENDPOINT or AWS_ENDPOINT_URL (default for s3: AWS itself), credentials from
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), the region from AWS_REGION. The server is not
    contacted yet.

    Raises:
        UserError: The URI or the environment does not say which store is meant.
    """
    scheme, separator, rest = uri.partition("://")
    if not uri or "\0" in uri:
        raise UserError("empty or impossible store URI", repr(uri), "give a folder or s3://bucket/prefix", usage=True)
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError("a file URI needs three slashes", uri, "write file:///absolute/folder", usage=True)
        return LocalStore(Path(unquote(rest)))
    if scheme not in ("s3", "minio"):
        raise UserError(f"unknown store scheme {scheme!r}", uri, "use a folder, file://, s3:// or minio://", usage=True)
    from firm.s3 import S3Store  # takes a quarter of a second to import, and local runs need none of it

    return S3Store(uri)


def check_key(key: str) -> str:
    """Return `key` where it is a relative path that stays inside its root.

    Raises:
        UserError: It is absolute, holds '..' or names an unfinished file.
    """
    parts = key.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in key or "\0" in key or parts[-1].startswith(TEMPORARY):
        raise UserError("not a path inside an artifact", repr(key), "use a relative path without '..'")
    return key


def disk_error(error: OSError, path: Path | str) -> UserError:
    """Say what a failed file operation means for a person."""
    where, code = str(path), error.errno
    if code in _FULL:
        return UserError("disk full", where, "free some space and run again; finished files are kept")
    if code == errno.EROFS:
        return UserError("the file system is read-only", where, "choose a writable folder")
    if code in (errno.EACCES, errno.EPERM):
        return UserError("no permission", where, "choose another folder or change its permissions")
    if code == errno.ENOENT:
        return UserError("no such file or folder", where, "check the path")
    return UserError(f"file operation failed: {error.strerror or error}", where, "check the path and the disk")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well: fsync, then rename.

    Raises:
        UserError: An OSError inside, such as a full disk; an older `path` is untouched.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}.{secrets.token_hex(6)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not tempfile: its mode 0600 would hide the file from other users of a shared volume
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
