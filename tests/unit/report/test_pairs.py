"""The pairs that the report shows, and their pictures."""

from base64 import b64decode
from io import BytesIO
from pathlib import Path

from PIL import Image
from unit.report.made import DIMENSIONS, write_samples

from firm.report.pairs import choose, pictures


def test_pairs_are_spread_over_all_gains(tmp_path: Path) -> None:
    gains = {i: (3, 1 + i % 5) for i in range(50)} | {50: (None, 5), 51: (5, None)}
    chosen = choose(write_samples(tmp_path, gains), DIMENSIONS[0], 12)
    found = [item["gain"] for item in chosen["items"]]
    assert found == sorted(found, reverse=True)
    assert {found[0], found[-1]} == {2, -2}
    assert set(found) == {-2, -1, 0, 1, 2}
    counts = {key: chosen[key] for key in ("total", "unrated", "better", "equal", "worse")}
    assert counts == {"total": 52, "unrated": 2, "better": 20, "equal": 10, "worse": 20}
    assert chosen["items"][0]["scores"][2] == {"judge": "critic", "dimension": "quality", "base": 4.0, "final": 4.0}


def test_pairs_are_shown_where_no_judgement_is_valid(tmp_path: Path) -> None:
    chosen = choose(write_samples(tmp_path, {i: (None, None) for i in range(3)}), DIMENSIONS[0], 12)
    assert [item["index"] for item in chosen["items"]] == [0, 1, 2]
    assert chosen["unrated"] == 3


def test_large_images_are_shrunk_and_small_ones_stay_sharp(tmp_path: Path) -> None:
    large = pictures(write_samples(tmp_path / "large", {0: (1, 2), 7: (1, 2)}, side=600), [7])
    assert set(large) == {7}
    assert large[7]["base"].uri.startswith("data:image/jpeg;base64,")
    assert not large[7]["base"].pixelated
    small = pictures(write_samples(tmp_path / "small", {0: (1, 2)}), [0])[0]
    assert small["final"].uri.startswith("data:image/png;base64,")
    assert small["final"].pixelated
    assert small["base"] != small["final"]
    encoded = BytesIO(b64decode(large[7]["base"].uri.split(",")[1]))
    assert Image.open(encoded).size == (384, 384)
