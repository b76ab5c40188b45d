"""Rows of Parquet shards by their number, read where the shards are: nothing is downloaded whole, copied or kept."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import pyarrow.parquet as pq

from firm.records import Record, UserError
from firm.storage.artifacts import MANIFEST, parse_manifest
from firm.storage.files import parallel
from firm.storage.open import open_store
from firm.storage.ranges import open_ranges
from firm.storage.shards import open_shard
from firm.storage.store import LocalStore, Store

if TYPE_CHECKING:
    from firm.storage.s3 import S3Store


class Shard(NamedTuple):
    """A Parquet file of an artifact.

    Attributes:
        uri: Of the artifact.
        name: Of the file.
        bytes: Its size.
    """

    uri: str
    name: str
    bytes: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.uri}/{self.name}"

    def open(self) -> Path | BinaryIO:
        """Its path, or where the store is remote a file that fetches what is read of it."""
        store = _store(self.uri, os.getpid())
        if isinstance(store, LocalStore):
            return store.root / self.name
        remote = cast("S3Store", store)
        return open_ranges(self.bytes, lambda start, length: remote.part(self.name, start, length))


@lru_cache(maxsize=4)
def _store(uri: str, process: int) -> Store:
    """A store of a process: connections are not shared with those that it forks."""
    return open_store(uri)


def shards_in(uri: str, folder: str) -> list[Shard]:
    """The shards in a folder of an artifact, in order, as its manifest names them, if it has one.

    Their sizes and the checksums within them are compared when they are read, not their hashes.

    Raises:
        UserError: There are none, or the store fails.
    """
    store = open_store(uri)
    sizes = store.list(f"{folder}/")
    if store.exists(MANIFEST):
        entries = parse_manifest(store.get(MANIFEST), store.uri).entries
        sizes = sorted((entry.path, entry.bytes) for entry in entries if entry.path.startswith(f"{folder}/"))
    found = [Shard(store.uri, name, size) for name, size in sizes if name.endswith(".parquet")]
    if not found:
        raise UserError("no shards", f"{store.uri}/{folder}", "look at the summary of the stage that writes them")
    return found


class Table:
    """Random access to rows: a row costs the reading of its row group, whose checksums are compared.

    Footers are held in memory, about a thousandth of shards of large images. It may be handed to other processes.
    """

    def __init__(self, shards: Sequence[Shard], model: type[Record], columns: Sequence[str]) -> None:
        """Read the footers of all shards; rows are counted in the order of these.

        Args:
            shards: Files of records of one type.
            model: That type.
            columns: What a row has of it.

        Raises:
            UserError: One is damaged, or of another type.
        """
        self._shards = list(shards)
        self._columns = list(columns)
        self._metadata = parallel(lambda shard: _read_metadata(shard, model), self._shards)
        self._groups = [(i, group) for i, data in enumerate(self._metadata) for group in range(data.num_row_groups)]
        self._ends = list(accumulate(self._metadata[i].row_group(group).num_rows for i, group in self._groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row.

        Raises:
            UserError: Its shard is damaged.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows in this order; those of one row group cost one reading."""
        groups = groupby(sorted(set(indices)), key=lambda index: bisect_right(self._ends, index))
        found: dict[int, dict[str, Any]] = {}
        for rows in parallel(lambda group: self._read(*group), [(place, list(wanted)) for place, wanted in groups]):
            found |= rows
        return [found[index] for index in indices]

    def _read(self, place: int, wanted: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Rows of one row group by their numbers."""
        i, group = self._groups[place]
        shard = self._shards[i]
        with open_shard(shard.open(), shard.where, metadata=self._metadata[i]) as file:
            rows = file.read_row_group(group, columns=self._columns, use_threads=False)
        first = self._ends[place] - rows.num_rows
        return {index: rows.slice(index - first, 1).to_pylist()[0] for index in wanted}


def _read_metadata(shard: Shard, model: type[Record]) -> pq.FileMetaData:
    with open_shard(shard.open(), shard.where, model) as file:
        return file.metadata
