"""Rows of a user's JSONL or Parquet file, streamed, each with where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from firm.records import UserError


def iter_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row: a line of JSONL, empty ones left out, or a row of Parquet as a dict.

    Raises:
        UserError: The file cannot be read, or a line is not JSON.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _lines(path)
    try:
        yield from rows
    except OSError as error:
        raise UserError(f"cannot read rows: {error.strerror or error}", str(path), "check the path", True) from error
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", str(path), "save it as UTF-8", usage=True) from error
    except pa.ArrowException as error:
        raise UserError(f"not a Parquet file: {error}", str(path), "write it again, or as JSONL", usage=True) from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"not valid JSON: {error}", where, "give one JSON value per line", True) from error
                yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
