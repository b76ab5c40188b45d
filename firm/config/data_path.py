"""Paths of the data that users bring: a file of this machine, in S3, or of a dataset on the hub.

What follows ``#sha256=`` pins the content: of a file in S3 it is the hash of the list of hashes that `firm put` leaves
beside it, of a file that such a list names its own.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_PIN = re.compile(r"#sha256=([0-9a-f]{64})$")
_S3 = re.compile(r"(?:s3|minio)://[^/@]+/(?:[^/]+/)*[^/]+")
_HUB = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}/(?:[^/]+/)*[^/]+")
_FORMS = {
    "s3": (_S3, "s3://BUCKET/PATH/FILE"),
    "minio": (_S3, "minio://BUCKET/PATH/FILE"),
    "hf": (_HUB, "hf://datasets/OWNER/NAME@COMMIT/PATH/FILE with all 40 digits of a commit, as a branch may move"),
}


class Pinned(NamedTuple):
    """A path without its pin, and the pin: a SHA-256 in hexadecimal, or empty."""

    path: str
    sha256: str


def split_pin(path: str) -> Pinned:
    """A path and what its content is pinned to."""
    found = _PIN.search(path)
    return Pinned(path[: found.start()], found[1]) if found else Pinned(path, "")


def with_pin(path: str, sha256: str) -> str:
    """A path whose content is pinned, if there is a hash."""
    return f"{path}#sha256={sha256}" if sha256 else path


def is_remote(path: str) -> bool:
    """Whether a path names something in S3 or on the hub."""
    return path.partition("://")[0] in _FORMS and "://" in path


def _checked(path: str) -> str:
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in _FORMS:
        raise ValueError(f"no data is read from {scheme}://: give a local path, s3:// or hf://datasets/")
    if separator:
        form, like = _FORMS[scheme]
        if not form.fullmatch(split_pin(path).path):
            raise ValueError(f"{path} is not of the form {like}")
        if scheme == "hf" and split_pin(path).sha256:
            raise ValueError(f"{path} is pinned by its commit: leave the hash out")
    return path


DataPath = Annotated[str, AfterValidator(_checked)]
"""A local path, ``s3://bucket/path``, ``minio://bucket/path`` or ``hf://datasets/owner/name@commit/path``."""
