"""Artifacts: a prefix in a store that exists once its ``manifest.json`` does, which is written last.

A stage writes through `Output` and reads through `firm.storage.inputs`, which verifies every byte against the manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from firm.progress import log_line
from firm.records import ArtifactRef, Entry, Manifest, UserError
from firm.storage.entries import entries_of, size_faults
from firm.storage.files import (
    TEMPORARY,
    atomic_write,
    canonical,
    check_key,
    disk_error,
    files_below,
    parallel,
    sha256,
    sync,
    temporary_folder,
)
from firm.storage.open import open_store
from firm.storage.store import LocalStore, Store

MANIFEST = "manifest.json"
TIMING = "timing.json"
WORK = "work"
"""Folder of a stage's work files (journals, checkpoints): kept until the artifact is complete, never part of it."""
BOARD = "tensorboard"
"""Folder of what a person watches while a job works (`firm.metrics.Board`): beside the artifact, not in it."""
HANDED_OVER = f"{WORK}/entries.json"
SMALL_BYTES = 2**22
_ENTRIES = TypeAdapter(list[Entry])


class Output:
    """Where a stage writes its artifact. Only one process of a stage may open it, see `firm.storage.claims`.

    Attributes:
        uri: Where the artifact is or will be.
        folder: Local folder to write into, work files included. For a local store the artifact itself, otherwise a
            cache: unpublished files are lost with the machine.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.uri = store.uri
        self.folder = folder
        self._store = store
        self._remote = not isinstance(store, LocalStore)
        self._published: dict[str, tuple[int, int]] = {}  # name -> size and mtime_ns when it was made durable
        self._handed_over: dict[str, Entry] = {}  # published by a job, perhaps on another machine

    @classmethod
    def open(
        cls,
        uri: str,
        scratch: Path | None = None,
        small_only: bool = False,
        left: Callable[[str], bool] = lambda name: False,
    ) -> Output:
        """Open an artifact for writing, with all that earlier attempts have published.

        The cache of a remote store becomes an exact copy of what was published, so that a checkpoint and a journal
        in it are of the same moment. Of a complete artifact only small files are downloaded, such as the summary.
        Unfinished files of a killed process are removed.

        Args:
            uri: URI of the artifact, see `open_store`.
            scratch: Where caches of remote stores go, each in a folder of its own; default: the temporary folder.
            small_only: Download small files only, and none of ``work`` or the board: a job on another machine may be at
                it, and remove what has just been listed.
            left: Files that stay where they are until `fetch` asks for them, if it does.

        Raises:
            UserError: The store cannot be read or the folder cannot be written.
        """
        store = open_store(uri)
        if isinstance(store, LocalStore):
            output = cls(store, store.root)
            output._prepare_folder()
            return output
        output = cls(store, cache_folder(scratch, store.uri, store.uri))
        output._prepare_folder()
        output._mirror(small_only, left)
        return output

    @classmethod
    def attach(cls, uri: str) -> Output:
        """The output that another process of this machine has opened, for looking at its folder."""
        store = open_store(uri)
        return cls(store, store.root if isinstance(store, LocalStore) else cache_folder(None, store.uri, store.uri))

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def _mirror(self, small_only: bool, left: Callable[[str], bool]) -> None:
        sizes = {check_key(name): size for name, size in self._store.list() if not left(name)}
        whole = MANIFEST not in sizes and not small_only
        others = (WORK, BOARD) if small_only else ()
        ours = (name for name in sizes if not any(_is_within(name, each) for each in others))
        names = [name for name in ours if whole or sizes[name] <= SMALL_BYTES]
        for path in files_below(self.folder):
            if path.relative_to(self.folder).as_posix() not in sizes:
                _remove(path)
        self._published = {}
        self._fetch(names)

    def fetch(self, *names: str) -> None:
        """Get the files that are in a remote store and not yet in the folder.

        Raises:
            UserError: The store cannot be read.
        """
        if self._remote:
            self._fetch([n for n in names if not (self.folder / n).exists() and self._store.exists(n)])

    def _fetch(self, names: Sequence[str]) -> None:
        parallel(lambda name: self._store.fetch(name, self.folder / name), names)
        self._published |= {name: _state(self.folder / name) for name in names}

    def publish(self, *names: str) -> None:
        """Make finished files, or all files of subfolders, durable; returns once they are.

        A set of files that belong together is published first, and then the file that points at it.

        Args:
            names: Paths relative to `folder`.

        Raises:
            UserError: A file is missing or cannot be stored.
        """
        parallel(self._publish_one, self._expand(names))

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
        return parse_manifest(self._store.get(MANIFEST), self.uri) if self._store.exists(MANIFEST) else None

    def ref(self) -> ArtifactRef:
        """Return the pointer to the complete artifact.

        Raises:
            UserError: It is not complete.
        """
        return ArtifactRef(uri=self.uri, sha256=sha256(self._store.get(MANIFEST)))

    def commit(
        self, stage: str, key: str, inputs: dict[str, str], metadata: dict[str, Any], files: Sequence[str]
    ) -> ArtifactRef:
        """Publish the remaining files, then make the artifact visible by creating its manifest, in one step.

        Where another process has made the same artifact first, that one is the result.

        Args:
            stage: Name of the stage.
            key: Fingerprint of what the artifact was made from.
            inputs: Name of each input artifact -> SHA-256 of its manifest.
            metadata: JSON values; no times, as two equal runs give equal bytes.
            files: Files and subfolders, relative to `folder`, that make up the artifact.

        Raises:
            UserError: A file is missing or cannot be stored, or an artifact of another stage or key is there.
        """
        names = [name for name in self._expand(files) if name not in self._handed_over]
        entries = sorted([*entries_of(self.folder, names), *self._handed_over.values()], key=lambda entry: entry.path)
        manifest = Manifest(stage=stage, key=key, entries=entries, inputs=inputs, metadata=metadata)
        data = canonical(manifest.model_dump(mode="json"))
        if not self._store.exists(MANIFEST):
            self.publish(*names)
            self._store.create(MANIFEST, data)
        there = self.manifest()
        if there is None or (there.stage, there.key) != (stage, key):
            raise UserError("another artifact is there already", self.uri, "remove it, or use another run name")
        return self.ref()

    def hand_over(self) -> None:
        """Publish all files but work files, for another process, perhaps on another machine, that will commit them."""
        names = self.files()
        self.publish(*names)
        entries = [entry.model_dump() for entry in entries_of(self.folder, names)]
        with atomic_write(self.folder / HANDED_OVER) as file:
            file.write(canonical(entries))
        self.publish(HANDED_OVER)

    def take_over(self) -> bool:
        """Take over a job's files; from a remote store only small ones are downloaded.

        Returns:
            Whether there are any. What is not whole is forgotten, with a message: the job has to end its work again.
        """
        if not self._store.exists(HANDED_OVER):
            return False
        try:
            entries = _ENTRIES.validate_json(self._store.get(HANDED_OVER))
            fault = next((f"{entry.path}: {what}" for entry, what in size_faults(self._store, entries)), "")
        except ValidationError:
            fault = f"{HANDED_OVER} cannot be read"
        if fault:
            log_line(f"what the job left is damaged, so it ends its work again: {fault}")
            self.discard(HANDED_OVER)
            return False
        self._handed_over = {entry.path: entry for entry in entries}
        if self._remote:
            small = [entry.path for entry in entries if entry.bytes <= SMALL_BYTES]
            parallel(lambda name: self._store.fetch(name, self.folder / name), small)
        return True

    def files(self) -> list[str]:
        """Names of the files in the folder that are to be part of the artifact, sorted."""
        names = (path.relative_to(self.folder).as_posix() for path in files_below(self.folder))
        beside = (WORK, BOARD, MANIFEST, TIMING)
        return sorted(name for name in names if not any(_is_within(name, each) for each in beside))

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
                parallel(self._store.delete, [key for key, _ in self._store.list(name) if _is_within(key, name)])
            _remove(self.folder / name)
            self._published = {key: state for key, state in self._published.items() if not _is_within(key, name)}

    def _expand(self, names: Iterable[str]) -> list[str]:
        """Names of files, with subfolders replaced by the files in them; sorted, each once."""
        found: set[str] = set()
        for name in names:
            path = self.folder / check_key(name)
            below = files_below(path) if path.is_dir() else [path]
            found.update(file.relative_to(self.folder).as_posix() for file in below)
        if MANIFEST in found:
            raise ValueError(f"{MANIFEST} is written by commit")
        return sorted(found)


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """Read a manifest; raises `UserError` where it is malformed."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        fix = "delete the artifact and run its stage again"
        raise UserError(f"malformed manifest: {first['msg']}", f"{uri}/{MANIFEST}", fix) from error


def cache_folder(scratch: Path | None, uri: str, identity: str) -> Path:
    """A folder of its own for each content, as old files of another artifact must not mix in."""
    return (scratch or temporary_folder()) / f"{uri.rsplit('/', 1)[-1]}-{sha256(identity.encode())[:16]}"


def discard_cache(uri: str) -> None:
    """Remove what `Output.open` keeps on this machine of an artifact in a remote store, if there is anything."""
    shutil.rmtree(cache_folder(None, uri, uri), ignore_errors=True)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise disk_error(error, path) from error
    return status.st_size, status.st_mtime_ns


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _remove(path: Path) -> None:
    try:
        while path.is_dir():
            with suppress(FileNotFoundError):  # another process of the same run removes it, too
                shutil.rmtree(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
