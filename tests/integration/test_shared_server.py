"""A critic server that many share: what one caller sends or leaves harms nobody else."""

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from shared import CPU
from typer.main import get_command

from firm.chat.key import read_key
from firm.chat.messages import Reply, user_message
from firm.chat.server import ChatServer
from firm.cli import app
from firm.config import CriticConfig
from firm.config.serve import QuestionLimits, ServerLimits
from firm.critics.batching import BatchingChat
from firm.critics.local import LocalCritic
from firm.critics.serve import serve
from firm.images import encode_image
from firm.records import UserError
from firm.shapes.models import WEIGHTS
from firm.shapes.serve import teacher_server

PATH = "/v1/chat/completions"
GOOD, OTHER = "127.0.0.2", "127.0.0.3"  # two addresses of this machine: two callers
SMALL = encode_image(Image.new("RGB", (32, 32)))
MAIN = "from firm.cli import main; main()"
TINY = [str(WEIGHTS / "critic"), "--port", "0", "--dtype", "float32", "--served-model-name", "tiny"]


class Served(NamedTuple):
    """A `firm serve` of its own process."""

    port: int
    pid: int

    def peak_mib(self) -> float:
        """Most memory that it has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@contextlib.contextmanager
def firm_serve(*options: str) -> Iterator[Served]:
    command = [sys.executable, "-c", MAIN, "serve", *TINY, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("serving "))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Served(int(line.split()[3].rpartition(":")[2]), process.pid)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with firm_serve("--answer-style", "score_first") as found:
        assert post(found.port, question())[0] == 200
        yield found


def question(text: str = "quality", image: bytes = SMALL, **options: object) -> bytes:
    return json.dumps({"messages": [user_message(text, [image])], **options}).encode()


def post(port: int, body: bytes, address: str = GOOD, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120, source_address=(address, 0))
    connection.request("POST", PATH, body, headers)
    response = connection.getresponse()
    return response.status, {**json.loads(response.read()), "headers": response.headers}


def complaint(answer: dict[str, Any]) -> str:
    message: str = answer["error"]["message"]
    return message


def until(done: Any) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- one request's fault is its own


def test_an_image_that_the_processor_refuses_fails_alone(served: Served) -> None:
    narrow = encode_image(Image.new("RGB", (1, 300)))
    bodies = [question(str(i)) for i in range(7)]
    bodies.insert(3, question("bad", narrow))
    with ThreadPoolExecutor(8) as executor:
        for _ in range(3):
            answers = list(executor.map(lambda body: post(served.port, body), bodies))
            assert [status for status, _ in answers] == [200] * 3 + [400] + [200] * 4
            assert "aspect ratio" in complaint(answers[3][1])


def test_a_batch_that_fails_is_answered_one_by_one() -> None:
    critic = LocalCritic(
        WEIGHTS / "critic", CriticConfig(model="any", rubrics={}, answer_style="score_first", dtype="float32"), CPU
    )
    score = critic.score

    def fails(inputs: dict[str, torch.Tensor]) -> list[list[float]]:
        if inputs["attention_mask"].sum(1).max() > 100:
            raise RuntimeError("out of memory")
        return score(inputs)

    critic.score = fails  # type: ignore[method-assign, assignment]
    chat = BatchingChat("tiny", critic, patience_s=0.5)
    with ChatServer(chat).running() as url, ThreadPoolExecutor(4) as executor:
        port = int(url.split(":")[2].split("/")[0])
        bodies = [question(text) for text in ("red " * 40, "red " * 80, "red " * 41, "red " * 42)]
        answers = list(executor.map(lambda body: post(port, body), bodies))
        assert [status for status, _ in answers] == [200, 500, 200, 200] and chat.batches == 5
        assert complaint(answers[1][1]) == "RuntimeError: out of memory"


def png(size: tuple[int, int], mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def with_image(data: bytes) -> bytes:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "quality"}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def test_what_would_take_much_memory_or_time_is_refused_at_once(served: Served) -> None:
    bombs = {
        "more than 4194304": with_image(png((13_000, 13_000))),
        "more than 100000 values": b"[%s]" % (b"[]," * 6_000_000),
        "larger than 20971520 bytes": b"x" * (21 * 2**20),
        "characters, more than 65536": question("x " * 49_500),
        "tokens, with those of its images; 1024 may be": question("red " * 2000),
        "temperature must be 0 or": question(temperature=1e-45),
    }
    before = served.peak_mib()
    for reason, body in bombs.items():
        start = time.monotonic()
        with ThreadPoolExecutor(4) as executor:
            answers = list(executor.map(lambda body: post(served.port, body, OTHER), [body] * 4))
        assert {status for status, _ in answers} <= {400, 413} and all(reason in complaint(a) for _, a in answers)
        assert time.monotonic() - start < 5, reason
    assert served.peak_mib() - before < 400


def test_images_at_the_limit_take_bounded_memory(served: Served) -> None:
    before = served.peak_mib()
    with ThreadPoolExecutor(16) as executor:
        bodies = [with_image(png((2048, 2048), "RGB"))] * 16
        assert {status for status, _ in executor.map(lambda body: post(served.port, body), bodies)} == {200}
    assert served.peak_mib() - before < 400


# ---- callers that leave, or never come to the point


class Slow:
    """Stands for a LocalCritic that answers once told; ``asked`` are the questions that it was given."""

    def __init__(self) -> None:
        self.config = CriticConfig(model="any", rubrics={}, answer_style="score_first", batch_size=4)
        self.encoder = self
        self.max_tokens = 99
        self.go, self.asked = threading.Event(), list[str]()

    def questions(self, texts: list[str], _images: object) -> dict[str, Any]:
        return {"attention_mask": torch.ones(len(texts), 9, dtype=torch.long), "texts": texts}

    def score(self, inputs: dict[str, Any]) -> list[list[float]]:
        self.asked += [text.removeprefix("<image>") for text in inputs["texts"]]
        assert self.go.wait(30)
        return [[0.2] * 5] * len(inputs["texts"])


def test_the_work_of_callers_that_left_is_not_done() -> None:
    critic = Slow()
    chat = BatchingChat("slow", critic)  # type: ignore[arg-type]
    server = ChatServer(chat, at_once=32)
    with server.running(), ThreadPoolExecutor(2) as executor:
        first = executor.submit(post, server.port, question("first"))
        until(lambda: critic.asked == ["first"])
        left = []
        for number in range(12):
            left.append(socket.create_connection(("127.0.0.1", server.port), source_address=(OTHER, 0)))
            body = question(f"left {number}")
            left[-1].sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body)))
            left[-1].sendall(body)
        until(lambda: chat.waiting() == 8 and server.waiting() == 4)
        for connection in left:
            connection.close()
        until(lambda: server.waiting() == chat.waiting() == 0)
        last = executor.submit(post, server.port, question("last"))
        until(lambda: chat.waiting() == 1)
        critic.go.set()
        assert first.result(30)[0] == last.result(30)[0] == 200
    assert critic.asked == ["first", "last"]
    assert server.registry.get_sample_value("firm_requests_total", {"code": "499"}) == 12


def test_an_answer_is_not_written_to_its_end_for_a_caller_that_left() -> None:
    settings: dict[str, Any] = {"answer_style": "reason_first", "dtype": "float32", "max_new_tokens": 100_000}
    critic = LocalCritic(WEIGHTS / "critic", CriticConfig(model="any", rubrics={}, **settings), CPU)
    critic.model.generation_config.eos_token_id = None  # it goes on for ever
    chat = BatchingChat("endless", critic)
    with ChatServer(chat, at_once=8).running() as url:
        port = int(url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            body = question(max_tokens=100_000)
            connection.sendall(
                b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body))
            )
            connection.sendall(body)
            until(lambda: chat.batches == 1)
        status, answer = post(port, question(max_tokens=5))
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")


def test_connections_that_dribble_leave_room_for_others() -> None:
    server = ChatServer(Answers(), limits=ServerLimits(max_connections=60, max_client_connections=40, stall_s=0.5))
    with server.running(), contextlib.ExitStack() as stack:

        def connect(address: str) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", server.port), source_address=(address, 0))
            return stack.enter_context(connection)

        slow = [connect(OTHER) for _ in range(200)] + [connect("127.0.0.4") for _ in range(200)]
        for _ in range(20):
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(b"P")
            assert post(server.port, question())[0] == 200
            assert open_connections(server) <= 61
            time.sleep(0.1)
        until(lambda: open_connections(server) == 0)


def open_connections(server: ChatServer) -> int:
    return len(server._server.server_state.connections)


class Answers:
    """Answers at once, or once told; ``asked`` are the texts in the order in which they came."""

    name = "answers"

    def __init__(self, at_once: bool = True) -> None:
        self.go, self.asked = threading.Semaphore(10**9 if at_once else 0), list[str]()

    def complete(self, messages: Any, **_: object) -> Reply:
        self.asked.append(messages[0]["content"][1]["text"])
        assert self.go.acquire(timeout=30)
        return Reply("done")


# ---- the queue


def test_who_asks_much_waits_for_itself_and_gives_way_when_it_is_full() -> None:
    chat = Answers(at_once=False)
    server = ChatServer(chat, at_once=1, limits=ServerLimits(max_waiting=10))
    with server.running(), ThreadPoolExecutor(20) as executor:
        greedy = [executor.submit(post, server.port, question("greedy 0"), OTHER)]
        until(lambda: chat.asked)
        greedy += [executor.submit(post, server.port, question(f"greedy {i}"), OTHER) for i in range(1, 11)]
        until(lambda: server.waiting() == 10)
        status, answer = post(server.port, question("one too many"), OTHER)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(answer["headers"]["Retry-After"]) <= 30
        modest = [executor.submit(post, server.port, question("modest")) for _ in range(2)]
        until(lambda: sum(future.done() for future in greedy) == 2)
        assert [future.result()[0] for future in greedy if future.done()] == [429, 429]
        chat.go.release(100)
        assert {future.result(30)[0] for future in modest} == {200}
        assert sorted(future.result(30)[0] for future in greedy) == [200] * 9 + [429] * 2
    assert "modest" in chat.asked[1:3] and chat.asked.index("modest", chat.asked.index("modest") + 1) <= 4


@pytest.mark.parametrize(("trusted", "callers"), [("", 1), ("127.0.0.3", 5)])
def test_only_a_proxy_that_is_trusted_says_who_asks(
    trusted: str, callers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    server = ChatServer(Answers())
    with server.running():
        for number in range(5):
            assert post(server.port, question(), OTHER, **{"X-Forwarded-For": f"10.0.0.{number}"})[0] == 200
    assert len(server._turns._clients) == callers


# ---- who may ask


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_without_a_key_others_are_not_served_and_the_message_says_how(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="without a key, whoever reaches the address") as error:
        serve("no/such/model", host=host)  # at once, not after loading
    assert error.value.exit_code == 2 and f"--host {host}" in error.value.where
    assert "OPENAI_API_KEY" in error.value.fix and "--no-key" in error.value.fix
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert read_key(host, "OPENAI_API_KEY", optional=False) == "secret"
    assert read_key(host, "OPENAI_API_KEY", optional=True) == "secret"
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert read_key(host, "OPENAI_API_KEY", optional=True) == ""


@pytest.mark.parametrize(
    ("host", "key", "no_key", "served"),
    [
        ("127.0.0.1", "", False, True),
        ("127.1.2.3", "", False, True),
        ("localhost", "", False, True),
        ("0.0.0.0", "", False, False),
        ("0.0.0.0", "", True, True),
        ("0.0.0.0", "secret", False, True),
    ],
)
def test_the_teacher_is_served_to_others_as_the_critic_is(
    host: str, key: str, no_key: bool, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRM_TEACHER_TOKEN", key)
    with contextlib.nullcontext() if served else pytest.raises(UserError, match="FIRM_TEACHER_TOKEN"):
        assert teacher_server(host, no_key=no_key).port


def test_limits_are_options_and_a_wrong_one_is_named() -> None:
    with pytest.raises(UserError, match="--max-question-tokens") as error:
        serve(str(WEIGHTS / "critic"), limits={"max_question_tokens": 0})
    assert error.value.exit_code == 2
    options = {option.name for option in get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    limits = {*ServerLimits.model_fields, *QuestionLimits.model_fields}
    assert {name for name in options if name.startswith("max_")} - {"max_new_tokens", "max_pixels"} == limits & options
    defaults = {**ServerLimits().model_dump(), **QuestionLimits().model_dump()}
    assert all(p.default == defaults.get(p.name, p.default) for p in get_command(app).commands["serve"].params)  # type: ignore[attr-defined]


def test_a_critic_that_can_answer_nothing_is_named_before_it_is_served() -> None:
    with pytest.raises(UserError, match="cannot answer a small question: .* tokens, .* 3 may be"):
        serve(str(WEIGHTS / "critic"), dtype="float32", limits={"max_question_tokens": 3})
