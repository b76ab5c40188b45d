"""Parquet shards: layout, resuming, sharding by rank and damage."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firm.critics.agreement import Prediction
from firm.images import decode_image, encode_image
from firm.records import Candidate, Example, JudgedCandidate, Judgement, Message, Record, UserError
from firm.storage import shards
from firm.storage.files import TEMPORARY
from firm.storage.shards import ShardWriter, count_rows, iter_shards, read_shard, schema_of, write_shard


def candidate(index: int) -> Candidate:
    return Candidate(
        index=index, prompt=f"prompt {index}", source="s", split="train", images=[bytes([index % 256]) * 50]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- layout -----------------------------------------------------------------------------------------------------


def test_schema_is_what_other_tools_read():
    schema = schema_of(Example)
    assert schema.field("score").type == pa.int64() and schema.field("split").type == pa.string()
    assert schema.field("messages").type == pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert schema.field("images").type == pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert schema_of(JudgedCandidate).field("material").type == pa.string()  # JSON
    assert schema_of(JudgedCandidate).field("assessment").type == pa.string()  # JSON text
    assert schema_of(Prediction).field("outcome").type == pa.string()


def test_scalars_are_native():
    class Row(Record):
        flag: bool
        share: float
        kind: Literal["a", "b"]
        maybe: int | None = None

    schema = schema_of(Row)
    assert [str(field.type) for field in schema] == ["bool", "double", "string", "string"]


def test_round_trip_of_an_example(tmp_path):
    messages = [Message(role="user", content="<image> grüß"), Message(role="assistant", content="Score: 3")]
    fields = {"split": "test", "dimension": "quality", "prompt": "p", "source": "s", "difficulty": "easy", "score": 3}
    records = [Example(id=str(i), messages=messages, images=[b"\0png", b""], **fields) for i in range(130)]
    write_shard(tmp_path / "a.parquet", records, Example)
    assert read_shard(tmp_path / "a.parquet", Example) == records
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    table = pq.read_table(tmp_path / "a.parquet").slice(0, 1).to_pylist()[0]
    assert table["images"] == [{"bytes": b"\0png", "path": None}, {"bytes": b"", "path": None}]
    write_shard(tmp_path / "b.parquet", records, Example)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_fewer_fields_are_a_projection(tmp_path):
    class Prompt(Record):
        prompt: str

    write_shard(tmp_path / "part-00000.parquet", [candidate(i) for i in range(3)], Candidate)
    assert [row.prompt for row in iter_shards(tmp_path, Prompt)] == ["prompt 0", "prompt 1", "prompt 2"]


def test_records_of_another_type_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected Candidate"):
        write_shard(tmp_path / "a", [Judgement(score=1)], Candidate)
    assert names(tmp_path) == []


# ---- writer -----------------------------------------------------------------------------------------------------


def write_all(folder: Path, total: int, stop: int | None = None, rows: int = 10, batch: int = 7) -> ShardWriter:
    """Write candidates 0..total-1, resuming; with `stop`, end before close as a killed process does."""
    writer = ShardWriter(folder, Candidate, rows)
    end = total if stop is None else stop
    for start in range(writer.rows_done, end, batch):
        writer.write([candidate(i) for i in range(start, min(start + batch, end))])
    if stop is None:
        writer.close()
    return writer


def test_writer_makes_shards_of_equal_size(tmp_path):
    writer = write_all(tmp_path, 25)
    assert writer.names == names(tmp_path) == [f"part-0000{i}.parquet" for i in range(3)]
    assert [len(read_shard(tmp_path / name, Candidate)) for name in writer.names] == [10, 10, 5]
    assert list(iter_shards(tmp_path, Candidate)) == [candidate(i) for i in range(25)]
    assert count_rows(tmp_path) == 25


def test_writer_says_which_shards_are_finished(tmp_path):
    writer = ShardWriter(tmp_path, Candidate, 2, prefix="train")
    assert writer.write([candidate(0)]) == []
    assert writer.write([candidate(i) for i in range(1, 5)]) == ["train-00000.parquet", "train-00001.parquet"]
    assert writer.close() == ["train-00002.parquet"] and writer.close() == []
    assert count_rows(tmp_path, "train") == 5


@pytest.mark.parametrize("stop", [0, 3, 10, 19, 25])
def test_resumed_writer_gives_equal_bytes(tmp_path, stop):
    write_all(tmp_path / "a", 25)
    write_all(tmp_path / "b", 25, stop=stop)
    assert ShardWriter(tmp_path / "b", Candidate, 10).rows_done == stop // 10 * 10
    write_all(tmp_path / "b", 25)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("closed_at", [0, 5, 10, 12])
def test_writing_after_close_fills_the_short_shard(tmp_path, closed_at):
    write_all(tmp_path / "a", 25)
    write_all(tmp_path / "b", closed_at)
    assert ShardWriter(tmp_path / "b", Candidate, 10).rows_done == closed_at
    write_all(tmp_path / "b", 25)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_no_records_still_make_a_shard(tmp_path):
    assert write_all(tmp_path, 0).names == ["part-00000.parquet"]
    assert list(iter_shards(tmp_path, Candidate)) == []


def test_context_manager_closes_after_success_only(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, Candidate, 2) as writer:
        writer.write([candidate(i) for i in range(3)])
        raise RuntimeError
    assert names(tmp_path) == ["part-00000.parquet"]
    with ShardWriter(tmp_path, Candidate, 2) as writer:
        writer.write([candidate(2)])
    assert count_rows(tmp_path) == 3


def test_full_disk_keeps_finished_shards(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, Candidate, 10)
    writer.write([candidate(i) for i in range(15)])
    real, full = os.fsync, OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match=r"disk full.*part-00001\.parquet"):
        writer.write([candidate(i) for i in range(15, 25)])
    assert names(tmp_path) == ["part-00000.parquet"]
    monkeypatch.setattr(os, "fsync", real)
    writer.close()  # the same writer can go on
    assert list(iter_shards(tmp_path, Candidate)) == [candidate(i) for i in range(20)]


def test_full_disk_for_real(tmp_path):
    """The kernel refuses to let a file grow beyond 20 kB, in the middle of Arrow's own writing."""
    script = f"""
import resource, os
from pathlib import Path
from firm.records import Candidate
from firm.storage.shards import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
writer = ShardWriter(Path({str(tmp_path)!r}), Candidate, 2)
make = lambda i, n: Candidate(index=i, prompt="p", source="s", split="train", images=[os.urandom(n)])
writer.write([make(0, 10), make(1, 10)])
writer.write([make(2, 10), make(3, 500000)])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "UserError: disk full" in result.stderr and "part-00001.parquet" in result.stderr
    assert names(tmp_path) == ["part-00000.parquet"] and count_rows(tmp_path) == 2


WORKER = """
import os, sys, signal
from pathlib import Path
from firm.records import Candidate
from firm.storage.shards import ShardWriter
folder, total, die_at = Path(sys.argv[1]), 200, int(sys.argv[2])
calls, fsync = 0, os.fsync
def dying(handle):  # a shard costs two calls: its file, complete but not yet renamed, and then its folder
    global calls
    calls += 1
    if calls == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = dying
with ShardWriter(folder, Candidate, 20) as writer:
    print(writer.rows_done, flush=True)
    for i in range(writer.rows_done, total):
        writer.write([Candidate(index=i, prompt=f"p{i}", source="s", split="test", images=[bytes([i]) * 3000])])
"""


def test_kill_9_in_the_middle_of_a_write(tmp_path):
    def run(folder: str, die_at: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", WORKER, str(tmp_path / folder), str(die_at)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("whole", 0).returncode == 0
    done = []
    for die_at in (5, 8, 0):  # unfinished file of the third shard; renamed but unsynced; to the end
        result = run("killed", die_at)
        done.append(int(result.stdout))
        assert result.returncode == (-signal.SIGKILL if die_at else 0), result.stderr
        unfinished = [name for name in names(tmp_path / "killed") if name.startswith(TEMPORARY)]
        assert bool(unfinished) == (die_at == 5)
        finished = len(names(tmp_path / "killed")) - len(unfinished)
        assert count_rows(tmp_path / "killed") == 20 * finished
    assert done == [0, 40, 120]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---- reading ----------------------------------------------------------------------------------------------------


def test_ranks_read_only_their_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 5)
    write_all(tmp_path, 40, rows=20)
    read = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1]) or real(*a, **k))
    parts = [list(iter_shards(tmp_path, Candidate, rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [10, 10, 10, 10] and len(read) == 8
    assert sum(parts, []) == [candidate(i) for i in range(40)]


def test_reading_is_lazy(tmp_path):
    write_all(tmp_path, 30)
    path = tmp_path / "part-00002.parquet"
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF  # in the first page: its checksum tells
    path.write_bytes(data)
    rows = iter_shards(tmp_path, Candidate)
    assert [next(rows).index for _ in range(20)] == list(range(20))
    with pytest.raises(UserError, match="corrupt") as caught:
        next(rows)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(content)
    for action in (lambda: read_shard(path, Candidate), lambda: count_rows(tmp_path)):
        with pytest.raises(UserError, match="corrupt or not a Parquet file") as caught:
            action()
        assert caught.value.where == str(path)


def test_truncated_shard(tmp_path):
    write_all(tmp_path, 10)
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="corrupt or not a Parquet file"):
        ShardWriter(tmp_path, Candidate, 10)


def test_wrong_schema_and_missing_shards(tmp_path):
    with pytest.raises(UserError, match="no shards"):
        next(iter_shards(tmp_path, Candidate))
    with pytest.raises(UserError, match="no such file"):
        read_shard(tmp_path / "absent", Candidate)
    write_all(tmp_path, 25)
    with pytest.raises(UserError, match="column 'material' should be string and is absent"):
        next(iter_shards(tmp_path, JudgedCandidate))
    pq.write_table(pa.table({"index": ["text"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="column 'index' should be int64 and is string"):
        read_shard(tmp_path / "other.parquet", Candidate)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"a shard is missing.*part-00001\.parquet"):
        count_rows(tmp_path)


def test_impossible_row_is_named(tmp_path):
    rows = [candidate(0).model_dump() | {"split": split, "images": []} for split in ("train", "dev")]
    table = pa.Table.from_pylist(rows, schema=schema_of(Candidate))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1"):
        read_shard(tmp_path / "a.parquet", Candidate)


# ---- images -----------------------------------------------------------------------------------------------------


def test_images_round_trip():
    image = Image.effect_noise((17, 9), 80).convert("RGB")
    image.info["dpi"] = (72, 72)
    data = encode_image(image)
    again = decode_image(data, "here")
    assert again.mode == "RGB" and again.tobytes() == image.tobytes()
    assert encode_image(again) == data and image.info["dpi"] == (72, 72)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_all_modes_become_rgb(mode):
    assert decode_image(encode_image(Image.new(mode, (4, 4))), "").mode == "RGB"


def test_undecodable_images_are_named():
    data = encode_image(Image.effect_noise((32, 32), 80))
    for damaged in (b"", b"GIF89a", data[:60], data[:-30], data[:40] + b"\xff" * 50 + data[90:]):
        with pytest.raises(UserError, match="cannot decode image") as caught:
            decode_image(damaged, "part-00003.parquet, row 7")
        assert caught.value.where == "part-00003.parquet, row 7"
