"""Uploads what users give to S3, so that pods can read it: `firm put`, and `firm run` with a store in S3.

A file goes into a folder named by the hash of its content, with the files that its rows name at the same relative
paths: first these, then their hashes, the file itself last. Who is stopped in between leaves nothing that is read, and
goes on where it was.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firm.config import RunConfig
from firm.config.data_path import is_remote, with_pin
from firm.config.loading import data_files, parse_config
from firm.progress import log_line
from firm.records import UserError
from firm.storage.digests import followed, hashes_of
from firm.storage.files import parallel, sha256
from firm.storage.given import SUMS, render_sums
from firm.storage.open import open_store
from firm.storage.pictures import image_size
from firm.storage.rows import iter_rows
from firm.texts import parse_json, read_text

IMAGES = ("image", "images", "source_image")
"""Keys of rows that name images."""
FOLDER = "_data"
"""Of what `firm run` uploads, in the store; no run has such a name."""


def put(path: Path, uri: str, follow: Sequence[str] = IMAGES, say: Callable[[str], None] = log_line) -> str:
    """Upload a file of prompts, candidates or scores, with the images that its rows name; what is there is not sent.

    Args:
        path: Text, JSON, JSONL or Parquet.
        uri: ``s3://bucket/folder``: it goes into a folder in there.
        follow: Keys of its rows that name images.
        say: Is told how much is sent.

    Returns:
        The pinned path for the configuration.

    Raises:
        UserError: The file or an image is missing or damaged, is not below the file's folder, or changes meanwhile; or
            S3 fails.
    """
    if not uri.startswith(("s3://", "minio://")):
        raise UserError("data is put into S3 only", uri, "give s3://bucket/folder", usage=True)
    _check_rows(path)
    names = [path.name, *(_below(path, name) for name in followed(path, follow))]
    parallel(lambda name: image_size(path.parent / name, f"{path}: {name}"), names[1:])
    sums = dict(zip(names, hashes_of(path.parent / name for name in names), strict=True))
    listed = render_sums(sums)
    folder = f"{uri.rstrip('/')}/{sha256(listed)[:16]}"
    store = open_store(folder)
    there = dict(store.list())
    if path.name not in there:
        missing = [name for name in sums if there.get(name) != (path.parent / name).stat().st_size]
        say(f"{path}: uploading {len(missing)} of {len(sums)} files to {folder}")
        parallel(lambda name: store.put(name, path.parent / name), [name for name in missing if name != path.name])
        store.put(path.name + SUMS, listed)
        if hashes_of(path.parent / name for name in missing) != [sums[name] for name in missing]:
            raise UserError("the file or an image has changed meanwhile", str(path), "put it again", usage=True)
        store.put(path.name, path)
    return with_pin(f"{folder}/{path.name}", sha256(listed))


def uploaded(config: RunConfig) -> RunConfig:
    """The run with its local data in its store, if that is in S3, so that a pod or another machine can read it.

    Raises:
        UserError: See `put`.
    """
    if not is_remote(config.store):
        return config
    follow: dict[str, tuple[str, ...]] = {}
    for _, file in data_files(config):
        if not is_remote(file.path):
            follow[file.path] = (*follow.get(file.path, ()), *file.follow)
    to = f"{config.store.rstrip('/')}/{FOLDER}"
    moved = {path: put(Path(path), to, keys) for path, keys in follow.items()}
    return parse_config(_replaced(config.model_dump(mode="json"), moved)) if moved else config


def _replaced(value: Any, moved: Mapping[str, str]) -> Any:
    """The same JSON value with other paths, also in what further rounds change."""
    if isinstance(value, dict):
        return {
            key: moved.get(item, item) if key == "path" and isinstance(item, str) else _replaced(item, moved)
            for key, item in value.items()
        }
    return [_replaced(item, moved) for item in value] if isinstance(value, list) else value


def _check_rows(path: Path) -> None:
    """Refuse a file with a row that could not be read later; what a row must hold depends on what it is for."""
    kind = path.suffix.lower()
    if kind == ".parquet" or kind in (".jsonl", ".ndjson"):
        for _ in iter_rows(path):
            pass
    elif kind == ".json":
        parse_json(read_text(path, "rows"), str(path), "give a JSON list")
    else:
        read_text(path, "prompts")


def _below(path: Path, name: str) -> str:
    key = posixpath.normpath(name)
    if key.startswith(("/", "../")) or "\n" in key:
        fix = "move it there: relative paths are kept"
        raise UserError(f"the image {name!r:.200} is not below the folder of the file", str(path), fix, usage=True)
    return key
