"""Lineage: checks that the artifacts of a report were made from one another, by the hashes of their manifests."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from firm.records import Manifest, UserError
from firm.storage.artifacts import MANIFEST
from firm.storage.files import sha256_file


def trace(inputs: Mapping[str, Path], last_report: Path | None = None) -> list[dict[str, Any]]:
    """Follow the chain from the last artifact back to the first, the curated data; one row for each.

    Args:
        inputs: Name -> folder of each artifact, left to right: all of them lead to the last. A stage's inputs have the
            same names in its manifest.
        last_report: Folder of the last round's report, from whose artifacts this round went on.

    Returns:
        Rows with ``name``, ``stage``, ``key``, ``sha256`` (of the manifest), ``inputs`` (name -> SHA-256) and
        ``files``.

    Raises:
        UserError: A manifest is missing or damaged, or an artifact was not made from the others given.
    """
    manifests = {name: _manifest(folder) for name, folder in inputs.items()}
    hashes = {name: sha256_file(folder / MANIFEST) for name, folder in inputs.items()}
    known = hashes | _of_the_last_round(last_report)
    for name, manifest in manifests.items():
        for source, expected in manifest.inputs.items():
            _check(name, source, expected, known.get(source, ""), inputs[name])
    final = list(inputs)[-1]
    order = _walk(manifests, final)
    if loose := sorted(set(inputs) - set(order)):
        what = f"the chain of artifacts is broken: nothing that leads to the {final} was made from {', '.join(loose)}"
        raise UserError(what, str(inputs[loose[0]]), _FIX)
    return [
        {
            "name": name,
            "stage": manifests[name].stage,
            "key": manifests[name].key,
            "sha256": hashes[name],
            "inputs": dict(sorted(manifests[name].inputs.items())),
            "files": _files(manifests[name]),
        }
        for name in order
    ]


_FIX = "the folders are of different runs or were changed: run the pipeline again from that stage"


def _check(name: str, source: str, expected: str, found: str, folder: Path) -> None:
    if expected == found:
        return
    given = f"but the {source} given is {found[:12]}" if found else f"but no {source} was given"
    what = f"the chain of artifacts is broken: {name} was made from {source} {expected[:12]}, {given}"
    raise UserError(what, str(folder / MANIFEST), _FIX)


def _of_the_last_round(report: Path | None) -> dict[str, str]:
    """Hashes of the artifacts that a report was made from, by the names that they have in the next round."""
    return {f"last_{name}": sha for name, sha in _manifest(report).inputs.items()} if report else {}


def _walk(manifests: Mapping[str, Manifest], final: str) -> list[str]:
    """Every artifact that leads to the final one, each before those that it was made from."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name not in done:
            for source in sorted(manifests.keys() & manifests[name].inputs.keys()):
                visit(source)
            done.append(name)

    visit(final)
    return done[::-1]


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError("no complete artifact: manifest.json is missing", str(folder), _FIX) from error
    except ValidationError as error:
        raise UserError("malformed manifest", str(path), _FIX) from error


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    """Files by top folder: an artifact may have thousands of shards."""
    rows = []
    entries = sorted(manifest.entries, key=lambda e: e.path)
    for top, group in groupby(entries, key=lambda e: e.path.split("/")[0]):
        files = list(group)
        name = f"{top}/" if "/" in files[0].path else top
        rows.append({"name": name, "count": len(files), "bytes": sum(e.bytes for e in files)})
    return rows
