"""Files of scores: what a row may be, whose mistakes are named, and the raters' own agreement."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firm.bench.run import STAGE
from firm.bench.scores import ScoreFile
from firm.config import PromptsConfig, ScoresSource
from firm.config.loading import load_config
from firm.images import encode_image
from firm.prompts import Splits
from firm.records import Prompt, UserError
from firm.stage import stage_key

PROMPTS = PromptsConfig(function="firm.shapes.generation:prompts")
DIMENSIONS = ("instruction_following", "quality")
HELD_OUT, TRAINED = "a blue circle", "a red circle"


def row(image: str = "a.png", rater: Any = None, **scores: float) -> dict[str, Any]:
    return {"prompt": HELD_OUT, "image": image, "scores": scores or {"quality": 4}, "rater": rater}


def opened(folder: Path, rows: list[Any], name: str = "scores.jsonl", **source: Any) -> ScoreFile:
    path = folder / name
    if path.suffix == ".parquet":
        columns = dict.fromkeys(key for r in rows for key in r)
        pq.write_table(pa.table({key: [r.get(key) for r in rows] for key in columns}), path)
    else:
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return ScoreFile(ScoresSource(name="people", path=str(path), **source), DIMENSIONS, Splits(PROMPTS))


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
def test_rows_of_one_image_are_one_example_with_the_mean_of_its_raters(tmp_path: Path, name: str) -> None:
    rows = [row("a.png", "ann", quality=4), row("a.png", "bob", quality=5), row("b.png", "ann", quality=1)]
    rows += [{**row("b.png", "ann"), "scores": None, "dimension": "instruction_following", "score": 2.5}]
    for i, image in enumerate(("a.png", "b.png")):
        (tmp_path / image).write_bytes(encode_image(Image.new("RGB", (8, 8), (i, 0, 0))))
    first, second = opened(tmp_path, rows, name, of_policy=True).items()
    assert first.references == {"quality": 4.5}
    assert second.references == {"quality": 1, "instruction_following": 2.5}
    assert (first.source, first.whose, first.prompt) == ("people", "people", Prompt(text=HELD_OUT))
    assert first.images() == [(tmp_path / "a.png").read_bytes()]


def test_images_are_read_when_they_are_judged_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = opened(tmp_path, ["", json.dumps(row("gone.png"))])
    [item] = file.items()
    with pytest.raises(UserError, match=r"line 2: .*gone.png"):
        item.images()
    with pytest.raises(UserError, match="No such file") as caught:
        file.check({"quality": 1, "instruction_following": 1})
    assert "line 2" in caught.value.where and caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"judges \w+ of 2 image\(s\), not of 1") as caught:
        file.check({"quality": 2, "instruction_following": 2})
    assert "line 2" in caught.value.where and caught.value.exit_code == 2


def test_edits_have_their_source_image_first(tmp_path: Path) -> None:
    for name, colour in (("before.png", 10), ("after.png", 20)):
        (tmp_path / name).write_bytes(encode_image(Image.new("RGB", (8, 8), (colour, 0, 0))))
    [item] = opened(tmp_path, [{**row("after.png"), "source_image": "before.png"}]).items()
    assert item.prompt == Prompt(text=HELD_OUT, image=str(tmp_path / "before.png"))
    assert item.images() == [(tmp_path / name).read_bytes() for name in ("before.png", "after.png")]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "the row"),
        ({**row(), "prompt": " "}, "prompt"),
        ({"prompt": "p", "scores": {"quality": 1}}, "images"),
        ({"prompt": "p", "image": "a.png"}, "scores"),
        ({**row(), "scores": {}}, "scores"),
        (row(quality=0), "scores.quality"),
        (row(quality=float("nan")), "scores.quality"),
        ({**row(), "scores": {"quality": "4"}}, "scores.quality"),
        ({**row(), "scores": {"quality": True}}, "scores.quality"),
        (row("b.png", "ann"), "ann has scored this image already"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path, [row("b.png", "ann"), row("c.png"), bad])
    assert caught.value.where.endswith("scores.jsonl, line 3") and caught.value.exit_code == 2


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has a score of instruction_following, quality"):
        opened(tmp_path, [row(beauty=3)])
    with pytest.raises(UserError, match="cannot read"):
        ScoreFile(ScoresSource(name="x", path=str(tmp_path / "gone.jsonl")), DIMENSIONS, Splits(PROMPTS))
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a Parquet file"):
        ScoreFile(ScoresSource(name="x", path=str(tmp_path / "x.parquet")), DIMENSIONS, Splits(PROMPTS))


def test_prompts_of_the_training_split_and_other_dimensions_are_told(tmp_path: Path) -> None:
    train = {**row("b.png", beauty=3, quality=2), "prompt": TRAINED}
    notes = opened(tmp_path, [row(), train]).notes()
    assert len(notes) == 2 and "1 of its 2 prompts belong to the training split" in notes[0] and "beauty" in notes[1]
    assert opened(tmp_path, [row()]).notes() == []


def test_the_raters_agreement_by_hand(tmp_path: Path) -> None:
    scores = {"a.png": (1, 2, 3), "b.png": (4, 4, 1), "c.png": (5, None, None)}
    rows = [row(i, r, quality=s) for i, three in scores.items() for r, s in zip("xyz", three, strict=True) if s]
    [ceiling] = opened(tmp_path, rows).raters()
    assert (ceiling["raters"], ceiling["images"], ceiling["n"], ceiling["whose"]) == (3, 2, 6, "people")
    assert ceiling["mae"] == pytest.approx((1.5 + 0 + 1.5 + 1.5 + 1.5 + 3) / 6)
    assert ceiling["pairwise"] == 0.5, "x: the others are equal, no pair; y: 2 < 4 and 2 < 2.5; z: 3 > 1 but 1.5 < 4"
    assert opened(tmp_path, [row("a.png"), row("b.png")]).raters() == []


def test_raters_without_names_are_told_apart(tmp_path: Path) -> None:
    [ceiling] = opened(tmp_path, [row(quality=4), row(quality=2), row(quality=4)]).raters()
    assert (ceiling["raters"], ceiling["mae"]) == (3, pytest.approx((1 + 2 + 1) / 3))


@given(st.lists(st.lists(st.floats(1, 5), min_size=1, max_size=4), min_size=1, max_size=6))
def test_references_lie_within_the_ratings(
    tmp_path_factory: pytest.TempPathFactory, ratings: list[list[float]]
) -> None:
    rows = [row(f"{i}.png", r, quality=s) for i, mine in enumerate(ratings) for r, s in enumerate(mine)]
    for item, mine in zip(opened(tmp_path_factory.mktemp("rated"), rows).items(), ratings, strict=True):
        assert item.references["quality"] == pytest.approx(np.mean(mine))
        assert 1 <= item.references["quality"] <= 5


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
def test_the_content_of_the_file_and_of_its_images_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "memory"))
    for image in ("a.png", "b.png"):
        (tmp_path / image).write_bytes(b"1")
    rows = [row("a.png"), {**row("b.png"), "image": None, "images": ["b.png"]}]
    opened(tmp_path, rows, name)
    source = f"{{kind: scores, name: people, path: {tmp_path / name}}}"
    config = load_config(
        "gen-shapes", [f"bench.sources.0={source}", "bench.gate.rules=[{metric: mae, at_most: 1}]", GAPS]
    )
    keys = [stage_key(STAGE, config, {})]
    for image in ("a.png", "b.png"):
        (tmp_path / image).write_bytes(b"2")
        keys.append(stage_key(STAGE, config, {}))
    opened(tmp_path, rows[:1], name)
    keys.append(stage_key(STAGE, config, {}))
    assert len(set(keys)) == 4


GAPS = "bench.gate.accept_gaps=" + json.dumps([f"{d}.{what}" for d in DIMENSIONS for what in ("skill_low", "pairwise")])
