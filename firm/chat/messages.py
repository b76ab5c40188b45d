"""Chat messages with images, replies, and the protocol of whatever answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ChatMessage = Mapping[str, Any]
IMAGE_MARK = "<image>"
"""Where an image stands in a text; a text without marks has its images in front."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Reply:
    """A judge's answer. ``truncated``: it ran out of tokens."""

    text: str
    truncated: bool = False


class RequestFailed(Exception):
    """One request failed for good. ``retryable``: asking again, with another seed, may help."""

    def __init__(self, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retryable = retryable


class Chat(Protocol):
    """Anything that answers chat messages. Implementations must allow concurrent calls from several threads."""

    name: str

    def complete(
        self, messages: Sequence[ChatMessage], *, max_tokens: int, temperature: float, seed: int | None
    ) -> Reply:
        """Answer the messages.

        Raises:
            RequestFailed: This request failed; others may succeed.
            UserError: No request can succeed until someone fixes the cause.
        """
        ...


def user_message(text: str, images: Sequence[bytes] = ()) -> dict[str, Any]:
    """A chat message of a text and PNG images (lossless, so that compression is not judged).

    The images stand at the ``<image>`` marks of the text, or in front of a text without marks.

    Raises:
        ValueError: An image is not PNG, or there are more or fewer marks than images.
    """
    marked = text if IMAGE_MARK in text else IMAGE_MARK * len(images) + text
    pieces = marked.split(IMAGE_MARK)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"the text has {len(pieces) - 1} marks for {len(images)} images")
    parts: list[dict[str, Any]] = []
    for piece, image in zip(pieces, [None, *images], strict=True):
        if image is not None:
            if not image.startswith(_PNG_SIGNATURE):
                raise ValueError("images must be PNG bytes")
            url = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return {"role": "user", "content": parts}
