"""Any image that Pillow can make is shown to judges as a person sees it, or refused by its name."""

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given
from PIL import Image

from firm.critics.encoder import Encoder
from firm.critics.local import load_processor
from firm.images import Limits, decode_image, encode_image
from firm.records import UserError
from firm.storage.pictures import image_size, read_image

LIMITS = Limits(max_pixels=5000, max_aspect=16)
TURNED = {  # EXIF orientation -> how the stored pixels [H, W] become what is seen
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
FRAMES = st.tuples(st.integers(1, 90), st.integers(1, 90))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes, limits: Limits | None = LIMITS) -> UserError:
    with pytest.raises(UserError) as caught:
        decode_image(data, "x.png", limits)
    assert caught.value.where == "x.png" and caught.value.fix
    return caught.value


def pixels(seed: int, *shape: int, most: int = 256) -> Any:
    return np.random.default_rng(seed).integers(0, most, shape)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


# ---- what a person sees ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.sampled_from(sorted(TURNED)))
def test_turned_images_are_upright(seed: int, width: int, height: int, orientation: int) -> None:
    stored = pixels(seed, height, width, 3).astype(np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = saved(Image.fromarray(stored), kind, exif=exif(orientation), **options)
        assert np.array_equal(np.asarray(decode_image(data, "")), TURNED[orientation](stored))


def test_exif_behind_the_pixels_counts() -> None:
    stored = pixels(0, 3, 5, 3).astype(np.uint8)
    data = saved(Image.fromarray(stored), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    behind = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert np.array_equal(np.asarray(decode_image(behind, "")), TURNED[6](stored))


@given(st.integers(0, 2**32), st.sampled_from(["RGBA", "LA"]), st.sampled_from(["PNG", "WEBP"]))
def test_what_is_transparent_is_white(seed: int, mode: str, kind: str) -> None:
    channels = pixels(seed, 5, 7, len(mode)).astype(np.uint8)
    image = Image.fromarray(channels, mode)
    data = saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    color, alpha = channels[..., :-1].astype(float), channels[..., -1:] / 255
    expected = np.broadcast_to(color * alpha + 255 * (1 - alpha), (5, 7, 3))
    for found in (decode_image(data, ""), decode_image(encode_image(image), "")):
        assert np.abs(np.asarray(found) - expected).max() <= 1


@given(st.integers(0, 2**32), st.sampled_from([1, 8, 8, 16]), st.booleans())
def test_sixteen_bits_of_gray_are_scaled(seed: int, bits: int, keyed: bool) -> None:
    values = pixels(seed, 6, 5, most=2**bits) * (65535 // (2**bits - 1))
    key = int(values[0, 0])
    image = Image.fromarray(values.astype(np.uint16))
    data = saved(image, "PNG", **({"transparency": key} if keyed else {}))
    seen = np.where(values == key, 255, values / 257) if keyed else values / 257
    found = np.asarray(decode_image(data, ""), dtype=float)
    assert np.abs(found - seen[..., None]).max() <= 0.5
    plain = np.asarray(decode_image(encode_image(image), ""), dtype=float)
    assert np.abs(plain - values[..., None] / 257).max() <= 0.5


def test_a_palette_with_a_transparent_color() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    found = decode_image(saved(image, "PNG", transparency=0), "")
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (0, 0, 255)


def test_a_color_that_is_transparent() -> None:
    image = Image.new("RGB", (4, 4), "red")
    image.putpixel((0, 0), (0, 0, 0))
    found = decode_image(saved(image, "PNG", transparency=(255, 0, 0)), "")
    assert found.getpixel((0, 0)) == (0, 0, 0) and found.getpixel((1, 1)) == (255, 255, 255)


# ---- any image -------------------------------------------------------------------------------------------------------


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from(Image.MODES))
    image = Image.new(mode, draw(FRAMES | st.tuples(st.integers(0, 300), st.integers(0, 300))))
    if image.size[0] * image.size[1] and mode in ("L", "RGB", "RGBA", "P", "I;16"):
        image.putpixel((0, 0), draw(st.integers(0, 255)) if mode in ("L", "P", "I;16") else (7, 8, 9))
    for key in draw(st.sets(st.sampled_from(["exif", "transparency", "icc_profile", "dpi", "comment"]))):
        image.info[key] = draw(st.binary(max_size=30) | st.integers(0, 70000))
    return image


def fits(width: int, height: int) -> bool:
    long, short = max(width, height), min(width, height)
    return bool(short) and long * short <= LIMITS.max_pixels and long <= short * LIMITS.max_aspect


@given(images())
@example(Image.new("F", (3, 3)))
@example(Image.new("LAB", (3, 3)))
@example(Image.new("La", (3, 3)))
def test_any_image_of_a_function_is_encoded_or_refused(image: Image.Image) -> None:
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    try:
        png = encode_image(image, "f, train 7", LIMITS)
    except UserError as error:
        assert error.where == "f, train 7" and error.fix and error.exit_code == 2
        assert (
            not fits(*image.size)
            or image.mode in ("I", "F", "LAB")
            or "transparency" in image.info
            or "exif" in image.info
        )
    else:
        found = decode_image(png, "", LIMITS)
        assert found.mode == "RGB" and sorted(found.size) == sorted(image.size) and fits(*image.size)
    assert before == (image.mode, image.size, image.tobytes(), dict(image.info))


@given(images(), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]))
def test_any_file_is_read_or_refused(image: Image.Image, kind: str) -> None:
    image.info.clear()
    try:
        data = saved(image, kind)
    except Exception:  # Pillow cannot write this mode as this
        return
    try:
        found = decode_image(data, "x.png", LIMITS)
    except UserError as error:
        assert error.where == "x.png" and (not fits(*image.size) or kind not in ("PNG", "JPEG", "WEBP"))
    else:
        assert found.mode == "RGB" and found.size == image.size and fits(*image.size)


BASES = [
    saved(Image.fromarray(pixels(3, 8, 9, 4).astype(np.uint8), "RGBA"), "PNG", exif=exif(6)),
    saved(Image.fromarray(pixels(4, 8, 9, most=65536).astype(np.uint16)), "PNG", transparency=300),
    saved(Image.fromarray(pixels(5, 8, 9, 3).astype(np.uint8)), "JPEG", exif=exif(5)),
    saved(Image.fromarray(pixels(6, 8, 9, 3).astype(np.uint8)), "WEBP", exif=exif(8)),
    saved(Image.new("P", (9, 8)), "PNG", transparency=b"\x01\x02"),
    saved(Image.new("CMYK", (9, 8)), "JPEG"),
]


@given(
    st.sampled_from(BASES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.integers(0, 2000),
)
def test_a_damaged_file_is_read_or_refused(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    damaged = damaged[: end or None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        path.write_bytes(damaged)
        for read in (read_image, image_size):
            try:
                read(path, "mine.jsonl, entry 3", LIMITS)
            except UserError as error:
                assert error.where == "mine.jsonl, entry 3" and error.fix and error.exit_code == 2


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "words"), [
    ((100, 51), "more than 5000"), ((1, 17), "16 times"), ((17, 1), "16 times"), ((1, 300), "16 times"),
])  # fmt: skip
def test_the_limits_are_named(size: tuple[int, int], words: str) -> None:
    error = refused(saved(Image.new("L", size), "PNG"))
    assert words in error.what and f"{size[0]} x {size[1]}" in error.what and "images.max_" in error.fix


def test_what_moves_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert "moves" in refused(data).what


@pytest.mark.parametrize(("kind", "end"), [("PNG", 100), ("JPEG", 700), ("WEBP", None)])
def test_the_head_is_looked_at_before_anything_is_decoded(tmp_path: Path, kind: str, end: int | None) -> None:
    """So the rest need not be there. (WebP's head is read with the rest.)"""
    path = tmp_path / "bomb.png"
    path.write_bytes(saved(Image.new("L", (1300, 1300)), kind)[:end])
    for read in (read_image, image_size):
        with pytest.raises(UserError, match="1300 x 1300 pixels, more than"):
            read(path, "bomb", Limits(2**16, 16))


@pytest.mark.parametrize("head", [b"", BASES[0], BASES[3], b"RIFF\xff\xff\xff\x7fWEBPVP8 "])
def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "sparse.png"
    path.write_bytes(head)
    os.truncate(path, 40 * 10**9)
    for read in (read_image, image_size):
        with pytest.raises(UserError, match="40000000000 bytes, more than") as caught:
            read(path, "mine.jsonl, entry 1: sparse.png", LIMITS)
        assert caught.value.where == "mine.jsonl, entry 1: sparse.png" and caught.value.exit_code == 2


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (
        str(tmp_path / "pipe"),
        "/dev/zero",
        "a\0b",
        "\ud800",
        str(tmp_path),
        "data:image/png;base64,ä",
        "x" * 300,
    ):
        for read in (read_image, image_size):
            with pytest.raises(UserError) as caught:
                read(name, "here", LIMITS)
            assert caught.value.where == "here" and caught.value.exit_code == 2


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_processor("pkg://firm.shapes/weights/critic"))


def test_a_critic_can_be_shown_whatever_the_limits_allow(encoder: Encoder) -> None:
    for aspect, sizes in ((16, [(1, 1), (1, 16), (16, 1), (90, 6), (31, 2)]), (200, [(1, 200), (200, 1), (5, 1000)])):
        for size in sizes:
            png = encode_image(Image.new("RGB", size), "", Limits(5000, aspect))
            assert encoder.questions(["<image> good?"], [[png]])["input_ids"].shape[0] == 1
