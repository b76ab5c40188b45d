"""Rows of a user's JSONL or Parquet file, streamed, each with where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from firm.records import UserError
from firm.texts import parse_json

MAX_LINE = 2**20
"""Most characters of a line."""


def iter_rows(path: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of each row: a line of JSONL, empty ones left out, or a row of Parquet as a dict.

    ``name`` is how messages call the file, where that is not its path.

    Raises:
        UserError: The file cannot be read, or a line is not JSON.
    """
    name = name or str(path)
    rows = _parquet(path, name) if path.suffix.lower() == ".parquet" else _lines(path, name)
    try:
        yield from rows
    except OSError as error:
        raise UserError(f"cannot read rows: {error.strerror or error}", name, "check the path", True) from error
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", name, "save it as UTF-8", usage=True) from error
    except pa.ArrowException as error:
        raise UserError(f"not a Parquet file: {error}", name, "write it again, or as JSONL", usage=True) from error


def _lines(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
            where = f"{name}, line {number}"
            if len(line) > MAX_LINE:
                raise UserError(f"a line of more than {MAX_LINE} characters", where, "give one row per line", True)
            if line.strip():
                yield where, parse_json(line, where, "give one JSON value per line")


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
