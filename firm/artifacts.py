"""Artifacts: a prefix in a store that exists once its ``manifest.json`` does, which is written last.

A stage writes through `Output` and reads through `open_input`, which verifies every byte against the manifest.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from firm.records import ArtifactRef, Entry, Manifest, UserError
from firm.store import TEMPORARY, LocalStore, Store, atomic_write, check_key, disk_error, open_store, sync

MANIFEST = "manifest.json"
SMALL_BYTES = 2**20
THREADS = 8
A = TypeVar("A")
B = TypeVar("B")


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


class Output:
    """Where a stage writes its artifact. Only one process of a stage may open it.

    Attributes:
        uri: Where the artifact is or will be.
        folder: Local folder to write into, work files included. For a local store the artifact itself, otherwise a
            cache: what is not published is lost with the machine.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.uri, self.folder, self._store = store.uri, folder, store
        self._remote = not isinstance(store, LocalStore)
        self._published: dict[str, tuple[int, int]] = {}  # name -> size and mtime_ns when it was made durable

    @classmethod
    def open(cls, uri: str, scratch: Path | None = None) -> Output:
        """Open an artifact for writing, with all that earlier attempts have published.

        The cache of a remote store becomes an exact copy of what was published, so that a checkpoint and a journal
        in it are of the same moment. Of a complete artifact only small files are downloaded, such as the summary.
        Unfinished files of a killed process are removed.

        Args:
            uri: URI of the artifact, see `open_store`.
            scratch: Where caches of remote stores go, each in a folder of its own; default: the temporary folder.

        Raises:
            UserError: The store cannot be read or the folder cannot be written.
        """
        store = open_store(uri)
        if isinstance(store, LocalStore):
            output = cls(store, store.root)
            output._prepare_folder()
            return output
        output = cls(store, _cache(scratch, store.uri, store.uri))
        output._prepare_folder()
        output._mirror()
        return output

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def _mirror(self) -> None:
        sizes = {check_key(name): size for name, size in self._store.list()}
        names = [name for name, size in sizes.items() if MANIFEST not in sizes or size <= SMALL_BYTES]
        for path in _files_below(self.folder):
            if path.relative_to(self.folder).as_posix() not in sizes:
                _remove(path)
        _parallel(lambda name: self._store.fetch(name, self.folder / name), names)
        self._published = {name: _state(self.folder / name) for name in names}

    def publish(self, *names: str) -> None:
        """Make finished files, or all files of subfolders, durable; returns once they are.

        A set of files that belong together is published first, and then the file that points at it.

        Args:
            names: Paths relative to `folder`.

        Raises:
            UserError: A file is missing or cannot be stored.
        """
        _parallel(self._publish_one, self._expand(names))

    def _publish_one(self, name: str) -> None:
        path = self.folder / name
        state = _state(path)
        if self._published.get(name) == state:
            return
        if self._remote:
            self._store.put(name, path)
        else:
            try:
                sync(path)
            except OSError as error:
                raise disk_error(error, path) from error
        self._published[name] = state

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None where the artifact is not complete."""
        return _parse(self._store.get(MANIFEST), self.uri) if self._store.exists(MANIFEST) else None

    def ref(self) -> ArtifactRef:
        """Return the pointer to the complete artifact.

        Raises:
            UserError: It is not complete.
        """
        return ArtifactRef(uri=self.uri, sha256=_sha256(self._store.get(MANIFEST)))

    def commit(
        self, stage: str, key: str, inputs: dict[str, str], metadata: dict[str, Any], files: Sequence[str]
    ) -> ArtifactRef:
        """Publish what is not yet published, then make the artifact visible by writing its manifest.

        Args:
            stage: Name of the stage.
            key: Fingerprint of what the artifact was made from.
            inputs: Name of each input artifact -> SHA-256 of its manifest.
            metadata: JSON values; no times, as two equal runs give equal bytes.
            files: Files and subfolders, relative to `folder`, that make up the artifact.

        Raises:
            UserError: A file is missing or cannot be stored, or another content was committed here before.
        """
        names = self._expand(files)
        paths = [self.folder / name for name in names]
        hashes = _parallel(sha256_file, paths)
        entries = [
            Entry(path=name, bytes=_state(path)[0], sha256=digest)
            for name, path, digest in zip(names, paths, hashes, strict=True)
        ]
        manifest = Manifest(stage=stage, key=key, entries=entries, inputs=inputs, metadata=metadata)
        data = _canonical(manifest.model_dump(mode="json"))
        ref = ArtifactRef(uri=self.uri, sha256=_sha256(data))
        if self._store.exists(MANIFEST) and self.ref() != ref:
            raise UserError("another artifact is there already", self.uri, "remove it, or use another run name")
        self.publish(*names)
        self._store.put(MANIFEST, data)
        return ref

    def discard(self, *names: str) -> None:
        """Remove work files or subfolders, in the folder and in the store; absent ones are fine.

        Raises:
            UserError: They cannot be removed.
            ValueError: A name is part of the committed artifact.
        """
        if not names:
            return
        manifest = self.manifest()
        kept = {MANIFEST, *(entry.path for entry in manifest.entries)} if manifest else {MANIFEST}
        for name in map(check_key, names):
            if any(_is_within(path, name) for path in kept):
                raise ValueError(f"{name} is part of the artifact {self.uri}")
            if self._remote:
                _parallel(self._store.delete, [key for key, _ in self._store.list(name) if _is_within(key, name)])
            _remove(self.folder / name)
            self._published = {key: state for key, state in self._published.items() if not _is_within(key, name)}

    def _expand(self, names: Iterable[str]) -> list[str]:
        """Names of files, with subfolders replaced by the files in them; sorted, each once."""
        found: set[str] = set()
        for name in names:
            path = self.folder / check_key(name)
            below = _files_below(path) if path.is_dir() else [path]
            found.update(file.relative_to(self.folder).as_posix() for file in below)
        if MANIFEST in found:
            raise ValueError(f"{MANIFEST} is written by commit")
        return sorted(found)


def open_input(ref: ArtifactRef, scratch: Path | None = None) -> Path:
    """Return a local folder with the artifact, every file verified by size and SHA-256.

    A local artifact is read in place, a remote one downloaded in parallel; files of an earlier download are used
    again where their content is right.

    Args:
        ref: The artifact.
        scratch: Where caches of remote stores go, each in a folder of its own; default: the temporary folder.

    Raises:
        UserError: The artifact or one of its files is missing, incomplete or not what it was; the file is named.
    """
    store, manifest = open_store(ref.uri), read_manifest(ref)
    remote = not isinstance(store, LocalStore)
    folder = store.root if isinstance(store, LocalStore) else _cache(scratch, ref.uri, ref.sha256)

    def check(entry: Entry) -> None:
        path = folder / check_key(entry.path)
        if remote and (not path.is_file() or _fault(path, entry)):
            store.fetch(entry.path, path)
        if fault := _fault(path, entry):
            fix = "restore the file, or delete the artifact and run its stage again"
            raise UserError(f"corrupt artifact: {fault}", f"{ref.uri}/{entry.path}", fix)

    _parallel(check, manifest.entries)
    return folder


def read_manifest(ref: ArtifactRef) -> Manifest:
    """Return the verified manifest of an artifact.

    Raises:
        UserError: It is missing or is not the one that `ref` points to.
    """
    store = open_store(ref.uri)
    if not store.exists(MANIFEST):
        fix = "check the URI, or let the stage that writes it finish"
        raise UserError("no complete artifact: manifest.json is missing", ref.uri, fix)
    data = store.get(MANIFEST)
    if (found := _sha256(data)) != ref.sha256:
        what = f"the artifact is another one: its manifest has SHA-256 {found[:12]}, expected {ref.sha256[:12]}"
        raise UserError(what, f"{ref.uri}/{MANIFEST}", "it was replaced or damaged: run the stages again from there")
    return _parse(data, ref.uri)


def write_ref(ref: ArtifactRef, path: Path) -> None:
    """Write a pointer to an artifact as a JSON file.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(_canonical(ref.model_dump()))


def read_ref(path: Path) -> ArtifactRef:
    """Read a pointer written by `write_ref`.

    Raises:
        UserError: The file is missing or is not such a pointer.
    """
    try:
        return ArtifactRef.model_validate_json(path.read_bytes())
    except OSError as error:
        raise disk_error(error, path) from error
    except ValidationError as error:
        fix = "give the file that a stage wrote, with keys uri and sha256"
        raise UserError("not a pointer to an artifact", str(path), fix) from error


def _parse(data: bytes, uri: str) -> Manifest:
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        fix = "delete the artifact and run its stage again"
        raise UserError(f"malformed manifest: {first['msg']}", f"{uri}/{MANIFEST}", fix) from error


def _fault(path: Path, entry: Entry) -> str:
    """What is wrong with a file of an artifact; empty where it is right."""
    if not path.is_file():
        return "file is missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"file has {size} bytes, expected {entry.bytes}"
    return "" if sha256_file(path) == entry.sha256 else "SHA-256 of the file differs"


def _cache(scratch: Path | None, uri: str, identity: str) -> Path:
    """A folder of its own for each content, as old files of another artifact must not mix in."""
    root = scratch or Path(tempfile.gettempdir()) / f"firm-{_user()}"
    return root / f"{uri.rsplit('/', 1)[-1]}-{_sha256(identity.encode())[:16]}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        return "user"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise disk_error(error, path) from error
    return status.st_size, status.st_mtime_ns


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY)]


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def _parallel(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Map with threads (hashing and network release the GIL); the first failure cancels what has not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))
