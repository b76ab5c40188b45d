"""The other side of `firm.chat.client`: any chat, served over HTTP in the OpenAI protocol.

``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /health`` and ``GET /metrics`` (Prometheus). A chat should take
images as data URIs only: a server that fetches what a request names can be made to read what its caller cannot.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from anyio import CapacityLimiter, to_thread
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, disable_created_metrics, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from firm.chat.messages import MAX_TOP_LOGPROBS, Chat, Reply, RequestFailed, Token
from firm.records import UserError

MAX_BODY_BYTES = 20 * 2**20
MAX_THREADS = 512
"""Maximum number of requests that the chat gets concurrently; further ones wait."""
MAX_TOKENS = 1024
"""Token limit of an answer when the request sets none."""
STALL_S = 60
"""A connection without progress, on its request or on reading its answer, is dropped after one to two of these."""
_UNSUPPORTED = {"stream": (None, False), "n": (None, 1)}
_ERRORS = {401: "authentication_error", 404: "not_found_error"}

disable_created_metrics()  # they would double the series and expose when this process started


class ChatServer:
    """Serves a chat. The port is bound on construction; clients that connect before `serve` wait.

    Args:
        chat: What answers. A `RequestFailed` of it is the caller's mistake (400), anything else the server's (5xx).
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: Bearer token that requests must carry; empty: none.
        gauges: Name of a metric -> its value now, for ``/metrics``.

    Attributes:
        port: The port that was taken.
        registry: The metrics.

    Raises:
        UserError: The address cannot be used, such as a port that is taken.
    """

    def __init__(
        self,
        chat: Chat,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str = "",
        gauges: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        try:
            self._socket = socket.create_server((host, port), backlog=128)
        except (OSError, OverflowError) as error:
            fix = "choose another --port or --host"
            raise UserError(f"cannot listen: {error}", f"{host}:{port}", fix, usage=True) from error
        self.port: int = self._socket.getsockname()[1]
        self.registry = CollectorRegistry()
        self._chat = chat
        self._token = token
        self._threads = CapacityLimiter(MAX_THREADS)
        self._owed: dict[Any, Any] = {}
        self._codes = Counter("firm_requests", "Answers by status.", ["code"], registry=self.registry)
        self._seconds = Summary("firm_request_seconds", "Time until the answer.", registry=self.registry)
        self._active = Gauge("firm_requests_in_progress", "Requests without an answer yet.", registry=self.registry)
        for name, value in (gauges or {}).items():
            Gauge(name, "Value now.", registry=self.registry).set_function(value)
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._completions, methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _explain})
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, log_level="error", access_log=False,
            timeout_keep_alive=STALL_S, timeout_notify=STALL_S, callback_notify=self._drop_stalled,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        return f"http://127.0.0.1:{self.port}/v1"

    def serve(self, grace_s: float = 1.0) -> None:
        """Serve until `stop` is called, then wait up to ``grace_s`` for pending answers."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        # Threads of a daemon are daemons: a chat that hangs cannot keep the process alive. Signals stay the caller's.
        thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        thread.start()
        thread.join()

    def stop(self, *_signal: object) -> None:
        """Accept no more connections; can be used as a signal handler."""
        self._server.should_exit = True

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in the background; yields the base URL."""
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            self.stop()
            thread.join()

    async def _drop_stalled(self) -> None:
        """Drop connections that still owe what they owed a minute ago: a request, its rest, or reading the answer."""
        before = self._owed
        self._owed = {}
        for connection in cast(set[Any], self._server.server_state.connections):
            cycle = connection.cycle
            if cycle is None or cycle.more_body or cycle.response_complete or connection.flow.write_paused:
                self._owed[connection] = cycle and (cycle, cycle.more_body, cycle.response_complete)
                if connection in before and before[connection] == self._owed[connection]:
                    connection.transport.abort()

    # The endpoints are coroutines because Starlette would run functions in a pool of 40 threads.

    async def _health(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._authorise(request)
        model = {"id": self._chat.name, "object": "model", "created": 0, "owned_by": "firm"}
        return _json({"object": "list", "data": [model]})

    async def _completions(self, request: Request) -> Response:
        with self._active.track_inprogress(), self._seconds.time():
            try:
                self._authorise(request)
                body = await _read(request)
                answer = to_thread.run_sync(self._answer, body, limiter=self._threads, abandon_on_cancel=True)
                response = _json(await answer)
            except HTTPException as error:
                response = await _explain(request, error)
            except asyncio.CancelledError:  # by uvicorn, when the grace period is over
                response = await _explain(request, HTTPException(503, "the server stops"))
        self._codes.labels(response.status_code).inc()
        return response

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong")

    def _answer(self, body: bytes) -> dict[str, Any]:
        messages, options = _parse(body, self._chat.name)
        if "top_logprobs" in options and not getattr(self._chat, "gives_logprobs", False):
            raise HTTPException(400, f"logprobs are not supported by the model {self._chat.name!r}")
        try:
            return _completion(self._chat.name, messages, self._chat.complete(messages, **options))
        except RequestFailed as error:
            raise HTTPException(400, error.detail) from error
        except UserError as error:
            raise HTTPException(503, str(error)) from error
        except Exception as error:  # one request must not take the server down; the caller sees what happened
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error


async def _read(request: Request) -> bytes:
    too_large = HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    if int(request.headers.get("Content-Length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the caller went away") from None
    return bytes(body)


def _parse(body: bytes, model: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and options of a request for the model."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise HTTPException(400, "the body is not a JSON object")
    if (asked := request.get("model") or model) != model:
        raise HTTPException(404, f"the model {asked!r} is not served here, only {model!r}")
    for name, supported in _UNSUPPORTED.items():
        if request.get(name) not in supported:
            raise HTTPException(400, f"{name}={request[name]!r} is not supported")
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or MAX_TOKENS
    if type(limit) is not int or limit < 1:
        raise HTTPException(400, f"max_tokens must be a positive whole number, got {limit!r}")
    temperature = request.get("temperature") or 0.0
    if type(temperature) not in (int, float) or not (math.isfinite(temperature) and temperature >= 0):
        raise HTTPException(400, f"temperature must be a number from 0 on, got {temperature!r}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages must be a list of at least one message")
    seed = request.get("seed")
    if type(seed) not in (int, type(None)):
        raise HTTPException(400, f"seed must be a whole number, got {seed!r}")
    return messages, {"max_tokens": limit, "temperature": temperature, "seed": seed, **_parse_logprobs(request)}


def _parse_logprobs(request: dict[str, Any]) -> dict[str, int]:
    """The option ``top_logprobs``, if the request asks for logprobs."""
    wanted, top = request.get("logprobs"), request.get("top_logprobs")
    if type(wanted) not in (bool, type(None)):
        raise HTTPException(400, f"logprobs must be true or false, got {wanted!r}")
    if top is not None and not wanted:
        raise HTTPException(400, "top_logprobs may be set only where logprobs is true")
    if top is not None and (type(top) is not int or not 0 <= top <= MAX_TOP_LOGPROBS):
        raise HTTPException(400, f"top_logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}, got {top!r}")
    return {"top_logprobs": top or 0} if wanted else {}


def _completion(model: str, messages: list[dict[str, Any]], reply: Reply) -> dict[str, Any]:
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


def _token(token: Token) -> dict[str, Any]:
    return {**_likely(token.text, token.logprob), "top_logprobs": [_likely(*likely) for likely in token.top]}


def _likely(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogatepass"))}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"text": content}] if isinstance(content, str) else content or []


async def _explain(_request: Request, error: Exception) -> Response:
    """An error in the protocol's form."""
    assert isinstance(error, HTTPException)
    kind = _ERRORS.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
    return _json({"error": {"message": error.detail, "type": kind}}, error.status_code)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # Starlette's JSONResponse fails with lone surrogates, which a chat's text may have.
    return Response(json.dumps(content), status, media_type="application/json")
