"""What the chat server promises whatever the chat: limits, many callers at once, an end in time, metrics of its own."""

import contextlib
import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import pytest

from firm.chat.messages import Reply
from firm.chat.server import ChatServer
from firm.config.serve import ServerLimits

PATH = "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "well?"}]}).encode()
ASKED = b"POST %s HTTP/1.1\r\nHost: any\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(QUESTION))

IMPATIENT = ServerLimits(stall_s=0.2)  # uvicorn looks once a second


class Says:
    """Answers with what it was made with."""

    name = "says"

    def __init__(self, text: str = "this") -> None:
        self.text = text

    def complete(self, *_: object, **__: object) -> Reply:
        return Reply(self.text)


class Blocks(Says):
    """Answers once told; counts who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.asked = threading.Event(), threading.Semaphore(0)

    def complete(self, *_: object, **__: object) -> Reply:
        self.asked.release()
        assert self.go.wait(60)
        return Reply(self.text)


def connect(chat_server: ChatServer, address: str = "127.0.0.1") -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", chat_server.port, timeout=20, source_address=(address, 0))


def answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def ask(chat_server: ChatServer, method: str = "POST", path: str = PATH, **headers: str) -> tuple[int, Any]:
    connection = connect(chat_server)
    connection.request(method, path, QUESTION if method == "POST" else None, headers)
    return answer(connection)


def sample(chat_server: ChatServer, name: str, **labels: str) -> float | None:
    return chat_server.registry.get_sample_value(name, labels)


def chunked(chat_server: ChatServer, chunks: Iterator[bytes]) -> socket.socket:
    """Send a body of unknown length until the server answers or the body ends; returns the connection."""
    connection = socket.create_connection(("127.0.0.1", chat_server.port), timeout=20)
    connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: any\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    connection.setblocking(False)
    for chunk in chunks:
        left = b"%x\r\n%s\r\n" % (len(chunk), chunk)
        while left:
            try:
                left = left[connection.send(left) :]
            except BlockingIOError:
                time.sleep(0.001)
        try:
            if connection.recv(1, socket.MSG_PEEK):
                break
        except BlockingIOError:
            continue
    connection.settimeout(20)
    return connection


# ---- limits


def test_a_body_without_a_length_is_read_to_its_end() -> None:
    chat_server = ChatServer(Says())
    with chat_server.running(), chunked(chat_server, iter([QUESTION[:9], QUESTION[9:]])) as connection:
        connection.sendall(b"0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["choices"][0]["message"]["content"]) == (200, "this")


def test_a_body_without_a_length_and_an_end_is_refused_at_the_limit() -> None:
    chat_server = ChatServer(Says(), limits=ServerLimits(max_body_bytes=2**20))
    with chat_server.running(), chunked(chat_server, repeat(b"[" * 2**16)) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.loads(response.read())["error"]
    assert (response.status, error["type"]) == (413, "invalid_request_error")
    assert "larger than 1048576 bytes" in error["message"]
    assert sample(chat_server, "firm_requests_total", code="413") == 1


def test_a_body_as_large_as_the_limit_is_taken() -> None:
    chat_server = ChatServer(Says(), limits=ServerLimits(max_body_bytes=len(QUESTION)))
    with chat_server.running():
        assert ask(chat_server)[0] == 200
    chat_server = ChatServer(Says(), limits=ServerLimits(max_body_bytes=len(QUESTION) - 1))
    with chat_server.running():
        status, refusal = ask(chat_server)
        assert (status, refusal["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize(
    "sent",
    [[], [b"POST /v1"], [ASKED], [ASKED + QUESTION[:9]], [ASKED + QUESTION], [ASKED + QUESTION, b"POST /v1"]],
    ids=["nothing", "half a head", "no body", "half a body", "one request", "half a second head"],
)
def test_a_caller_that_stalls_is_dropped_quietly(sent: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    chat_server = ChatServer(Says(), limits=IMPATIENT)
    with chat_server.running(), socket.create_connection(("127.0.0.1", chat_server.port), timeout=20) as connection:
        heard = b""
        for part in sent:
            connection.sendall(part)
            heard += connection.recv(2**16) if QUESTION in part else b""
        heard += rest(connection)
        until(lambda: sample(chat_server, "firm_requests_in_progress") == 0)
        assert ask(chat_server)[0] == 200
    assert heard.count(b"HTTP/1.1 200 OK") == b"".join(sent).count(QUESTION)
    assert not caplog.records


def test_a_caller_that_takes_no_answers_is_dropped() -> None:
    size, times = 2**22, 8
    chat_server = ChatServer(Says("x" * size), limits=IMPATIENT)
    with chat_server.running(), socket.create_connection(("127.0.0.1", chat_server.port), timeout=20) as connection:
        connection.sendall((ASKED + QUESTION) * times)
        time.sleep(4)
        assert len(rest(connection)) < 2 * size


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    heard = []
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(2**20):
            heard.append(more)
    return b"".join(heard)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_caller_that_waits_for_a_slow_answer_is_kept() -> None:
    chat = Blocks()
    chat_server = ChatServer(chat, limits=IMPATIENT)
    with chat_server.running(), ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(ask, chat_server)
        assert chat.asked.acquire(timeout=10)
        time.sleep(3)
        chat.go.set()
        assert waiting.result(10)[0] == 200


# ---- many callers


def test_two_hundred_callers_are_asked_at_once_and_probes_are_answered_meanwhile() -> None:
    chat, many = Blocks(), 200
    chat_server = ChatServer(chat)

    def ask_from(caller: int) -> int:
        connection = connect(chat_server, f"127.0.0.{2 + caller % 2}")
        connection.request("POST", PATH, QUESTION)
        return answer(connection)[0]

    with chat_server.running(), ThreadPoolExecutor(many) as executor:
        answers = [executor.submit(ask_from, caller) for caller in range(many)]
        try:
            for _ in range(many):
                assert chat.asked.acquire(timeout=30)
            assert sample(chat_server, "firm_requests_in_progress") == many
            assert ask(chat_server, "GET", "/health") == (200, {"status": "ok"})
        finally:
            chat.go.set()
        assert {future.result(30) for future in answers} == {200}
    assert sample(chat_server, "firm_requests_total", code="200") == many


def test_a_refused_body_is_not_taken_for_the_next_request() -> None:
    chat_server = ChatServer(Says(), token="secret")
    with chat_server.running():
        connection = connect(chat_server)
        connection.request("POST", PATH, b"GET /health HTTP/1.1\r\n\r\n" * 9999)
        assert answer(connection)[0] == 401
        connection.request("POST", PATH, QUESTION, {"Authorization": "Bearer secret"})
        assert answer(connection)[0] == 200


# ---- the end


def test_a_stop_waits_for_no_idle_caller() -> None:
    chat_server = ChatServer(Says())
    with ThreadPoolExecutor(1) as executor:
        serving = executor.submit(chat_server.serve, 60)
        connection = connect(chat_server)
        connection.request("POST", PATH, QUESTION)
        assert answer(connection)[0] == 200
        chat_server.stop()
        serving.result(10)
        assert connection.sock.recv(1) == b""


def test_after_the_time_of_grace_callers_are_told_to_come_again() -> None:
    chat = Blocks()
    chat_server = ChatServer(chat)
    with ThreadPoolExecutor(2) as executor:
        serving, waiting = executor.submit(chat_server.serve, 0.1), executor.submit(ask, chat_server)
        assert chat.asked.acquire(timeout=10)
        chat_server.stop()
        serving.result(10)
        chat.go.set()
        assert waiting.result(10) == (503, {"error": {"message": "the server stops", "type": "server_error"}})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_chat_that_hangs_does_not_keep_the_process(number: signal.Signals) -> None:
    code = f"""
import signal, time
from firm.chat.server import ChatServer

class Hangs:
    name = "hangs"
    def complete(self, *_, **__):
        print("asked", flush=True)
        time.sleep(1000)

server = ChatServer(Hangs())
signal.signal({number.value}, server.stop)
print(server.port, flush=True)
server.serve(grace_s=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=20) as connection:
            connection.sendall(ASKED + QUESTION)
            assert process.stdout.readline() == "asked\n"
            process.send_signal(number)
            assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()


# ---- forms


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("GET", PATH, 405), ("PUT", PATH, 405)])
def test_every_refusal_is_an_error_of_the_protocol(method: str, path: str, status: int) -> None:
    chat_server = ChatServer(Says())
    with chat_server.running():
        given, refusal = ask(chat_server, method, path)
        assert given == status
        assert refusal["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_the_key_guards_what_the_chat_is_asked_and_not_the_probes() -> None:
    chat_server = ChatServer(Says(), token="sécret")
    with chat_server.running():
        for wrong in ({}, {"Authorization": "sécret"}, {"Authorization": "Bearer sécre"}, {"Authorization": "Bearer "}):
            assert ask(chat_server, "GET", "/v1/models", **wrong)[0] == 401
            assert ask(chat_server, **wrong)[0] == 401
        assert ask(chat_server, Authorization="Bearer sécret")[0] == 200
        assert ask(chat_server, "GET", "/health")[0] == 200
        connection = connect(chat_server)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200


def test_any_text_of_the_chat_is_sent() -> None:
    chat_server = ChatServer(Says("\ud800 \0 é"))
    with chat_server.running():
        assert ask(chat_server)[1]["choices"][0]["message"]["content"] == "\ufffd \0 é"


def test_servers_count_for_themselves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other = ChatServer(Says(), gauges={"firm_queue_length": lambda: 3}), ChatServer(Says())
    with one.running(), other.running():
        assert ask(one)[0] == ask(one)[0] == ask(other)[0] == 200
        connection = connect(one)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        lines = response.read().decode().splitlines()
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    names = [line.split()[0] for line in lines if not line.startswith("#")]
    assert names == [
        'firm_requests_total{code="200"}', "firm_request_seconds_count", "firm_request_seconds_sum",
        "firm_requests_in_progress", "firm_queue_length",
    ]  # fmt: skip
    assert 'firm_requests_total{code="200"} 2.0' in lines and "firm_queue_length 3.0" in lines
    assert sample(other, "firm_requests_total", code="200") == 1
    assert not caplog.records, "thousands of requests a run: nothing is logged"
