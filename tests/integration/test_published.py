"""Shards of an unfinished stage: what of them was damaged is made again, by the next attempt and not by a person."""

from collections.abc import Callable
from pathlib import Path

import pytest
from integration.working import candidate

from firm.records import ArtifactRef, Candidate
from firm.storage.artifacts import Output
from firm.storage.open import open_store
from firm.storage.published import PublishedShards

ROWS = 9
PER_SHARD = 2
KILLED_AT = 7  # three shards are published then


def make(uri: str, scratch: Path, stop: int = ROWS) -> tuple[list[int], ArtifactRef | None]:
    """A stage in small, killed at a row; returns what it has made, and its artifact if it came to its end."""
    out = Output.open(uri, scratch)
    shards = PublishedShards(out, "judged", Candidate, PER_SHARD)
    made = list(range(shards.rows_done, stop))
    for index in made:
        shards.write([candidate(index, "a")])
    if stop < ROWS:
        return made, None
    shards.close()
    out.discard("work")
    return made, out.commit("s", "k", {}, {}, out.files())


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped byte": flip,
    "flipped first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "flipped last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[:-20],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\n",
    "lost": lambda data: None,
}
FILES = "judged/part-00001.parquet", "work/checksums/judged/part-00001.parquet.sha256"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again_with_all_behind_it(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, file: str
) -> None:
    _, whole = make(f"{uri}/whole", tmp_path / "whole")
    make(f"{uri}/out", tmp_path / "lost", KILLED_AT)
    store = open_store(f"{uri}/out")
    data = DAMAGES[damage](store.get(file))
    if data is None:
        store.delete(file)
    else:
        store.put(file, data)
    capsys.readouterr()
    made, ref = make(f"{uri}/out", tmp_path / "heir")
    assert made == list(range(PER_SHARD, ROWS)), "what is sound is kept, and nothing else"
    assert (damage == "lost" and file == FILES[0]) == ("judged/part-00001.parquet" not in capsys.readouterr().out)
    assert ref and whole and ref.sha256 == whole.sha256
    assert not store.list("work/")


def test_sound_shards_are_kept(uri: str, tmp_path: Path) -> None:
    make(uri, tmp_path / "lost", KILLED_AT)
    assert make(uri, tmp_path / "heir", KILLED_AT)[0] == [6], "of what was not yet a shard nothing is known"
    assert make(uri, tmp_path / "next")[0] == [6, 7, 8]
