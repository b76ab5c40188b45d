"""Rows of shards by their number: the same as in order, of one row group each, and never damaged ones."""

import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firm.records import Candidate, Example, Message, Record, UserError
from firm.storage import shards
from firm.storage.artifacts import Output
from firm.storage.shards import ShardWriter, write_shard
from firm.storage.table import Table, shards_in

COLUMNS = ("messages", "images")


def example(index: int, size: int = 50) -> Example:
    return Example(
        id=str(index), split="train", dimension="quality", prompt="a cube", source="s", difficulty="easy", score=3,
        messages=[Message(role="user", content=f"<image>{index}"), Message(role="assistant", content="3")],
        images=[bytes([index % 256]) * size, b"second"],
    )  # fmt: skip


def table(folder: Path, model: type[Record] = Example, columns: tuple[str, ...] = COLUMNS) -> Table:
    return Table(shards_in(str(folder), "train"), model, columns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 100 and one of 30 examples, the first of a number that no row group has."""
    with ShardWriter(tmp_path / "train", Example, 100) as writer:
        writer.write([example(i) for i in range(330)])
    return tmp_path


def test_rows_are_those_that_datasets_loads_and_in_its_order(folder: Path, tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    files = sorted(str(p) for p in (folder / "train").glob("*.parquet"))
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    rows = table(folder)
    order = list(range(330))
    random.Random(0).shuffle(order)
    expected = data.select_columns(list(COLUMNS))
    assert len(rows) == 330 and rows.__getitems__(order) == expected.__getitems__(order)
    assert [rows[i] for i in (0, 64, 99, 100, 329)] == [expected[i] for i in (0, 64, 99, 100, 329)]
    assert rows.__getitems__([7, 7]) == [expected[7]] * 2
    with pytest.raises(IndexError):
        rows[330]


def test_it_can_be_handed_to_another_process(folder: Path) -> None:
    rows = table(folder)
    assert pickle.loads(pickle.dumps(rows))[200] == rows[200]


def test_large_images_share_a_row_group_with_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES_PER_GROUP", 1000)
    sizes = [10] * 70 + [300] * 4 + [5000, 5000, 10]
    write_shard(tmp_path / "train" / "part-00000.parquet", [example(i, s) for i, s in enumerate(sizes)], Example)
    metadata = pq.read_metadata(tmp_path / "train" / "part-00000.parquet")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == 77 and groups[-3:] == [1, 1, 1] and max(groups) == 62
    assert [row["images"][0]["bytes"] for row in table(tmp_path).__getitems__(range(77))] == [
        bytes([i]) * s for i, s in enumerate(sizes)
    ]


def test_only_shards_that_the_manifest_names_are_read(folder: Path) -> None:
    Output.open(str(folder)).commit("curation", "key", {}, {}, ["train"])
    with ShardWriter(folder / "stray", Example, 100) as writer:
        writer.write([example(0)])
    next((folder / "stray").glob("*.parquet")).rename(folder / "train" / "part-00099.parquet")
    assert len(table(folder)) == 330


def test_other_records_and_no_shards_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="column 'index' should be"):
        table(folder, Candidate)
    with pytest.raises(UserError, match="no shards"):
        table(folder / "train")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 255))
def test_a_flipped_byte_is_found_or_harmless(position: int, mask: int) -> None:
    rows = [example(i) for i in range(5)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train" / "part-00000.parquet"
        write_shard(path, rows, Example)
        before = table(Path(name)).__getitems__(range(5))
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= mask
        path.write_bytes(data)
        try:
            assert table(Path(name)).__getitems__(range(5)) == before
        except UserError as error:
            assert str(path) in error.where
