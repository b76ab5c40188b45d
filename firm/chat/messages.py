"""Chat messages with images, replies, and the protocol of whatever answers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

ChatMessage = Mapping[str, Any]
IMAGE_MARK = "<image>"
"""Where an image stands in a text; a text without marks has its images in front."""
MAX_TOP_LOGPROBS = 20
"""How many tokens may be asked for in the place of each token of an answer: the protocol's limit, and vLLM's."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def valid_unicode(text: str) -> str:
    """The text with a replacement character for each half of a surrogate pair, which no file or message can hold.

    Halves that make a pair become the character that they mean.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Token(NamedTuple):
    """A token of an answer, and what else its author thought of writing in its place.

    Attributes:
        text: What it adds to the answer; empty for all but the last token of a character that takes several.
        logprob: Natural logarithm of its probability, at most 0.
        top: Text and logprob of the likeliest tokens in its place, itself included.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """A judge's answer.

    Attributes:
        text: The answer.
        truncated: It ran out of tokens.
        tokens: Its tokens, where they were asked for; those of thoughts or of its end may be among them.

    All text in it becomes valid Unicode, whoever sent it: see `valid_unicode`.
    """

    text: str
    truncated: bool = False
    tokens: tuple[Token, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", valid_unicode(self.text))
        object.__setattr__(self, "tokens", tuple(map(_valid_token, self.tokens)))


def _valid_token(token: Token) -> Token:
    top = tuple((valid_unicode(text), logprob) for text, logprob in token.top)
    return Token(valid_unicode(token.text), token.logprob, top)


class RequestFailed(Exception):
    """One request failed for good. ``retryable``: asking again, with another seed, may help."""

    def __init__(self, detail: str, retryable: bool = False) -> None:
        self.detail = valid_unicode(detail)
        super().__init__(self.detail)
        self.retryable = retryable


@dataclass(eq=False)
class Caller:
    """Who waits for an answer that `firm.chat.server` was asked for.

    Attributes:
        left: Cancelled when nobody waits any more.
        standing: What the answers of whoever asks have cost so far: the least is next.
        aside: To be called when the answer takes long but is not in the way of others any more, with what it has cost.
        cost_s: Seconds that the answer has cost other threads than the one that was called.
    """

    left: Future[None] = field(default_factory=Future)
    standing: Callable[[], float] = lambda: 0.0
    aside: Callable[[float], None] = lambda _: None
    cost_s: float = 0.0


class Chat(Protocol):
    """Anything that answers chat messages. Implementations must allow concurrent calls from several threads.

    For `firm.chat.server`, one whose replies can have tokens says so by an attribute ``gives_logprobs = True``, and is
    called with ``top_logprobs`` (0..20) where a request asks for logprobs; one that can leave work undone says so by
    ``minds_callers = True``, and is called with ``caller``, a `Caller`.
    """

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
