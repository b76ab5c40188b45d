from base64 import b64decode
from io import BytesIO
from pathlib import Path

from PIL import Image

from firm.film import SHOTS, SIDE, Film, read_film
from firm.images import encode_image
from firm.records import Prompt


def png(color: str, side: int = 8) -> bytes:
    return encode_image(Image.new("RGB", (side, side), color))


def test_a_frame_has_the_first_sample_of_each_of_the_first_prompts(tmp_path: Path) -> None:
    samples = [(Prompt(text=f"{i}"), [png("red" if first else "blue")]) for i in range(9) for first in (True, False)]
    Film(tmp_path / "film.jsonl", 0).add(0, samples)
    [frame] = read_film(tmp_path / "film.jsonl")
    assert [shot.prompt for shot in frame.shots] == [str(i) for i in range(SHOTS)]
    [[red]] = {shot.pictures for shot in frame.shots}
    assert Image.open(BytesIO(b64decode(red.uri.split(",")[1]))).getpixel((0, 0)) == (255, 0, 0) and red.pixelated


def test_one_instruction_for_two_images_is_two_prompts_and_pictures_are_small(tmp_path: Path) -> None:
    large = png("green", 600)
    Film(tmp_path / "film.jsonl", 0).add(5, [(Prompt(text="remove it", image=i), [large, large]) for i in ("a", "b")])
    [frame] = read_film(tmp_path / "film.jsonl")
    assert frame.epoch == 5 and len(frame.shots) == 2
    for picture in (p for shot in frame.shots for p in shot.pictures):
        assert Image.open(BytesIO(b64decode(picture.uri.split(",")[1]))).size == (SIDE, SIDE)


def test_frames_of_work_that_is_being_redone_are_dropped(tmp_path: Path) -> None:
    path, samples = tmp_path / "film.jsonl", [(Prompt(text="a red circle"), [png("red")])]
    film = Film(path, 0)
    for epoch in (0, 5, 10):
        film.add(epoch, samples)
    Film(path, 2).add(5, samples)
    assert [frame.epoch for frame in read_film(path)] == [0, 5, 5]
    Film(path, 0)
    assert read_film(path) == []


def test_a_prompt_may_have_separators_of_lines(tmp_path: Path) -> None:
    path, text = tmp_path / "film.jsonl", "a\u2028red\u2029circle\u0085and\r\nmore"
    Film(path, 0).add(0, [(Prompt(text=text), [png("red")])])
    Film(path, 1).add(5, [(Prompt(text=text), [png("red")])])
    assert [[shot.prompt for shot in frame.shots] for frame in read_film(path)] == [[text], [text]]
