"""Claims in S3, which has no locks: a sequence of records below the prefix of an artifact.

Each record is created by one conditional write, so that all processes see the same sequence:

    records/0001.json    a process works in the folder 1; it writes its record again every few seconds
    records/0002.json    another has taken the work over, as that one was not heard of; it works in the folder 2
    records/0003.json    the folder 2 is the artifact

A process that was taken for dead and was not can harm nobody: its folder is not that of its successor, and it cannot
settle, as the next record is there. Ages are those of the server, so that no two clocks are compared.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import ValidationError

from firm import lifeline
from firm.progress import log_line
from firm.records import ArtifactRef, Record, UserError
from firm.storage.artifacts import MANIFEST, discard_cache
from firm.storage.files import canonical, parallel, sha256
from firm.storage.s3 import S3Store

RECORDS = "records"
BEAT_S = 5.0
LEASE_S = 30.0
"""Seconds of silence after which a process on another machine is taken for dead."""
POLL_S = 1.0


class Lease(Record):
    """A record of the sequence.

    Attributes:
        folder: Where its process works, or what is the artifact.
        holder: Of the process, unlike that of any other; empty where it has given the work back.
        process: What tells on the same machine whether it has ended.
        where: Host and process, for people.
        ready: Whether all that earlier attempts have published is in the folder.
        sha256: Of the manifest, where the folder is the artifact.
    """

    folder: int
    holder: str
    process: str = ""
    where: str = ""
    ready: bool = True
    sha256: str = ""


class Leased:
    """A claim to a prefix in S3, see `firm.storage.claims.Claim`."""

    def __init__(self, store: S3Store, number: int, lease: Lease) -> None:
        """`lease` is the record of this number, and ours unless it names the artifact."""
        self._store = store
        self._number = number
        self._lease = lease
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.uri = f"{store.uri}/{lease.folder}"
        self.artifact = _artifact(store, lease)

    def settle(self, ref: ArtifactRef) -> ArtifactRef:
        """See `firm.storage.claims.Claim.settle`."""
        record = Lease(folder=self._lease.folder, holder=self._lease.holder, sha256=ref.sha256)
        if not self._store.create(_key(self._number + 1), canonical(record.model_dump())):
            return self._theirs()
        self._remove_other_folders()
        return ref

    def _theirs(self) -> ArtifactRef:
        """What the process makes that has taken the work over."""
        while True:
            number, last, age = _last(self._store)
            if last and (made := _artifact(self._store, last)):
                return made
            if not last or not _lives(self._store, number, last, age):
                raise UserError(_LOST, self._store.uri, "run again to resume")
            time.sleep(POLL_S)

    def is_lost(self) -> bool:
        """Whether another process has taken the work over."""
        return self._store.exists(_key(self._number + 1))

    def keep(self) -> None:
        """Say every few seconds that this process lives, until `give_back`."""
        while not self._ended.wait(BEAT_S):
            try:
                self._write()
            except UserError as error:  # a server that is away, to which others will look twice when it is back
                log_line(f"cannot say that this process lives: {error}")

    def give_back(self) -> None:
        """Let others go on at once, where the work was not brought to its end."""
        self._ended.set()
        with suppress(UserError):
            if not self.is_lost():
                self._write(holder="")

    def _write(self, **changes: object) -> None:
        with self._lock:  # the thread that keeps the lease must not write an older state over a newer one
            self._lease = self._lease.model_copy(update=changes)
            self._store.put(_key(self._number), canonical(self._lease.model_dump()))

    def fill(self) -> None:
        """Move what the last attempt has published into this one's folder."""
        if self._lease.ready:
            return
        source = f"{_ready_folder(self._store, self._number)}/"
        own = f"{self._lease.folder}/"
        names = [key.removeprefix(source) for key, _ in self._store.list(source)]
        parallel(lambda name: self._copy(source + name, own + name), [n for n in names if n != MANIFEST])
        self._write(ready=True)
        self._remove_other_folders()

    def _copy(self, source: str, target: str) -> None:
        try:
            self._store.copy(source, target)
        except UserError:
            if self._store.exists(source):  # else the worker of a killed process, at its end, has removed it since
                raise

    def _remove_other_folders(self) -> None:
        kept = (f"{RECORDS}/", f"{self._lease.folder}/")
        parallel(self._store.delete, [key for key, _ in self._store.list() if not key.startswith(kept)])
        for number in range(1, self._number):
            if number != self._lease.folder:
                discard_cache(f"{self._store.uri}/{number}")


_LOST = f"another process took this work over, as this one was not heard of for {LEASE_S:.0f} s"


@contextmanager
def lease(store: S3Store, in_place: bool) -> Iterator[Leased]:
    """See `firm.storage.claims.claim`."""
    leased = _take(store, in_place)
    if leased.artifact:
        yield leased
        return
    threading.Thread(target=leased.keep, name="lease", daemon=True).start()
    try:
        leased.fill()
        yield leased
    except UserError as error:
        if leased.is_lost():
            raise UserError(_LOST, store.uri, "run again: its result is waited for") from error
        raise
    finally:
        leased.give_back()


def find_settled(store: S3Store) -> ArtifactRef | None:
    """The artifact that a prefix's last record names, unless it was deleted."""
    _, last, _ = _last(store)
    return _artifact(store, last) if last and _is_there(store, last) else None


def _take(store: S3Store, in_place: bool) -> Leased:
    said = False
    while True:
        number, last, age = _last(store)
        if last and last.sha256 and _is_there(store, last):
            return Leased(store, number, last)
        if last and not last.sha256 and _lives(store, number, last, age):
            if not said:
                log_line(f"{last.where} works on {store.uri}: waiting for it")
                said = True
            time.sleep(POLL_S)
            continue
        mine = _next(store, number, last, in_place)
        if store.create(_key(number + 1), canonical(mine.model_dump())):
            return Leased(store, number + 1, mine)


def _next(store: S3Store, number: int, last: Lease | None, in_place: bool) -> Lease:
    """The record that is to follow the last one, whose process has ended."""
    holder = secrets.token_hex(8)
    if last and last.ready and _is_there(store, last):  # to settle is all that it had not done
        return Lease(folder=last.folder, holder=holder, sha256=sha256(store.get(f"{last.folder}/{MANIFEST}")))
    if last and last.sha256:  # somebody has deleted the artifact: nothing of it is to be found again
        last = None
    in_place = in_place and last is not None
    return Lease(
        folder=_ready_folder(store, number) if in_place else number + 1,
        holder=holder,
        process=lifeline.identity(os.getpid()),
        where=f"process {os.getpid()} on {socket.gethostname()}",
        ready=in_place or last is None,
    )


def _ready_folder(store: S3Store, number: int) -> int:
    """The newest folder that holds all that had been published: a process may end while it fills its own."""
    leases = (_parse(store, _key(n), store.get(_key(n))) for n in range(number, 0, -1))
    return next(lease.folder for lease in leases if lease.ready)


def _last(store: S3Store) -> tuple[int, Lease | None, float]:
    """Number of the last record, the record and its age in seconds; 0 and None where there is none."""
    keys = [key for key, _ in store.list(f"{RECORDS}/")]
    if not keys:
        return 0, None, 0.0
    data, age = store.look(keys[-1])
    return int(keys[-1].removeprefix(f"{RECORDS}/").removesuffix(".json")), _parse(store, keys[-1], data), age


def _key(number: int) -> str:
    return f"{RECORDS}/{number:04d}.json"


def _parse(store: S3Store, key: str, data: bytes) -> Lease:
    try:
        return Lease.model_validate_json(data)
    except ValidationError as error:
        fix = f"delete {store.uri} and run its stage again"
        raise UserError("not a record of who works here", f"{store.uri}/{key}", fix) from error


def _artifact(store: S3Store, lease: Lease) -> ArtifactRef | None:
    return ArtifactRef(uri=f"{store.uri}/{lease.folder}", sha256=lease.sha256) if lease.sha256 else None


def _is_there(store: S3Store, lease: Lease) -> bool:
    return store.exists(f"{lease.folder}/{MANIFEST}")


def _lives(store: S3Store, number: int, lease: Lease, age_s: float) -> bool:
    """Whether the process of the last record lives; one that is silent elsewhere is looked at twice."""
    if not lease.holder:
        return False
    ended = lifeline.has_ended(lease.process)
    if ended is None and age_s > LEASE_S:
        time.sleep(3 * BEAT_S)  # the server may have been away: who lives writes soon after it is back
        later, _, age_s = _last(store)
        return later != number or age_s <= LEASE_S
    return not ended
