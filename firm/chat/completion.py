"""What an endpoint sends back: how large it may be, and the reply in it."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from firm.chat.messages import Reply, RequestFailed, Token
from firm.terminal import visible

BYTES = 2**16
"""What an answer may have besides its tokens."""
TOKEN_BYTES = 128
"""What a token may take: the longest of common vocabularies, or some characters as JSON escapes."""
LOGPROBS_BYTES = 4096
"""What a token may take with the likeliest others, each with its text, bytes and logprob."""


def max_bytes(max_tokens: int, logprobs: bool) -> int:
    """How large an answer of ``max_tokens`` tokens can be."""
    return BYTES + max_tokens * (LOGPROBS_BYTES if logprobs else TOKEN_BYTES)


def excerpt(content: bytes) -> str:
    """The beginning of what a server said, on one line."""
    return visible(" ".join(content[:2000].decode("utf-8", "replace").split()))[:200]


def read_reply(content: bytes) -> Reply:
    """The answer in a chat completion.

    Raises:
        RequestFailed: It is none; another try may help.
    """
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"].get("content")
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text") or "" for part in text)
        if not isinstance(text, str | None):
            raise TypeError(f"content is a {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        detail = f"the answer is not a chat completion ({type(error).__name__}: {error}): {excerpt(content)}"
        raise RequestFailed(detail, retryable=True) from error
    return Reply(text or "", choice.get("finish_reason") == "length", _read_tokens(choice.get("logprobs")))


class _Likely(BaseModel):
    """A token with its logprob; rounding may lift that of a certain one above 0."""

    model_config = ConfigDict(strict=True)
    token: str
    logprob: Annotated[float, Field(le=1e-3, allow_inf_nan=False)]


class _Written(_Likely):
    top_logprobs: list[_Likely]


_CONTENT = TypeAdapter(list[_Written])


def _read_tokens(logprobs: Any) -> tuple[Token, ...]:
    """Tokens of a choice's ``logprobs``; none where it is missing or any part of it is not of the protocol."""
    try:
        content = _CONTENT.validate_python(logprobs["content"])
    except (ValidationError, LookupError, TypeError):
        return ()
    return tuple(Token(t.token, t.logprob, tuple((o.token, o.logprob) for o in t.top_logprobs)) for t in content)
