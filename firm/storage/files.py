"""Files: atomic writes, hashes, and faults of the disk as errors for people."""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from firm.records import UserError

TEMPORARY = ".tmp-"  # start of the names of unfinished files
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
THREADS = 8
A = TypeVar("A")
B = TypeVar("B")


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
    """Explain a failed file operation to the user."""
    where = str(path)
    code = error.errno
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


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, in constant memory.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise disk_error(error, path) from error


def canonical(value: Any) -> bytes:
    """JSON of which equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def temporary_folder() -> Path:
    """Where this user's caches on this machine are."""
    return Path(tempfile.gettempdir()) / f"firm-{_user()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        return "user"


def parallel(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Map with threads (hashing and network release the GIL); the first failure cancels what has not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))
