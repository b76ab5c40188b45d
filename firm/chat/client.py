"""Clients in the OpenAI chat format: a judge in this process, or one behind any compatible endpoint.

A failed request is a `RequestFailed`: one judgement is lost and the run continues. A failure that retrying cannot fix
is a `UserError`: a refused key, a wrong address, a server that is down or that fails every request.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, NoReturn

import httpx
import tenacity
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from firm.chat.messages import MAX_TOP_LOGPROBS, Chat, ChatMessage, Reply, RequestFailed, Token
from firm.config import EndpointChat, PythonChat
from firm.records import UserError

MAX_RESPONSE_BYTES = 16 * 2**20


def open_chat(config: PythonChat | EndpointChat) -> Chat:
    """Open the judge that a configuration names.

    Raises:
        UserError: The dotted name or the URL is wrong (exit code 2).
    """
    return PythonClient(config.target) if isinstance(config, PythonChat) else EndpointClient(config)


class PythonClient:
    """A judge in this process.

    Args:
        target: ``module:Class``; the class is made without arguments and has ``complete(messages, *, max_tokens,
            temperature, seed)``, which returns a text or a `Reply` and raises ValueError if it cannot answer.
    """

    def __init__(self, target: str) -> None:
        self.name = target
        module, _, attribute = target.partition(":")
        fix = "give the dotted name of a class, such as package.module:Class"
        try:
            judge = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"the judge cannot be loaded: {error}", target, fix, usage=True) from error
        if not callable(getattr(judge, "complete", None)):
            raise UserError("the judge has no method `complete`", target, fix, usage=True)
        self._complete: Callable[..., Any] = judge.complete

    def complete(
        self, messages: Sequence[ChatMessage], *, max_tokens: int, temperature: float, seed: int | None
    ) -> Reply:
        """Answer the messages; see `Chat.complete`."""
        try:
            reply = self._complete(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        except ValueError as error:
            raise RequestFailed(f"{self.name}: {error}") from error
        if isinstance(reply, Reply):
            return reply
        if not isinstance(reply, str):
            raise RequestFailed(f"{self.name} returned {type(reply).__name__}, not a text")
        return Reply(reply)


class _Again(Exception):
    """A failure that may pass: wait and send the request again."""

    def __init__(self, detail: str, wait_s: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(detail)
        self.wait_s = wait_s
        self.unreachable = unreachable


class EndpointClient:
    """A judge behind an OpenAI-compatible endpoint.

    429, 5xx, 408, timeouts and connection errors are sent again with exponential back-off and jitter, honouring
    Retry-After, until ``deadline_s``. The API key comes from the environment variable that the config names; without
    that variable no key is sent.

    Args:
        config: Address, model and limits.
        max_failures: Failed requests in a row after which the endpoint is given up (a UserError).
        first_wait_s: First back-off in seconds; it doubles up to 30 s.

    Raises:
        UserError: The URL or the key is not well-formed.
    """

    def __init__(self, config: EndpointChat, max_failures: int = 20, first_wait_s: float = 0.5) -> None:
        self.name = config.model
        self.url = config.base_url.rstrip("/") + "/chat/completions"
        self._config = config
        self._max_failures = max_failures
        self._backoff = tenacity.wait_exponential(multiplier=first_wait_s, max=30) + tenacity.wait_random(
            0, first_wait_s
        )
        if not config.base_url.startswith(("http://", "https://")):
            raise UserError(
                "the endpoint's base_url is not an http(s) URL",
                config.base_url,
                "for example http://host:8000/v1",
                True,
            )
        key = os.environ.get(config.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("the API key has characters that a header cannot carry", config.api_key_env, "", True)
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(headers=headers, limits=limits)
            httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"the endpoint's URL or proxy is wrong: {error}", config.base_url, "", True) from error
        self._lock = threading.Lock()
        self._failures = 0

    def complete(
        self, messages: Sequence[ChatMessage], *, max_tokens: int, temperature: float, seed: int | None
    ) -> Reply:
        """Answer the messages; see `Chat.complete`."""
        self._check_circuit("")
        body: dict[str, Any] = {"model": self._config.model, "messages": list(messages)}
        body |= {"max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            body["seed"] = seed
        if self._config.logprobs:
            body |= {"logprobs": True, "top_logprobs": MAX_TOP_LOGPROBS}
        try:
            reply = _read_reply(self._send_until_deadline(json.dumps(body).encode()))
        except RequestFailed as error:
            with self._lock:
                self._failures += 1
            self._check_circuit(error.detail)
            raise
        with self._lock:
            self._failures = 0
        return reply

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _check_circuit(self, detail: str) -> None:
        """Give up on a dead or incompatible server instead of losing hours, one deadline after another."""
        if self._failures >= self._max_failures:
            last = f"; the last one: {detail}" if detail else ""
            what = f"the endpoint fails every request ({self._failures} in a row{last})"
            raise UserError(what, self.url, "look at the server's log, then run the same command again to resume")

    def _send_until_deadline(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self._config.deadline_s
        only_unreachable = True

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(self._backoff(state), error.wait_s if isinstance(error, _Again) else 0.0)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_before_delay(self._config.deadline_s),
            wait=wait,
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    try:
                        return self._send(body, deadline)
                    except _Again as error:
                        only_unreachable = only_unreachable and error.unreachable
                        raise
        except _Again as error:
            if only_unreachable:
                what = f"the endpoint cannot be reached: {error}"
                raise UserError(what, self.url, "start the server, or correct base_url in the config") from error
            raise RequestFailed(f"{error} (gave up after {self._config.deadline_s:g} s)") from error
        raise AssertionError("unreachable: tenacity returns or raises")

    def _send(self, body: bytes, deadline: float) -> bytes:
        """Send once; the answer's bytes if its status is 2xx."""
        timeout = max(0.001, min(self._config.timeout_s, deadline - time.monotonic()))
        end = time.monotonic() + timeout
        headers = {"Content-Type": "application/json"}
        content = bytearray()
        try:
            with self._client.stream("POST", self.url, content=body, headers=headers, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx's timeout is per read: a server that trickles bytes would keep the request open forever
                    if time.monotonic() > end:
                        raise _Again(f"the answer took longer than {timeout:g} s")
                    if len(content) > MAX_RESPONSE_BYTES:
                        raise RequestFailed(f"the answer is larger than {MAX_RESPONSE_BYTES} bytes")
        except httpx.ConnectError as error:
            raise _Again(str(error) or "connection failed", unreachable=True) from error
        except httpx.TimeoutException as error:
            raise _Again(f"no answer within {timeout:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _Again(f"{type(error).__name__}: {error}") from error
        except httpx.DecodingError as error:
            raise RequestFailed(f"the answer cannot be decoded: {error}", retryable=True) from error
        if not response.is_success:
            self._raise_for_status(response, bytes(content))
        return bytes(content)

    def _raise_for_status(self, response: httpx.Response, content: bytes) -> NoReturn:
        status = response.status_code
        detail = f"status {status}: {_excerpt(content)}"
        if status in (401, 403):
            fix = f"put a valid key into the environment variable {self._config.api_key_env}"
            raise UserError(f"the endpoint refuses the key ({detail})", self.url, fix)
        if status == 404:
            fix = f"check base_url (it usually ends in /v1) and the model name {self._config.model!r}"
            raise UserError(f"the endpoint does not know this address or model ({detail})", self.url, fix)
        if status in (408, 429) or status >= 500:
            raise _Again(detail, wait_s=_retry_after(response.headers.get("Retry-After")))
        raise RequestFailed(detail)


def _excerpt(content: bytes) -> str:
    return " ".join(content[:2000].decode("utf-8", "replace").split())[:200]


def _retry_after(value: str | None) -> float:
    """Seconds to wait according to a Retry-After header (seconds or a date); 0 if it is not usable."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return 0.0
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _read_reply(content: bytes) -> Reply:
    """Text and finish reason of a chat completion."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"].get("content")
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text") or "" for part in text)
        if not isinstance(text, str | None):
            raise TypeError(f"content is a {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        detail = f"the answer is not a chat completion ({error!r}): {_excerpt(content)}"
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
