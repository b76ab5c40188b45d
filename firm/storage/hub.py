"""Files of datasets on the hub, by ``hf://datasets/owner/name@commit/path``: the only user of its client for data.

A commit is a hash of all its files, so what it names cannot change. Address and token are those of `huggingface_hub`:
HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from firm.records import UserError
from firm.storage.ranges import open_ranges

SIZES = 2**16
"""Of files whose sizes are kept: source images are read in every epoch."""


def fetch_from_hub(uri: str) -> Path:
    """A file of a dataset in the cache of `huggingface_hub`.

    Raises:
        UserError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download

    dataset, commit, name = _parts(uri)
    with _explained(uri):
        return Path(hf_hub_download(dataset, name, repo_type="dataset", revision=commit))


def open_on_hub(uri: str) -> BinaryIO:
    """A file of a dataset, read there, and not kept; raises `UserError`, also while it is read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    dataset, commit, name = _parts(uri)
    with _explained(uri):
        url = hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
        size = _size(url)

    def fetch(start: int, length: int) -> bytes:
        with _explained(uri):
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}"}
            response = http_backoff("GET", url, headers=headers)
            hf_raise_for_status(response)
            if len(response.content) != length:
                raise OSError(f"{length} bytes were asked for and {len(response.content)} sent")
            return bytes(response.content)

    return open_ranges(size, fetch)


@lru_cache(maxsize=SIZES)
def _size(url: str) -> int:
    from huggingface_hub import get_hf_file_metadata

    return get_hf_file_metadata(url).size or 0


def _parts(uri: str) -> tuple[str, str, str]:
    owner, rest, name = uri.removeprefix("hf://datasets/").split("/", 2)
    dataset, _, commit = rest.partition("@")
    return f"{owner}/{dataset}", commit, name


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, of HTTP, of the disk
        message = (str(error).splitlines() or [type(error).__name__])[0][:300]
        asked_wrongly = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404)
        fix = "check the dataset, the commit and the path; for a gated or private one set HF_TOKEN"
        raise UserError(f"cannot read from the hub: {message}", uri, fix, usage=asked_wrongly) from error
