"""Shards return what was put in, and over the ranks every record comes once."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from firm.critics.agreement import Prediction
from firm.records import Candidate, Invalid, JudgedCandidate, Judgement, Prompt, Provenance, UserError
from firm.storage.shards import ShardWriter, iter_shards, read_shard, write_shard

TEXT = st.text(max_size=20)
IMAGES = st.lists(st.binary(max_size=30), max_size=3)
DISTRIBUTIONS = st.none() | st.sampled_from([(0.2, 0.2, 0.2, 0.2, 0.2), (1.0, 0.0, 0.0, 0.0, 0.0)])
JUDGEMENTS = st.builds(Judgement, score=st.integers(1, 5), distribution=DISTRIBUTIONS, rationale=TEXT)
INVALID = st.builds(Invalid, reason=st.sampled_from(["empty", "unparsable", "non_finite"]), detail=TEXT)
ROW = {
    "prompt": st.builds(Prompt, text=TEXT | st.just("{"), image=st.none() | TEXT),
    "source": TEXT,
    "split": st.sampled_from(["train", "test"]),
    "images": IMAGES,
}
JUDGED = st.builds(
    JudgedCandidate,
    index=st.integers(-(2**63), 2**63 - 1),
    material=st.dictionaries(TEXT, st.lists(TEXT, max_size=3), max_size=2),
    assessment=st.dictionaries(TEXT, JUDGEMENTS | INVALID, max_size=3),
    provenance=st.builds(
        Provenance,
        teacher=TEXT,
        rubrics=st.dictionaries(TEXT, TEXT, max_size=2),
        answers=st.dictionaries(TEXT, TEXT, max_size=2),
    ),
    **ROW,
)
PREDICTIONS = st.builds(
    Prediction,
    id=TEXT,
    dimension=TEXT,
    difficulty=TEXT,
    source=TEXT,
    whose=st.sampled_from(["people", "teacher"]),
    reference=st.floats(1, 5),
    outcome=JUDGEMENTS | INVALID,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(JUDGED, max_size=8), st.lists(PREDICTIONS, max_size=8))
def test_round_trip(judged, predictions):
    with tempfile.TemporaryDirectory() as folder:
        for records, model in ((judged, JudgedCandidate), (predictions, Prediction)):
            write_shard(Path(folder) / "a", records, model)
            assert read_shard(Path(folder) / "a", model) == records
            write_shard(Path(folder) / "b", read_shard(Path(folder) / "a", model), model)
            assert (Path(folder) / "a").read_bytes() == (Path(folder) / "b").read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 12), st.data())
def test_ranks_cover_everything_once(total, rows_per_shard, world_size, data):
    rows = [Candidate(index=i, prompt="p", source="s", split="train", images=[]) for i in range(total)]
    with tempfile.TemporaryDirectory() as name:
        folder, done = Path(name), 0
        while done < total:  # any number of writers after one another, closed or not
            writer = ShardWriter(folder, Candidate, rows_per_shard)
            done = data.draw(st.integers(writer.rows_done, total)) if data.draw(st.booleans()) else total
            writer.write(rows[writer.rows_done : done])
            if done == total or data.draw(st.booleans()):
                writer.close()
        if not total:
            ShardWriter(folder, Candidate, rows_per_shard).close()
        parts = [list(iter_shards(folder, Candidate, rank, world_size)) for rank in range(world_size)]
    assert sum(parts, []) == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 255))
def test_a_flipped_byte_is_found_or_harmless(position, mask):
    """No damaged file crashes the reader: it fails as a UserError, or the record is what it was."""
    rows = [Candidate(index=i, prompt=f"prompt {i}", source="s", split="train", images=[b"x" * 40]) for i in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_shard(path, rows, Candidate)
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= mask
        path.write_bytes(data)
        try:
            assert read_shard(path, Candidate) == rows
        except UserError as error:
            assert str(path) in error.where
