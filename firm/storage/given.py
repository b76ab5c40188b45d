"""Files that users give: here, in S3, or of a dataset on the hub, each with the files that its rows name beside it.

Beside a file in S3 that `firm put` has uploaded is a list of hashes, ``FILE.sha256`` (``sha256sum -c`` reads it, too):
what is read is compared with it, so images are fetched one by one when they are looked at, and never read for their
hash alone. The hash of that list pins all of it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from firm.config.data_path import is_remote, split_pin, with_pin
from firm.records import UserError
from firm.storage.digests import content_hash, digest_of, followed
from firm.storage.files import parallel, sha256, sha256_file, temporary_folder
from firm.storage.hub import SIZES, fetch_from_hub, open_on_hub
from firm.storage.open import open_store
from firm.storage.ranges import open_ranges

if TYPE_CHECKING:
    from firm.storage.s3 import S3Store  # takes a quarter of a second to import

SUMS = ".sha256"
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_CONNECTION = ("FIRM_S3_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_PUT = "upload it again with `firm put`, and set the path that it prints"


class Given(Protocol):
    """A file that a configuration names. All methods raise `UserError`, naming what is at fault."""

    @property
    def name(self) -> str:
        """Its path or URI, for messages."""

    def fetch(self) -> Path:
        """The file itself on this machine; what is in S3 as it was when this process first read it."""

    def beside(self, name: str) -> str:
        """The path or URI of a file that a row names, pinned where its hash is known."""

    def content_hash(self, follow: Sequence[str]) -> str:
        """Hash of the content, files that rows name under the keys ``follow`` included; of a hub's commit its URI."""


def given(path: str) -> Given:
    """The file at a path or URI, see `firm.config.data_path`."""
    if not is_remote(path):
        return _Local(path)
    return _OnHub(path) if path.startswith("hf://") else _in_s3(path)


def open_remote(uri: str) -> BinaryIO:
    """Open a file in S3 or on the hub where it is; raises `UserError`, also while it is read."""
    if uri.startswith("hf://"):
        return open_on_hub(uri)
    bucket, key = _split(uri)
    store = _open_bucket(bucket)
    return open_ranges(_size(store, key), lambda start, length: store.part(key, start, length))


def render_sums(sums: Mapping[str, str]) -> bytes:
    """Name -> SHA-256 as ``sha256sum -c`` reads it, and `given` as well."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


class _Local:
    def __init__(self, path: str) -> None:
        self.name = path
        self._path = Path(path)

    def fetch(self) -> Path:
        return self._path

    def beside(self, name: str) -> str:
        return str(self._path.parent / name)

    def content_hash(self, follow: Sequence[str]) -> str:
        return content_hash(self._path, follow)


class _OnHub:
    def __init__(self, uri: str) -> None:
        self.name = uri

    def fetch(self) -> Path:
        return fetch_from_hub(self.name)

    def beside(self, name: str) -> str:
        dataset, _, rest = self.name.partition("@")
        commit, _, file = rest.partition("/")
        return f"{dataset}@{commit}/{_beside(file, name, self.name)}"

    def content_hash(self, follow: Sequence[str]) -> str:
        return self.name


class _InS3:
    def __init__(self, path: str) -> None:
        self.name, self._pin = split_pin(path)
        self._bucket, self._key = _split(self.name)
        self._store = _open_bucket(self._bucket)

    def fetch(self) -> Path:
        return self._path

    @cached_property
    def _path(self) -> Path:
        if not self._store.exists(self._key):
            fix = "correct the path, or upload the file with `firm put`, which prints it"
            raise UserError("there is no such file in S3", self.name, fix, usage=True)
        name = posixpath.basename(self._key)
        path = temporary_folder() / f"given-{sha256(self.name.encode())[:16]}" / name
        expected = self._sums.get(name)
        if expected is None or not path.is_file() or sha256_file(path) != expected:
            self._store.fetch(self._key, path)
            if expected is not None and sha256_file(path) != expected:
                raise changed("the file", self.name)
        return path

    @cached_property
    def _sums(self) -> Mapping[str, str]:
        """Name, relative to the file -> SHA-256; empty where there is no list of hashes."""
        listed = self._store.exists(self._key + SUMS)
        data = self._store.get(self._key + SUMS) if listed else b""
        if self._pin and sha256(data) != self._pin:
            raise changed("the list of hashes", self.name + SUMS)
        found = [_SUM.fullmatch(line) for line in data.decode(errors="replace").splitlines()]
        if not all(found):
            raise UserError("a list of hashes that cannot be read", self.name + SUMS, _PUT, usage=True)
        return {match[2]: match[1] for match in found if match}

    def beside(self, name: str) -> str:
        pin = self._hash_of(name) if self._sums else ""
        return with_pin(f"{self._bucket}/{_beside(self._key, name, self.name)}", pin)

    def _hash_of(self, name: str) -> str:
        if (digest := self._sums.get(posixpath.normpath(name))) is None:
            what = f"{name!r:.200} is not in the list of hashes"
            raise UserError(what, self.name + SUMS, _PUT, usage=True)
        return digest

    def content_hash(self, follow: Sequence[str]) -> str:
        names = [posixpath.basename(self._key), *followed(self.fetch(), follow)]
        return digest_of(names, map(self._hash_of, names) if self._sums else parallel(self._read_hash, names))

    def _read_hash(self, name: str) -> str:
        return sha256(self._store.get(_beside(self._key, name, self.name)))


_in_s3 = lru_cache(maxsize=16)(_InS3)


def changed(what: str, where: str) -> UserError:
    """The error where content is not what it is pinned to."""
    return UserError(f"{what} is not the one that was put: its SHA-256 differs", where, _PUT, usage=True)


def _beside(file: str, name: str, where: str) -> str:
    """The key of a file that a row of another one names."""
    key = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
    if key in (".", "..") or key.startswith(("/", "../")):
        fix = "give paths relative to the file"
        raise UserError(f"{name!r:.200} is nowhere beside the file", where, fix, usage=True)
    return key


def _split(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def _open_bucket(uri: str) -> S3Store:
    return _store(uri, *map(os.environ.get, _CONNECTION))


@lru_cache(maxsize=SIZES)
def _size(store: S3Store, key: str) -> int:
    return store.size(key)


@lru_cache(maxsize=8)
def _store(uri: str, *environment: str | None) -> S3Store:
    """A bucket; one client for all images, as connections are kept."""
    return cast("S3Store", open_store(uri))
