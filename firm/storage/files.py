"""Files: atomic writes, hashes, and faults of the disk as errors for people."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from firm.records import UserError

TEMPORARY = ".tmp-"  # start of the names of unfinished files
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FAULTS = {*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What a failed file operation may be that is no mistake of the program's."""
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
    if is_full(error):
        return UserError("disk full", where, "free some space and run again; finished files are kept")
    if code == errno.EROFS:
        return UserError("the file system is read-only", where, "choose a writable folder")
    if code in (errno.EACCES, errno.EPERM):
        return UserError("no permission", where, "choose another folder or change its permissions")
    if code == errno.ENOENT:
        return UserError("no such file or folder", where, "check the path")
    return UserError(f"file operation failed: {error.strerror or error}", where, "check the path and the disk")


def os_error(error: BaseException | None) -> OSError | None:
    """The failed file operation behind an error, if there is one; libraries in Rust name it in their text only."""
    while error is not None and not isinstance(error, OSError):
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return error


def is_full(error: OSError | None) -> bool:
    """Whether a disk was full."""
    return error is not None and error.errno in _FULL


@contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well: fsync, then rename.

    Args:
        path: The file.
        replace: Whether it takes the place of an older file, which stays otherwise.

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
        if replace or not _linked(temporary, path):
            temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _linked(temporary: Path, path: Path) -> bool:
    """Whether there is a `path` now, the temporary file or an older one; False where files have no second name."""
    try:
        os.link(temporary, path)  # unlike a rename it never replaces
    except OSError:
        return path.exists()
    return True


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and those inside it, but unfinished ones."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY)]


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
    """This user's folder for caches on this machine: nobody else may look into it, or have put anything there.

    Raises:
        UserError: It is somebody else's, or cannot be made.
    """
    folder = Path(tempfile.gettempdir()) / f"firm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            fix = "remove it, or set TMPDIR to a folder of your own"
            raise UserError("the folder for temporary files belongs to somebody else", str(folder), fix)
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder


def parallel(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Map with threads (hashing and network release the GIL); the first failure cancels what has not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))
