"""The door of a served critic: what is read of a question, and what is refused by a look at its head."""

import base64
import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firm.chat.messages import RequestFailed
from firm.config.serve import QuestionLimits
from firm.critics.asked import read_question

LIMITS = QuestionLimits()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def part(data: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/any;base64," + base64.b64encode(data).decode()}}


def scans(times: int) -> bytes:
    """A progressive JPEG of 2048x2048 with its last scan repeated: each, of 16 bytes, costs a pass over the image."""
    plain = encoded(Image.new("RGB", (2048, 2048), "red"), "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + last * times + b"\xff\xd9"


PIXEL = encoded(Image.new("RGB", (1, 1)), "PNG")
BOMBS = {
    "a PNG of 169 megapixels": lambda: [encoded(Image.new("1", (13_000, 13_000)), "PNG")],
    "one beyond Pillow's own limit": lambda: [encoded(Image.new("1", (20_000, 20_000)), "PNG")],
    "a WebP of 36 bytes": lambda: [encoded(Image.new("RGB", (12_000, 12_000)), "WEBP", lossless=True, method=0)],
    "a line of pixels": lambda: [encoded(Image.new("1", (5_000_000, 1)), "PNG")],
    "two that are small enough alone": lambda: [encoded(Image.new("1", (2048, 1025)), "PNG")] * 2,
    "a JPEG of a thousand scans": lambda: [scans(1000)],
    "nine": lambda: [PIXEL] * 9,
    "a hundred thousand": lambda: [PIXEL] * 100_000,
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_would_cost_much_is_refused_unread(name: str) -> None:
    messages = [{"role": "user", "content": [part(data) for data in BOMBS[name]()]}]
    start = time.process_time()
    with pytest.raises(RequestFailed, match="pixels|scans|more than 8 images"):
        read_question(messages, LIMITS)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_at_the_limit_is_taken(form: str) -> None:
    options = {"progressive": True} if form == "JPEG" else {}
    data = encoded(Image.linear_gradient("L").resize((2048, 2048)).convert("RGB"), form, **options)
    assert read_question([{"role": "user", "content": [part(data)]}], LIMITS) == ("<image>", [data], 2**22)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["user", "text", "image_url"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "url"]), inner),
)


@given(st.lists(json_values))
def test_any_messages_are_read_or_refused(messages: list[object]) -> None:
    with pytest.raises(RequestFailed):  # none of these has an image
        read_question(messages, LIMITS)  # type: ignore[arg-type]


@given(st.binary(max_size=64), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X"]))
def test_any_bytes_are_read_or_refused(data: bytes, head: bytes) -> None:
    messages = [{"role": "user", "content": [part(head + data)]}]
    try:
        assert read_question(messages, LIMITS)[1] == [head + data]
    except RequestFailed as error:
        assert "content part 0" in error.detail
