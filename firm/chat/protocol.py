"""Requests and answers of the OpenAI chat protocol, as JSON."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from firm.chat.messages import MAX_TOP_LOGPROBS, Reply, Token
from firm.config.chat import MAX_TEMPERATURE, MIN_TEMPERATURE
from firm.texts import most_values

MAX_TOKENS = 1024
"""Token limit of an answer when the request sets none."""
MAX_VALUES = 100_000
"""Most values of a request, and commas and brackets of its texts."""
_UNSUPPORTED = {"stream": (None, False), "n": (None, 1)}
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request gets no answer, but this status, message and headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


def parse(body: bytes | bytearray, model: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages, and options of `firm.chat.messages.Chat.complete`, of a request for the model.

    Raises:
        Refused: The request is wrong, or asks for what is not supported.
    """
    request = _read(body)
    if (asked := request.get("model") or model) != model:
        raise Refused(404, f"the model {short(asked)} is not served here, only {model!r}")
    for name, supported in _UNSUPPORTED.items():
        if request.get(name) not in supported:
            raise Refused(400, f"{name}={short(request[name])} is not supported")
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or MAX_TOKENS
    if type(limit) is not int or limit < 1:
        raise Refused(400, f"max_tokens must be a positive whole number, got {short(limit)}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message")
    seed = request.get("seed")
    if type(seed) not in (int, type(None)):
        raise Refused(400, f"seed must be a whole number, got {short(seed)}")
    temperature = _temperature(request)
    return messages, {"max_tokens": limit, "temperature": temperature, "seed": seed, **_logprobs(request)}


def _read(body: bytes | bytearray) -> dict[str, Any]:
    if most_values(body) > MAX_VALUES:
        raise Refused(400, f"the body has more than {MAX_VALUES} values")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    return request


def _temperature(request: dict[str, Any]) -> float:
    temperature = request.get("temperature") or 0
    if type(temperature) not in (int, float) or not (
        temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
    ):
        allowed = f"0 or a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        raise Refused(400, f"temperature must be {allowed}, got {short(temperature)}")
    return float(temperature)


def _logprobs(request: dict[str, Any]) -> dict[str, int]:
    """The option ``top_logprobs``, if the request asks for logprobs."""
    wanted, top = request.get("logprobs"), request.get("top_logprobs")
    if type(wanted) not in (bool, type(None)):
        raise Refused(400, f"logprobs must be true or false, got {short(wanted)}")
    if top is not None and not wanted:
        raise Refused(400, "top_logprobs may be set only where logprobs is true")
    if top is not None and (type(top) is not int or not 0 <= top <= MAX_TOP_LOGPROBS):
        raise Refused(400, f"top_logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}, got {short(top)}")
    return {"top_logprobs": top or 0} if wanted else {}


def completion(model: str, messages: list[dict[str, Any]], reply: Reply) -> dict[str, Any]:
    """The answer to messages that were answered."""
    # Roughly, at four characters a token: not every chat has a tokenizer, but clients budget by these numbers.
    asked = sum(len(str(part.get("text", ""))) for message in messages for part in _parts(message)) // 4
    answered = len(reply.text) // 4
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "logprobs": {"content": [_token(token) for token in reply.tokens]} if reply.tokens else None,
        "finish_reason": "length" if reply.truncated else "stop",
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
    }


def refusal(status: int, message: str) -> dict[str, Any]:
    """The answer to a request that is not answered."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind}}


def _token(token: Token) -> dict[str, Any]:
    return {**_likely(token.text, token.logprob), "top_logprobs": [_likely(*likely) for likely in token.top]}


def _likely(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogatepass"))}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"text": content}] if isinstance(content, str) else content or []
