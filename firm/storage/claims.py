"""Claims: of all processes that do the same work at once, one makes the artifact and the others get it from that one.

In a folder the one that works holds a lock of the kernel, which ends with its process; the locked file keeps the
SHA-256 of the manifest that it has made. S3 has no locks: see `firm.storage.leases`. The reasons are in
docs/decisions/0013.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from firm.progress import log_line
from firm.records import ArtifactRef, UserError
from firm.storage.artifacts import MANIFEST
from firm.storage.entries import RESTORE
from firm.storage.files import disk_error, sha256
from firm.storage.open import open_store
from firm.storage.store import LocalStore, Store

POLL_S = 0.5

_held: set[int] = set()


class Claim(Protocol):
    """The right to make an artifact, or the artifact where it has been made."""

    @property
    def uri(self) -> str:
        """Where to write it."""

    @property
    def artifact(self) -> ArtifactRef | None:
        """What was made; nothing is left to do then."""

    def settle(self, ref: ArtifactRef) -> ArtifactRef:
        """Make the artifact at `uri` the one that all get; returns another one where that was first.

        Raises:
            UserError: Another process has taken the work over, and has not ended it either.
        """


@dataclass(frozen=True)
class Held:
    """A claim to a folder, see `Claim`: what is made there is the artifact."""

    uri: str
    artifact: ArtifactRef | None
    lock: FileIO | None = None

    def settle(self, ref: ArtifactRef) -> ArtifactRef:
        """See `Claim.settle`."""
        if self.lock:
            self.lock.truncate(0)
            self.lock.write(ref.sha256.encode())
        return ref


@contextmanager
def claim(uri: str, in_place: bool = False) -> Iterator[Claim]:
    """Wait while another process works on an artifact, then claim it; a process that has ended is not waited for.

    What an earlier attempt has published is found again where `Claim.uri` points.

    Args:
        uri: URI of the artifact, the same for all that do this work.
        in_place: Go on where the last attempt wrote instead of in a copy, as its job may still be running there.

    Raises:
        UserError: The store cannot be used, or has no means to keep two processes apart.
    """
    store = open_store(uri)
    ready = _at(store)
    if ready:
        yield Held(store.uri, ready)
    elif isinstance(store, LocalStore):
        with _locked(store.root) as lock:
            ready = _at(store)
            if not ready:
                lock.truncate(0)
            yield Held(store.uri, ready, lock)
    else:
        from firm.storage.leases import lease
        from firm.storage.s3 import S3Store

        assert isinstance(store, S3Store)
        with lease(store, in_place) as found:
            yield found


def find(uri: str) -> ArtifactRef | None:
    """The artifact that was made at a URI, or where a `Claim.uri` pointed; None where there is none yet.

    Raises:
        UserError: The store cannot be read.
    """
    store = open_store(uri)
    if (ready := _at(store)) or isinstance(store, LocalStore):
        return ready
    from firm.storage.leases import find_settled
    from firm.storage.s3 import S3Store

    assert isinstance(store, S3Store)
    return find_settled(store)


def _at(store: Store) -> ArtifactRef | None:
    if not store.exists(MANIFEST):
        return None
    found = sha256(store.get(MANIFEST))
    if isinstance(store, LocalStore) and (lock := _lock_of(store.root)).exists():
        made = lock.read_bytes()
        if made and made != found.encode():
            raise UserError("corrupt artifact: SHA-256 of the manifest differs", f"{store.uri}/{MANIFEST}", RESTORE)
    return ArtifactRef(uri=store.uri, sha256=found)


def _lock_of(folder: Path) -> Path:
    """A file beside the folder, which stays, as one that is removed could be locked twice."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _locked(folder: Path) -> Iterator[FileIO]:
    path = _lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise disk_error(error, path) from error
    with file:
        if not _lock(file, path):
            log_line(f"another process works on {folder}: waiting for it")
            while not _lock(file, path):
                time.sleep(POLL_S)
        _held.add(file.fileno())
        try:
            yield file
        finally:
            _held.remove(file.fileno())


def held_locks() -> tuple[int, ...]:
    """File descriptors of the locks that this process holds; who inherits them holds them, too."""
    return tuple(_held)


def _lock(file: FileIO, path: Path) -> bool:
    """Whether this process holds the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        what = f"this file system has no locks ({error.strerror}), without which two runs could harm each other's work"
        raise UserError(what, str(path), "set `store` to a folder on another disk, or to s3://bucket/prefix") from error
    return True
