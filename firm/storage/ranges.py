"""A file somewhere else as one that can be read from any place, as much of it as is asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, cast

HEAD_BYTES = 2**16
"""What is fetched at once: the head of nearly every image."""


def open_ranges(size: int, fetch: Callable[[int, int], bytes]) -> BinaryIO:
    """Open a file of ``size`` bytes; ``fetch(start, length)`` gives a part. ``read()`` fetches the rest at once."""
    return cast(BinaryIO, io.BufferedReader(_Ranges(size, fetch), HEAD_BYTES))


class _Ranges(io.RawIOBase):
    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._fetch = fetch
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(self._size)

    def _take(self, most: int) -> bytes:
        length = min(most, max(self._size - self._at, 0))
        data = self._fetch(self._at, length) if length else b""
        self._at += len(data)
        return data
