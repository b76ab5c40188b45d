"""Serves the teacher over HTTP in the OpenAI protocol: `python -m firm.shapes.serve --port 8000`.

With FIRM_TEACHER_TOKEN in the environment, requests must carry it as bearer token.
"""

import argparse
import hmac
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from firm.shapes.teacher import PixelTeacher

MODEL = "pixel-teacher"
MAX_BODY_BYTES = 20 * 2**20


class _Refused(Exception):
    """A request the server answers with an error status."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def serve(host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until interrupted; binds to this machine only unless told otherwise."""
    with _server(host, port) as server:
        server.serve_forever()


@contextmanager
def running_server(host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on a free port in the background; yields the base URL, "http://127.0.0.1:PORT/v1"."""
    with _server(host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def _server(host: str, port: int) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((host, port), _Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; a client that stalls must not hold its thread for ever
    teacher = PixelTeacher()

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet: curation makes thousands of requests."""

    def _respond(self, route: Callable[[], dict[str, Any]]) -> None:
        try:
            status, answer = 200, route()
        except _Refused as error:
            status, answer = error.status, {"error": {"message": str(error), "type": error.kind}}
            self.close_connection = True  # the body may not have been read: the connection cannot be used again
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _get(self) -> dict[str, Any]:
        if self.path == "/health":
            return {"status": "ok"}
        self._authorise()
        if self.path == "/v1/models":
            return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "firm"}]}
        raise _Refused(404, "not_found_error", f"no such path: {self.path}")

    def _post(self) -> dict[str, Any]:
        self._authorise()
        if self.path != "/v1/chat/completions":
            raise _Refused(404, "not_found_error", f"no such path: {self.path}")
        request = self._body()
        try:
            answer = self.teacher.complete(request["messages"])
        except KeyError:
            raise _Refused(400, "invalid_request_error", "the request has no 'messages'") from None
        except ValueError as error:
            raise _Refused(400, "invalid_request_error", str(error)) from None
        return _completion(str(request.get("model") or MODEL), request["messages"], answer)

    def _authorise(self) -> None:
        token = os.environ.get("FIRM_TEACHER_TOKEN")
        given = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise _Refused(401, "authentication_error", "the bearer token is missing or wrong")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(400, "invalid_request_error", "the request has no Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise _Refused(413, "invalid_request_error", f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "invalid_request_error", f"the body is not JSON: {error}") from None
        if not isinstance(request, dict):
            raise _Refused(400, "invalid_request_error", "the body is not a JSON object")
        return request


def _completion(model: str, messages: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    # Roughly, at four characters a token: the teacher has no tokenizer, but clients keep budgets by these numbers.
    asked = sum(len(str(part.get("text", ""))) for m in messages for part in _parts(m)) // 4
    told = len(answer) // 4
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told},
    }


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"text": content}] if isinstance(content, str) else content or []


def main() -> None:
    """Serves on the command line's host and port."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve(arguments.host, arguments.port)


if __name__ == "__main__":
    main()
