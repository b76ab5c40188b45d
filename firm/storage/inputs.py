"""Reading artifacts: pointers, manifests, and local folders whose every byte is verified against the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from firm.records import ArtifactRef, Entry, Manifest, UserError
from firm.storage.artifacts import MANIFEST, cache_folder, parse_manifest
from firm.storage.entries import RESTORE, check_sizes, fault_of
from firm.storage.files import atomic_write, canonical, disk_error, parallel, sha256
from firm.storage.open import open_store
from firm.storage.store import LocalStore


class Inputs(Mapping[str, Path]):
    """A stage's input artifacts by name: local folders, fetched and verified when they are first asked for.

    Attributes:
        refs: The pointers, for a job that fetches them where it runs.
    """

    def __init__(self, refs: Mapping[str, ArtifactRef], reads: Mapping[str, str | tuple[str, ...]]) -> None:
        """``reads``: start of the paths that the stage reads of an input, or several, where that is not all."""
        self.refs = refs
        self._reads = reads
        self._folders = dict[str, Path]()

    def __getitem__(self, name: str) -> Path:
        """Local folder of an input; raises `UserError` as `open_input` does."""
        if name not in self._folders:
            self._folders[name] = open_input(self.refs[name], only=self._reads.get(name, ""))
        return self._folders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.refs)

    def __len__(self) -> int:
        return len(self.refs)


def hash_of(inputs: Mapping[str, Path], name: str) -> str:
    """SHA-256 of the manifest of an input artifact, which stands for all of it; empty where there is no such input."""
    manifest = inputs[name] / MANIFEST if name in inputs else None
    return sha256(manifest.read_bytes()) if manifest and manifest.is_file() else ""


def uri_of(inputs: Mapping[str, Path], name: str) -> str:
    """Where an input artifact is, for those who read it there."""
    return inputs.refs[name].uri if isinstance(inputs, Inputs) else str(inputs[name])


def open_input(ref: ArtifactRef, scratch: Path | None = None, only: str | tuple[str, ...] = "") -> Path:
    """Return a local folder with the artifact: all files verified by size, those that are read by SHA-256 as well.

    A local artifact is read in place, a remote one downloaded in parallel; files of an earlier download are used
    again where their content is right.

    Args:
        ref: The artifact.
        scratch: Where caches of remote stores go, each in a folder of its own; default: the temporary folder.
        only: What is read: files whose path starts with this, or with one of these.

    Raises:
        UserError: The artifact or one of its files is missing, incomplete or changed; the message names the file.
    """
    store = open_store(ref.uri)
    manifest = read_manifest(ref)
    check_sizes(store, manifest.entries)
    remote = not isinstance(store, LocalStore)
    folder = store.root if isinstance(store, LocalStore) else cache_folder(scratch, ref.uri, ref.sha256)

    def check(entry: Entry) -> None:
        fault = fault_of(folder, entry)
        if fault and remote:
            store.fetch(entry.path, folder / entry.path)
            fault = fault_of(folder, entry)
        if fault:
            raise UserError(f"corrupt artifact: {fault}", f"{ref.uri}/{entry.path}", RESTORE)

    parallel(check, [entry for entry in manifest.entries if entry.path.startswith(only)])
    if remote:
        store.fetch(MANIFEST, folder / MANIFEST)
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
    if (found := sha256(data)) != ref.sha256:
        what = f"the artifact is another one: its manifest has SHA-256 {found[:12]}, expected {ref.sha256[:12]}"
        raise UserError(what, f"{ref.uri}/{MANIFEST}", f"it was replaced or damaged: {RESTORE}")
    return parse_manifest(data, ref.uri)


def write_ref(ref: ArtifactRef, path: Path) -> None:
    """Write a pointer to an artifact as a JSON file.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(canonical(ref.model_dump()))


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
