"""The other side of `firm.chat.client`: any chat, served over HTTP in the OpenAI protocol.

``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /health`` and ``GET /metrics`` (Prometheus). A chat
should take images as data URIs only: a server that fetches what a request names can be made to read what its caller can
not.
"""

from __future__ import annotations

import hmac
import json
import math
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from firm.chat.messages import Chat, Reply, RequestFailed
from firm.records import UserError

MAX_BODY_BYTES = 20 * 2**20
MAX_TOKENS = 1024
"""Limit of an answer where the request gives none."""
_UNSUPPORTED = {"stream": (None, False), "n": (None, 1)}


class Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class ChatServer(ThreadingHTTPServer):
    """Serves a chat; a thread a connection.

    Args:
        chat: What answers. A `RequestFailed` of it is the caller's mistake (400), anything else the server's (5xx).
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: Bearer token that requests must carry; empty: none.
        gauges: Name of a metric -> its value now, for ``/metrics``.

    Raises:
        UserError: The address can not be used, such as a port that is taken.
    """

    daemon_threads = True
    request_queue_size = 128

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
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            fix = "choose another --port or --host"
            raise UserError(f"can not listen: {error}", f"{host}:{port}", fix, usage=True) from error
        self.chat, self.token, self.stopping = chat, token, False
        self._gauges = {"firm_requests_in_progress": self.in_progress, **(gauges or {})}
        self._statuses: Counter[int] = Counter()
        self._seconds, self._active, self._changed = 0.0, 0, threading.Condition()

    def in_progress(self) -> int:
        """How many requests wait for their answer."""
        return self._active

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def serve(self, grace_s: float = 0.0) -> None:
        """Serve until `stop` is called, then wait up to ``grace_s`` for the answers to what has been asked."""
        self.serve_forever(poll_interval=0.02)
        with self._changed:
            self._changed.wait_for(lambda: self._active == 0, grace_s)

    def stop(self, *_signal: object) -> None:
        """Take no more connections; may be a signal's handler."""
        self.stopping = True
        threading.Thread(target=self.shutdown).start()  # it waits for the thread that serves, which may be this one

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in the background; yields the base URL."""
        thread = threading.Thread(target=self.serve, daemon=True)
        with self:
            thread.start()
            try:
                yield self.url
            finally:
                self.stop()
                thread.join()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as in progress, and its time."""
        start = time.monotonic()
        with self._changed:
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._seconds += time.monotonic() - start
                self._changed.notify_all()

    def count(self, status: int) -> None:
        """Count an answer."""
        with self._changed:
            self._statuses[status] += 1

    def metrics(self) -> str:
        """Counters and gauges in Prometheus' text format."""
        with self._changed:
            lines = ["# TYPE firm_requests_total counter"]
            lines += [f'firm_requests_total{{code="{code}"}} {n}' for code, n in sorted(self._statuses.items())]
            lines += ["# TYPE firm_request_seconds summary", f"firm_request_seconds_sum {self._seconds:.6f}"]
            lines += [f"firm_request_seconds_count {self._statuses.total()}"]
            for name, value in self._gauges.items():
                lines += [f"# TYPE {name} gauge", f"{name} {value():g}"]
        return "\n".join(lines) + "\n"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about callers that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; a client that stalls must not hold its thread for ever
    server: ChatServer

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.server.metrics().encode(), "text/plain; version=0.0.4")
        else:
            self._respond(self._get)

    def do_POST(self) -> None:
        with self.server.counted():
            self.server.count(self._respond(self._post))

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: thousands of requests a run; /metrics counts them."""

    def _respond(self, route: Callable[[], dict[str, Any]]) -> int:
        try:
            status, answer = 200, route()
        except Refused as error:
            status, answer = error.status, {"error": {"message": str(error), "type": error.kind}}
            self.close_connection = True  # the body may not have been read: the connection cannot be used again
        self._send(status, json.dumps(answer).encode(), "application/json")
        return status

    def _get(self) -> dict[str, Any]:
        if self.path == "/health":
            return {"status": "ok"}
        self._authorise()
        if self.path == "/v1/models":
            model = {"id": self.server.chat.name, "object": "model", "created": 0, "owned_by": "firm"}
            return {"object": "list", "data": [model]}
        raise Refused(404, "not_found_error", f"no such path: {self.path}")

    def _post(self) -> dict[str, Any]:
        self._authorise()
        if self.path != "/v1/chat/completions":
            raise Refused(404, "not_found_error", f"no such path: {self.path}")
        request, chat = self._body(), self.server.chat
        model = request.get("model") or chat.name
        if model != chat.name:
            raise Refused(404, "not_found_error", f"the model {model!r} is not served here, only {chat.name!r}")
        for name, supported in _UNSUPPORTED.items():
            if request.get(name) not in supported:
                raise _invalid(f"{name}={request[name]!r} is not supported")
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or MAX_TOKENS
        if type(limit) is not int or limit < 1:
            raise _invalid(f"max_tokens must be a positive whole number, got {limit!r}")
        temperature = request.get("temperature") or 0.0
        if type(temperature) not in (int, float) or not (math.isfinite(temperature) and temperature >= 0):
            raise _invalid(f"temperature must be a number from 0 on, got {temperature!r}")
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _invalid("messages must be a list of at least one message")
        try:
            reply = chat.complete(messages, max_tokens=limit, temperature=temperature, seed=request.get("seed"))
        except RequestFailed as error:
            raise _invalid(error.detail) from error
        except UserError as error:
            raise Refused(503, "server_error", str(error)) from error
        except Exception as error:  # one request must not take the server down; the caller sees what happened
            raise Refused(500, "server_error", f"{type(error).__name__}: {error}") from error
        return _completion(str(model), messages, reply)

    def _authorise(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise Refused(401, "authentication_error", "the bearer token is missing or wrong")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _invalid("the request has no Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise Refused(413, "invalid_request_error", f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _invalid(f"the body is not JSON: {error}") from None
        if not isinstance(request, dict):
            raise _invalid("the body is not a JSON object")
        return request

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.close_connection = self.close_connection or self.server.stopping
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _invalid(message: str) -> Refused:
    return Refused(400, "invalid_request_error", message)


def _completion(model: str, messages: list[dict[str, Any]], reply: Reply) -> dict[str, Any]:
    # Roughly, at four characters a token: not every chat has a tokenizer, but clients keep budgets by these numbers.
    asked = sum(len(str(part.get("text", ""))) for message in messages for part in _parts(message)) // 4
    told = len(reply.text) // 4
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "length" if reply.truncated else "stop"}],
        "usage": {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told},
    }


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"text": content}] if isinstance(content, str) else content or []
