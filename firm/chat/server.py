"""The other side of `firm.chat.client`: any chat, served over HTTP in the OpenAI protocol.

``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /health`` and ``GET /metrics`` (Prometheus). A chat should take
images as data URIs only: a server that fetches what a request names can be made to read what its caller cannot.

Callers share a server without harming one another: `turns` says whose request is worked on next and who gives way when
there are too many, `connections` closes those that are too many or too slow. A caller is told apart by its address, or
by what a proxy says that the environment variable FORWARDED_ALLOW_IPS trusts.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, cast

import uvicorn
from anyio import CancelScope
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, disable_created_metrics, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from firm.chat.connections import Connections
from firm.chat.messages import Caller, Chat, RequestFailed
from firm.chat.protocol import Refused, completion, parse, refusal
from firm.chat.turns import Place, Turns
from firm.config.serve import ServerLimits
from firm.records import UserError

MAX_THREADS = 512
"""Requests that a chat gets at once, if nothing else is said; further ones wait."""

disable_created_metrics()  # they would double the series and expose when this process started


class ChatServer:
    """Serves a chat. The port is bound on construction; clients that connect before `serve` wait.

    Args:
        chat: What answers. A `RequestFailed` of it is the caller's mistake (400), anything else the server's (5xx).
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: Bearer token that requests must carry; empty: none.
        at_once: Requests that the chat gets at once.
        limits: What is taken from callers.
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
        at_once: int = MAX_THREADS,
        limits: ServerLimits | None = None,
        gauges: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        self._limits = limits or ServerLimits()
        try:
            self._socket = socket.create_server((host, port), backlog=128)
        except (OSError, OverflowError) as error:
            fix = "choose another --port or --host"
            raise UserError(f"cannot listen: {error}", f"{host}:{port}", fix, usage=True) from error
        self.port: int = self._socket.getsockname()[1]
        self.registry = CollectorRegistry()
        self._chat = chat
        self._token = token
        self._turns = Turns(at_once, self._limits.max_waiting, self._limits.max_held_bytes)
        self._codes = Counter("firm_requests", "Answers by status.", ["code"], registry=self.registry)
        self._seconds = Summary("firm_request_seconds", "Time until the answer.", registry=self.registry)
        self._active = Gauge("firm_requests_in_progress", "Requests without an answer yet.", registry=self.registry)
        for name, value in (gauges or {}).items():
            Gauge(name, "Value now.", registry=self.registry).set_function(value)
        self._server = uvicorn.Server(self._configure())

    def _configure(self) -> uvicorn.Config:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._completions, methods=["POST"]),
        ]
        handlers = {HTTPException: self._unknown, Refused: self._unknown}
        connections = Connections(self._limits)
        stall_s = cast(int, self._limits.stall_s)  # a fraction is fine as well
        return uvicorn.Config(
            Starlette(routes=routes, exception_handlers=handlers),
            http=cast(type[asyncio.Protocol], connections.protocol), ws="none", lifespan="off",
            log_config=None, log_level="error", access_log=False,
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ""),
            timeout_keep_alive=stall_s, timeout_notify=stall_s, callback_notify=connections.drop_stalled,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        return f"http://127.0.0.1:{self.port}/v1"

    def waiting(self) -> int:
        """How many requests have not begun."""
        return self._turns.waiting()

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

    # The endpoints are coroutines because Starlette would run functions in a pool of 40 threads.

    async def _health(self, request: Request) -> Response:
        await self._pause(request)
        return _json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        await self._pause(request)
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        await self._pause(request)
        self._authorise(request)
        model = {"id": self._chat.name, "object": "model", "created": 0, "owned_by": "firm"}
        return _json({"object": "list", "data": [model]})

    async def _completions(self, request: Request) -> Response:
        with self._active.track_inprogress(), self._seconds.time():
            try:
                await self._turns.keep_pace(_client(request))
                self._authorise(request)
                response = _json(await self._answer(request))
            except Refused as error:
                self._turns.delay(_client(request))
                response = _refusal(error)
            except asyncio.CancelledError:  # by uvicorn, when the grace period is over
                response = _refusal(Refused(503, "the server stops"))
        self._codes.labels(response.status_code).inc()
        return response

    async def _unknown(self, request: Request, error: Exception) -> Response:
        """Another path or method, or a refusal outside of completions."""
        await self._pause(request)
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, error.detail, error.headers)
        return _refusal(cast(Refused, error))

    async def _pause(self, request: Request) -> None:
        """Before an answer that costs next to nothing, unless it is asked for all the time."""
        await self._turns.keep_pace(_client(request))
        self._turns.delay(_client(request))

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Refused(401, "the bearer token is missing or wrong")

    async def _answer(self, request: Request) -> dict[str, Any]:
        size = int(request.headers.get("Content-Length", self._limits.max_body_bytes))
        if size > self._limits.max_body_bytes:
            raise self._too_large()
        async with self._place(request, size) as place:
            body = await self._read(request)
            place.size = len(body)
            watch = asyncio.create_task(_watch(request, place))
            try:
                await self._turns.wait(place)
                return await self._work(place, body)
            finally:
                watch.cancel()
        raise AssertionError("unreachable: who loses a place is refused")

    @asynccontextmanager
    async def _place(self, request: Request, size: int) -> AsyncIterator[Place]:
        """A place for a request; where it is lost, what is done in it is cancelled and the request refused."""
        lost: list[Refused] = []
        with CancelScope() as scope:

            def lose(reason: Refused) -> None:
                lost.append(reason)
                scope.cancel()

            place = self._turns.enter(_client(request), size, lose)
            try:
                yield place
            finally:
                self._turns.leave(place)
        if scope.cancelled_caught:
            raise lost[0]

    async def _read(self, request: Request) -> bytearray:
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._limits.max_body_bytes:
                    raise self._too_large()
        except ClientDisconnect:
            raise _left() from None
        return body

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._limits.max_body_bytes} bytes")

    async def _work(self, place: Place, body: bytearray) -> dict[str, Any]:
        """Have a request answered by a thread. Its turn ends when its work does, even if its caller has left."""
        loop = asyncio.get_running_loop()
        aside = partial(_soon, loop, self._turns.step_aside, place)
        caller = Caller(standing=place.client.standing, aside=aside)
        answer: Future[dict[str, Any]] = Future()
        answer.set_running_or_notify_cancel()

        def work() -> None:
            start = time.thread_time()
            try:
                answer.set_result(self._complete(body, caller))
            except BaseException as error:
                answer.set_exception(error)
            cost_s = time.thread_time() - start + caller.cost_s
            _soon(loop, self._turns.end, place, cost_s)

        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:  # this machine takes no more threads
            self._turns.end(place, 0.0)
            raise Refused(503, str(error)) from error
        try:
            return await asyncio.wrap_future(answer)
        finally:
            caller.left.cancel()

    def _complete(self, body: bytearray, caller: Caller) -> dict[str, Any]:
        messages, options = parse(body, self._chat.name)
        body.clear()  # it may be large, and the work long
        if "top_logprobs" in options and not getattr(self._chat, "gives_logprobs", False):
            raise Refused(400, f"logprobs are not supported by the model {self._chat.name!r}")
        if getattr(self._chat, "minds_callers", False):
            options["caller"] = caller
        try:
            return completion(self._chat.name, messages, self._chat.complete(messages, **options))
        except RequestFailed as error:
            raise Refused(400, error.detail) from error
        except UserError as error:
            raise Refused(503, str(error)) from error
        except Exception as error:  # one request must not take the server down; the caller sees what happened
            raise Refused(500, f"{type(error).__name__}: {error}") from error


def _soon(loop: asyncio.AbstractEventLoop, act: Callable[..., None], *arguments: object) -> None:
    """Have the loop act, from another thread."""
    with suppress(RuntimeError):  # the server has stopped
        loop.call_soon_threadsafe(act, *arguments)


async def _watch(request: Request, place: Place) -> None:
    """Give up the place of a caller that leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    place.lose(_left())


def _left() -> Refused:
    return Refused(499, "the caller has left")


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _refusal(error: Refused) -> Response:
    return _json(refusal(error.status, error.message), error.status, error.headers)


def _json(content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Starlette's JSONResponse fails with lone surrogates, which a chat's text may have.
    return Response(json.dumps(content), status, headers, media_type="application/json")
