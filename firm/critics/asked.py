"""Questions as they come over the wire: read, and refused before they cost anything."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from firm.chat.messages import IMAGE_MARK, ChatMessage, RequestFailed
from firm.config.serve import QuestionLimits
from firm.records import UserError
from firm.storage.pictures import image_size

MAX_SCANS = 100
"""Of a JPEG: every scan of a few bytes costs a pass over all of the image; progressive ones have about ten."""


class Question(NamedTuple):
    """A question to a critic.

    Attributes:
        text: With ``<image>`` marks.
        images: PNG, JPEG or WebP.
        pixels: Of all images, as their heads say.
    """

    text: str
    images: list[bytes]
    pixels: int


def read_question(messages: Sequence[ChatMessage], limits: QuestionLimits) -> Question:
    """The question of one user message: undoes `firm.chat.messages.user_message`.

    Of the images, only the heads are read.

    Raises:
        RequestFailed: The messages are of another form, or beyond the limits.
    """
    texts: list[str] = []
    images: list[bytes] = []
    pixels = 0
    for i, part in enumerate(_parts(messages)):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text.replace(IMAGE_MARK, "< image >"))
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                texts.append(IMAGE_MARK)
                if len(images) == limits.max_question_images:
                    raise RequestFailed(f"the message has more than {limits.max_question_images} images")
                data, area = _image(url, f"content part {i}")
                images.append(data)
                pixels += area
                if pixels > limits.max_question_pixels:
                    raise RequestFailed(
                        f"content part {i}: images of {pixels} pixels, more than {limits.max_question_pixels}"
                    )
            case _:
                raise RequestFailed(f"content part {i} is neither a text nor an image_url")
    text = "".join(texts)
    if not images:
        raise RequestFailed("the message has no image: a critic judges images")
    if len(text) > limits.max_chars:
        raise RequestFailed(f"the text has {len(text)} characters, more than {limits.max_chars}")
    return Question(text, images, pixels)


def _parts(messages: Sequence[ChatMessage]) -> list[object]:
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") != "user":
        raise RequestFailed("messages must be one message of the role user: a critic holds no conversation")
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise RequestFailed("the message has no content")
    return parts


def _image(url: str, where: str) -> tuple[bytes, int]:
    """An image's bytes, and its pixels as its head says."""
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestFailed(f"{where}: images must be data URIs such as data:image/png;base64,...")
    try:
        image = base64.b64decode(data, validate=True)
        width, height = image_size(url, where)
    except (binascii.Error, UserError) as error:
        raise RequestFailed(f"{where}: {error}") from error
    if image.startswith(b"\xff\xd8") and image.count(b"\xff\xda") > MAX_SCANS:
        raise RequestFailed(f"{where}: a JPEG of more than {MAX_SCANS} scans")
    return image, width * height
