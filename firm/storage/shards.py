"""Parquet shards of records: written whole or not at all, read back row group by row group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from firm.records import Message, Prompt, Record, UserError
from firm.storage.files import TEMPORARY, atomic_write, disk_error

ROWS_PER_GROUP = 64  # what a reader holds in memory: images are large
BYTES_PER_GROUP = 2**23  # of images: what is read for one row at random; a footer takes 10 KB of memory a group
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the Image feature of Hugging Face datasets

_NATURAL = {
    Prompt: pa.string(),
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}
_LISTS = {
    str: pa.list_(pa.string()),
    bytes: pa.list_(IMAGE),
    Message: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}
R = TypeVar("R", bound=Record)


def schema_of(model: type[Record]) -> pa.Schema:
    """Derive the columns of a record type.

    Scalars, literals and lists of strings are native columns, ``list[Message]`` a list of structs, ``list[bytes]`` a
    list of images in the layout of Hugging Face `datasets`; everything else is a column of JSON text.
    """
    return pa.schema([(name, _native(field.annotation) or pa.string()) for name, field in model.model_fields.items()])


def _native(annotation: Any) -> pa.DataType | None:
    """Arrow type of a field, or None for JSON text."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return pa.string() if all(isinstance(value, str) for value in arguments) else None
    if get_origin(annotation) is list:
        return _LISTS.get(arguments[0])
    return _NATURAL.get(annotation)


def write_shard(path: Path, records: Sequence[R], model: type[R]) -> None:
    """Write records as one Parquet file, which appears complete or not at all. Equal records give equal bytes.

    Raises:
        UserError: The disk is full or the folder cannot be written; an older file at `path` is untouched.
        TypeError: A record is not exactly of type `model`.
    """
    schema = schema_of(model)
    json_names = _json_names(model)
    image_names = _image_names(model)
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
        ) as writer,
    ):
        rows = (_to_row(record, model, json_names, image_names) for record in records)
        for group in _groups(rows, image_names):
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))


def _groups(rows: Iterable[dict[str, Any]], image_names: set[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups of at most `ROWS_PER_GROUP`; the images of more than one fit into `BYTES_PER_GROUP`."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        more = sum(len(image["bytes"]) for name in image_names for image in row[name])
        if group and (len(group) == ROWS_PER_GROUP or size + more > BYTES_PER_GROUP):
            yield group
            group, size = [], 0
        group.append(row)
        size += more
    if group:
        yield group


def read_shard(path: Path, model: type[R]) -> list[R]:
    """Read all records of a shard.

    Raises:
        UserError: See `iter_shards`.
    """
    return list(_read_rows(path, model, 0, _num_rows(path, model)))


def iter_shards(folder: Path, model: type[R], rank: int = 0, world_size: int = 1, prefix: str = "part") -> Iterator[R]:
    """Stream the records of all shards of a folder in order, holding one row group in memory.

    Each rank gets a contiguous block of rows: over the ranks every record comes exactly once, and no rank has more
    than one row more than another. `model` may have fewer fields than what was written: only those are read.

    Args:
        folder: Folder of files ``{prefix}-00000.parquet``, ...
        model: Type of the records.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes that share the rows.
        prefix: Start of the file names.

    Raises:
        UserError: There are no shards, or a file is corrupt or of another schema; the file and row are named.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    paths = _shards(folder, prefix)
    counts = [_num_rows(path, model) for path in paths]
    start, stop = (sum(counts) * edge // world_size for edge in (rank, rank + 1))
    offset = 0
    for path, count in zip(paths, counts, strict=True):
        yield from _read_rows(path, model, max(start - offset, 0), min(stop - offset, count))
        offset += count


def count_rows(folder: Path, prefix: str = "part") -> int:
    """Number of records in all shards of a folder; reads only the footers.

    Raises:
        UserError: There are no shards, or a file is corrupt.
    """
    return sum(_num_rows(path, None) for path in _shards(folder, prefix))


class ShardWriter:
    """Writes a stream of records as shards of equal size; resumes after a kill where the last shard ended.

    As a context manager it closes after success only. It holds up to `rows_per_shard` records in memory.

    Attributes:
        rows_done: Records in the shards that an earlier writer finished: the caller skips that many.
        names: File names of the finished shards, relative to the folder.
    """

    def __init__(self, folder: Path, model: type[Record], rows_per_shard: int, prefix: str = "part") -> None:
        self._folder = folder
        self._model = model
        self._rows = rows_per_shard
        self._prefix = prefix
        self._buffer: list[Record] = []
        self.names: list[str] = []
        self.rows_done = 0
        self._tail_rows = rows_per_shard  # rows of the last shard; fewer where a writer was closed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{TEMPORARY}{prefix}-*"):
                stale.unlink()
        except OSError as error:
            raise disk_error(error, folder) from error
        while (path := folder / self._name()).exists():
            self._tail_rows = _num_rows(path, model)
            self.rows_done += self._tail_rows
            self.names.append(path.name)

    def write(self, records: Sequence[Record]) -> list[str]:
        """Add records and return the names of the shards finished by them.

        Raises:
            UserError: See `write_shard`. Shards finished before are kept.
        """
        if records and self._tail_rows < self._rows:  # fill up the short shard of a closed writer
            self._buffer = [*read_shard(self._folder / self.names.pop(), self._model)]
            self._tail_rows = self._rows
        self._buffer += records
        finished = []
        while len(self._buffer) >= self._rows:
            finished.append(self._flush())
        return finished

    def close(self) -> list[str]:
        """Write the remaining records, possibly as an empty first shard, and return the names of the new shards."""
        return [self._flush()] if self._buffer or not self.names else []

    def _flush(self) -> str:
        name = self._name()
        rows = self._buffer[: self._rows]
        write_shard(self._folder / name, rows, self._model)
        del self._buffer[: self._rows]
        self._tail_rows = len(rows)
        self.names.append(name)
        return name

    def _name(self) -> str:
        return _shard_name(self._prefix, len(self.names))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def _shard_name(prefix: str, index: int) -> str:
    return f"{prefix}-{index:05d}.parquet"


def _shards(folder: Path, prefix: str) -> list[Path]:
    """Shards of a folder in order; a hole in their numbers is an error, as its rows would be lost silently."""
    paths = sorted(folder.glob(f"{prefix}-[0-9]*.parquet"))
    for index, path in enumerate(paths):
        if path.name != _shard_name(prefix, index):
            missing = folder / _shard_name(prefix, index)
            raise UserError("a shard is missing", str(missing), "restore it, or run the stage that writes it again")
    if paths:
        return paths
    raise UserError("no shards", f"{folder}/{prefix}-*.parquet", "check the folder, or run the stage that writes it")


def _json_names(model: type[Record]) -> set[str]:
    return {name for name, field in model.model_fields.items() if _native(field.annotation) is None}


def _image_names(model: type[Record]) -> set[str]:
    return {name for name, field in model.model_fields.items() if field.annotation == list[bytes]}


def _to_row(record: Record, model: type[Record], json_names: set[str], image_names: set[str]) -> dict[str, Any]:
    if type(record) is not model:
        raise TypeError(f"expected {model.__name__}, got {type(record).__name__}")
    row = record.model_dump(exclude=json_names)
    for name, value in record.model_dump(mode="json", include=json_names).items():
        row[name] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    for name in image_names:
        row[name] = [{"bytes": image, "path": None} for image in row[name]]
    return row


def _from_row(row: dict[str, Any], model: type[R], json_names: set[str], image_names: set[str]) -> R:
    for name in json_names:
        row[name] = json.loads(row[name])
    for name in image_names:
        row[name] = [image["bytes"] for image in row[name]]
    return model.model_validate(row)


@contextmanager
def open_shard(
    source: Path | BinaryIO,
    where: Path | str,
    model: type[Record] | None = None,
    metadata: pq.FileMetaData | None = None,
) -> Iterator[pq.ParquetFile]:
    """Open a shard and check its columns; faults of reading inside the block become a `UserError`.

    Args:
        source: Its path, or the open file.
        where: How messages call it.
        model: Type of its records, if its columns are to be checked.
        metadata: Its footer, if that has been read already.
    """
    fix = "restore the file, or delete it and run the stage that writes it again"
    try:
        with pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if sum(groups) != file.metadata.num_rows:
                raise OSError("the footer contradicts itself")
            for field in schema_of(model) if model else ():
                position = file.schema_arrow.get_field_index(field.name)
                if position < 0 or file.schema_arrow.field(position).type != field.type:
                    found = file.schema_arrow.field(position).type if position >= 0 else "absent"
                    what = f"column {field.name!r} should be {field.type} and is {found}"
                    raise UserError(what, str(where), "give shards of the right kind")
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; Arrow's own carry none
            raise disk_error(error, where) from error
        message = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"corrupt or not a Parquet file: {message}", str(where), fix) from error


def _num_rows(path: Path, model: type[Record] | None) -> int:
    with open_shard(path, path, model) as file:
        return file.metadata.num_rows


def _read_rows(path: Path, model: type[R], start: int, stop: int) -> Iterator[R]:
    """Records start <= row < stop of a shard; only the row groups that hold them are read."""
    if start >= stop:
        return
    names = list(model.model_fields)
    json_names = _json_names(model)
    image_names = _image_names(model)
    with open_shard(path, path, model) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first < stop and first + count > start:
                rows = file.read_row_group(group, columns=names, use_threads=False).to_pylist()
                for index in range(max(start - first, 0), min(stop - first, count)):
                    try:
                        record = _from_row(rows[index], model, json_names, image_names)
                    except (ValidationError, ValueError, TypeError, KeyError) as error:
                        message = " ".join(str(error).split())[:200]
                        where = f"{path}, row {first + index}"
                        raise UserError(f"not a {model.__name__}: {message}", where, "repair or remove it") from error
                    yield record
            first += count
