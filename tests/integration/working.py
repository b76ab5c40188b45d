"""A stage in small, as tests of claims and leases run it."""

from pathlib import Path

from firm.records import ArtifactRef, Candidate
from firm.storage.artifacts import Output
from firm.storage.claims import claim, find
from firm.storage.inputs import open_input
from firm.storage.published import PublishedShards
from firm.storage.shards import iter_shards

ROWS = 4
SHARDS = "rows"


def candidate(index: int, voice: str) -> Candidate:
    return Candidate(index=index, prompt=voice, source="s", split="train", images=[bytes([index]) * 100])


def work(uri: str, scratch: Path, voice: str = "a", in_place: bool = False) -> ArtifactRef:
    """A stage in small: shards of two rows, published as they are finished, and a work file."""
    with claim(uri, in_place) as place:
        if place.artifact:
            return place.artifact
        out = Output.open(place.uri, scratch)
        shards = PublishedShards(out, SHARDS, Candidate, 2)
        for index in range(shards.rows_done, ROWS):
            (out.folder / "work").mkdir(exist_ok=True)
            (out.folder / "work" / "last").write_text(str(index))
            out.publish("work/last")
            shards.write([candidate(index, voice)])
        return place.settle(out.commit("s", "k", {}, {}, out.files()))


def check(ref: ArtifactRef, uri: str, scratch: Path) -> list[Candidate]:
    """The artifact is the one of the URI and has all rows; every byte is verified."""
    assert find(uri) == find(ref.uri) == ref
    rows = list(iter_shards(open_input(ref, scratch) / SHARDS, Candidate))
    assert [row.index for row in rows] == list(range(ROWS))
    return rows
