"""Clients in the OpenAI chat format: a judge in this process, or one behind any compatible endpoint.

A failed request is a `RequestFailed`: one judgement is lost and the run continues. A failure that retrying cannot fix
is a `UserError`: a refused key, a wrong address, a server that is down or that fails every request.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, NoReturn

import httpx
import tenacity

from firm.certificates import TRUST, distrust, tls_context
from firm.chat.completion import excerpt, max_bytes, read_reply
from firm.chat.messages import MAX_TOP_LOGPROBS, ChatMessage, Reply, RequestFailed
from firm.chat.silence import Silence
from firm.chat.traffic import counted
from firm.config import EndpointChat, PythonChat
from firm.records import UserError

AWAY = (502, 503, 504)
"""What a proxy, or a server that stops or starts, says in the place of an answer."""

_NO_PROXY = dict.fromkeys(("all://127.0.0.1", "all://[::1]", "all://localhost"))
"""This machine, which a proxy would take for itself: httpx asks it directly, whatever the environment says."""


def open_chat(config: PythonChat | EndpointChat) -> PythonClient | EndpointClient:
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

    def close(self) -> None:
        """Nothing to close."""


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Where all requests of this process run, in a thread of its own; judges are asked by other threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


class _Again(Exception):
    """A failure that may pass: wait and send the request again."""

    def __init__(
        self, detail: str, wait_s: float = 0.0, *, unanswered: bool = False, unreachable: bool = False
    ) -> None:
        super().__init__(detail)
        self.wait_s = wait_s
        self.unanswered = unanswered or unreachable
        self.unreachable = unreachable


class EndpointClient:
    """A judge behind an OpenAI-compatible endpoint.

    429, 5xx, 408, timeouts and connection errors are sent again with exponential back-off and jitter, honouring
    Retry-After, until ``deadline_s``, which holds whatever the server does: requests run in an event loop, where
    anything that waits can be cancelled. With ``patience_s`` deadlines begin anew while the server answers nobody, and
    all requests end when it has not for so long. An answer may be as large as ``max_tokens`` tokens can be, and is not
    to be compressed, as a few bytes could unpack to any number. The API key comes from the environment variable that
    the config names; without that variable no key is sent.

    Args:
        config: Address, model and limits.
        max_failures: Failed requests in a row after which the endpoint is given up (a UserError).
        first_wait_s: First back-off in seconds; it doubles up to 30 s.

    Raises:
        UserError: The URL or the key is not well-formed, or a file of trusted authorities is of no use.
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
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.AsyncClient(
                headers=headers, limits=limits, timeout=None, verify=tls_context(), mounts=_NO_PROXY
            )
            httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"the endpoint's URL or proxy is wrong: {error}", config.base_url, "", True) from error
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._in_flight = set[Future[Any]]()
        self._failures = 0
        self._silence = Silence(config.patience_s, self.url)
        self._loop = _event_loop()

    @counted
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
            limit = max_bytes(max_tokens, self._config.logprobs)
            reply = read_reply(self._send_until_deadline(json.dumps(body).encode(), limit))
        except RequestFailed as error:
            with self._lock:
                self._failures += 1
            self._check_circuit(error.detail)
            raise
        with self._lock:
            self._failures = 0
        return reply

    def close(self) -> None:
        """Close the connections; a request that has no answer yet gets none."""
        self._closed.set()
        for request in tuple(self._in_flight):
            request.cancel()
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()

    def _check_circuit(self, detail: str) -> None:
        """Give up on a dead or incompatible server instead of losing hours, one deadline after another."""
        if self._failures >= self._max_failures:
            last = f"; the last one: {detail}" if detail else ""
            what = f"the endpoint fails every request ({self._failures} in a row{last})"
            raise UserError(what, self.url, "look at the server's log, then run the same command again to resume")

    def _send_until_deadline(self, body: bytes, limit: int) -> bytes:
        deadline = time.monotonic() + self._config.deadline_s
        only_unreachable = True

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            backoff = min(self._backoff(state), self._config.deadline_s / 2)
            return max(backoff, error.wait_s if isinstance(error, _Again) else 0.0)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=lambda state: self._closed.is_set() or time.monotonic() + state.upcoming_sleep >= deadline,
            wait=wait,
            sleep=tenacity.sleep_using_event(self._closed),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    began = time.monotonic()
                    try:
                        return self._send(body, limit, deadline)
                    except _Again as error:
                        only_unreachable = only_unreachable and error.unreachable
                        if error.unanswered and self._silence.lasts(began, str(error)):
                            deadline = time.monotonic() + self._config.deadline_s
                        raise
        except _Again as error:
            if only_unreachable:
                what = f"the endpoint cannot be reached: {error}"
                raise UserError(what, self.url, "start the server, or correct base_url in the config") from error
            raise RequestFailed(f"{error} (gave up after {self._config.deadline_s:g} s)") from error
        raise AssertionError("unreachable: tenacity returns or raises")

    def _send(self, body: bytes, limit: int, deadline: float) -> bytes:
        """Send once; the answer's bytes, at most ``limit``, if its status is 2xx."""
        timeout = max(0.001, min(self._config.timeout_s, deadline - time.monotonic()))
        exchange = asyncio.run_coroutine_threadsafe(self._exchange(body, limit, timeout), self._loop)
        self._in_flight.add(exchange)
        exchange.add_done_callback(self._in_flight.discard)
        try:
            response, content = exchange.result()
        except httpx.ConnectError as error:
            if reason := distrust(error):
                raise UserError(f"the certificate of the endpoint is not trusted: {reason}", self.url, TRUST) from error
            raise _Again(str(error) or "connection failed", unreachable=True) from error
        except TimeoutError as error:
            raise _Again(f"no whole answer within {timeout:g} s", unanswered=True) from error
        except httpx.TransportError as error:
            raise _Again(f"{type(error).__name__}: {error}", unanswered=True) from error
        except (httpx.InvalidURL, UnicodeError) as error:  # the address that a redirect names
            raise RequestFailed(f"a redirect to an impossible address: {type(error).__name__}: {error}") from error
        if response.status_code not in AWAY:
            self._silence.end()
        if not response.is_success:
            self._raise_for_status(response, content)
        if (encoding := response.headers.get("Content-Encoding", "").lower()) not in ("", "identity"):
            raise RequestFailed(f"the answer has an encoding that was not asked for: {encoding[:200]!r}")
        if len(content) > limit:
            raise RequestFailed(f"the answer is larger than {limit} bytes, more than max_tokens allows")
        return content

    async def _exchange(self, body: bytes, limit: int, timeout: float) -> tuple[httpx.Response, bytes]:
        """Send once; the response and its content as it was sent, of which reading ends beyond ``limit`` bytes."""
        content = bytearray()
        async with asyncio.timeout(timeout), self._client.stream("POST", self.url, content=body) as response:
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit:
                    break
        return response, bytes(content)

    def _raise_for_status(self, response: httpx.Response, content: bytes) -> NoReturn:
        status = response.status_code
        detail = f"status {status}: {excerpt(content)}"
        if status in (401, 403):
            fix = f"put a valid key into the environment variable {self._config.api_key_env}"
            raise UserError(f"the endpoint refuses the key ({detail})", self.url, fix)
        if status == 404:
            fix = f"check base_url (it usually ends in /v1) and the model name {self._config.model!r}"
            raise UserError(f"the endpoint does not know this address or model ({detail})", self.url, fix)
        if status in (408, 429) or status >= 500:
            wait_s = _retry_after(response.headers.get("Retry-After"))
            raise _Again(detail, wait_s, unanswered=status in AWAY)
        raise RequestFailed(detail)


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
