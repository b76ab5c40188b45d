"""The endpoint's client against a real local HTTP server that behaves badly in every way we know of."""

import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from shared import HTTPRequest, serving

from firm.chat.client import EndpointClient, open_chat
from firm.chat.messages import Reply, RequestFailed, user_message
from firm.config import EndpointChat
from firm.critics.judge import ChatJudge, JudgeInput
from firm.records import Invalid, Judgement, Prompt, UserError

PNG = b"\x89PNG\r\n\x1a\n"
Step = Callable[[HTTPRequest], None]


def completion(text: Any, finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


class Server:
    """Answers with the next step of a script; the last one is repeated."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.script: list[Step] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = ""

    def __call__(self, request: HTTPRequest) -> None:
        with self.lock:
            self.requests.append((request.path, dict(request.headers), json.loads(request.body)))
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        step(request)

    def client(self, *script: Step, max_failures: int = 20, **config: Any) -> EndpointClient:
        self.script[:] = script
        settings = {"base_url": self.url, "model": "m", "timeout_s": 0.5, "deadline_s": 2.0, **config}
        return EndpointClient(EndpointChat(**settings), max_failures=max_failures, first_wait_s=0.01)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    with serving(made) as url:
        made.url = f"{url}/v1"
        yield made


@pytest.fixture(autouse=True)
def no_test_takes_long() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 5


def ok(text: Any = "\\boxed{4}", finish: str = "stop") -> Step:
    return lambda request: request.reply(200, completion(text, finish))


def status(code: int, body: bytes = b'{"error": "overloaded"}', **headers: str) -> Step:
    return lambda request: request.reply(code, body, **headers)


def raw(body: bytes) -> Step:
    return lambda request: request.reply(200, body)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "critic.invalid"])
def test_this_machine_is_asked_past_a_proxy_and_others_are_not(
    server: Server, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.delenv("NO_PROXY")
    with serving(lambda request: request.reply(200, completion(f"by proxy: {request.path}"))) as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy)
        client = server.client(ok("here"), base_url=server.url.replace("127.0.0.1", host))
        said = ask(client).text
        client.close()
    assert said == (f"by proxy: {client.url}" if host == "critic.invalid" else "here")


def hang(_: HTTPRequest) -> None:
    time.sleep(1.2)


def drop(request: HTTPRequest) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


def drip(request: HTTPRequest) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(12):
        request.wfile.write(b" ")
        time.sleep(0.1)


def endless(first: bytes, again: bytes, pause_s: float = 0.0) -> Step:
    """Sends bytes and then others without end, as fast as they are read or with a pause between them."""

    def step(request: HTTPRequest) -> None:
        with contextlib.suppress(OSError):
            request.wfile.write(first)
            while True:
                request.wfile.write(again)
                time.sleep(pause_s)

    return step


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n"
EMPTY_BLOCKS = b"\x00\x00\x00\xff\xff" * 13  # of deflate: nothing comes out, and the stream goes on
ENDLESS = {
    "status": endless(b"HTTP/1.1 200 ", b"O", 0.02),
    "headers": endless(OK, b"X: y\r\n", 0.02),
    "a flood of headers": endless(OK, b"X: y\r\n" * 1000),
    "informational": endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.02),
    "a flood of informational": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "body": endless(OK + b"\r\n", b" ", 0.02),
    "chunks": endless(CHUNKED + b"\r\n", b"1;extension=x\r\n \r\n", 0.02),
    "trailers": endless(CHUNKED + b"\r\n0\r\n", b"X: y\r\n", 0.02),
    "deflate": endless(CHUNKED + b"Content-Encoding: deflate\r\n\r\n", b"41\r\n" + EMPTY_BLOCKS + b"\r\n", 0.02),
}


def ask(client: EndpointClient, text: str = "how good is it") -> Reply:
    return client.complete([user_message(text, [PNG])], max_tokens=7, temperature=0.5, seed=3)


def test_the_request_and_a_good_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRM_KEY", "secret\n")
    assert ask(server.client(ok("fine"), api_key_env="FIRM_KEY")) == Reply("fine", truncated=False)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "m",
        "messages": [user_message("how good is it", [PNG])],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
    }


def test_without_a_key_none_is_sent(server: Server) -> None:
    ask(server.client(ok()))
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    ("content", "finish", "expected"),
    [
        ("cut of", "length", Reply("cut of", truncated=True)),
        (None, "stop", Reply("")),
        ([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}], "stop", Reply("in parts")),
    ],
)
def test_unusual_answers(server: Server, content: Any, finish: str, expected: Reply) -> None:
    assert ask(server.client(ok(content, finish))) == expected


@pytest.mark.parametrize(
    "script",
    [
        (status(500), status(500), ok()),
        (status(502, b"<html>bad gateway</html>"), status(503), status(408), ok()),
        (status(429), ok()),
        (drop, drop, ok()),
        (hang, ok()),
        (drip, ok()),
    ],
    ids=["500", "other", "429", "dropped", "hangs", "drips"],
)
def test_what_passes_is_tried_again(server: Server, script: tuple[Step, ...]) -> None:
    assert ask(server.client(*script)) == Reply("\\boxed{4}")
    assert len(server.requests) == len(script)


def test_retry_after_is_honoured(server: Server) -> None:
    start = time.monotonic()
    ask(server.client(status(429, Retry_After="1"), ok()))
    assert 1 <= time.monotonic() - start < 2


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 2015 07:28:00"])
def test_a_senseless_retry_after_is_ignored(server: Server, value: str) -> None:
    assert ask(server.client(status(429, Retry_After=value), ok())) == Reply("\\boxed{4}")


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(server: Server) -> None:
    start = time.monotonic()
    with pytest.raises(RequestFailed, match="status 429"):
        ask(server.client(status(429, Retry_After="3600")))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("step", [status(500), hang, drip, drop], ids=["500", "hangs", "drips", "drops"])
def test_the_deadline_holds(server: Server, step: Step) -> None:
    start = time.monotonic()
    with pytest.raises(RequestFailed, match=r"gave up after 1 s") as error:
        ask(server.client(step, deadline_s=1.0))
    assert time.monotonic() - start < 1.6 and not error.value.retryable


@pytest.mark.parametrize("name", ENDLESS)
def test_the_deadline_holds_whatever_never_ends(server: Server, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestFailed, match=r"gave up after 0\.4 s"):
        ask(server.client(ENDLESS[name], deadline_s=0.4))
    assert time.monotonic() - start < 3  # a flood must be parsed before it can be left
    assert ask(server.client(ok())).text == "\\boxed{4}", "others are not harmed"


@pytest.mark.parametrize("times", [1, 2])
def test_an_encoding_that_was_not_asked_for_is_refused(server: Server, times: int) -> None:
    bomb, encoding = completion(" " * 10**7), ", ".join(["gzip"] * times)
    for _ in range(times):
        bomb = gzip.compress(bomb)
    tracemalloc.start()
    with pytest.raises(RequestFailed, match=f"encoding .*{encoding}"):
        ask(server.client(lambda request: request.reply(200, bomb, Content_Encoding=encoding)))
    assert server.requests[0][1]["Accept-Encoding"] == "identity"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("max_tokens", "logprobs", "size"), [(7, False, 2**17), (7, True, 2**17), (4096, False, 2**20)]
)
def test_an_answer_has_the_size_that_max_tokens_allows(
    server: Server, max_tokens: int, logprobs: bool, size: int
) -> None:
    client = server.client(raw(completion("x" * size)), ok("x" * (size // 2)), logprobs=logprobs)
    with pytest.raises(RequestFailed, match="larger than .* more than max_tokens allows") as error:
        client.complete([user_message("x")], max_tokens=max_tokens, temperature=0, seed=None)
    assert not error.value.retryable
    assert len(client.complete([user_message("x")], max_tokens=max_tokens, temperature=0, seed=None).text) == size // 2


def test_of_a_larger_answer_no_more_is_kept(server: Server) -> None:
    huge = completion("x" * 15 * 10**6)
    client = server.client(lambda request: request.reply(200, huge))
    tracemalloc.start()
    with pytest.raises(RequestFailed, match="larger than"):
        ask(client)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_error_of_any_size_is_tried_again(server: Server) -> None:
    assert ask(server.client(status(503, b"<html>\x1b[31m" + b" " * 10**6), ok())).text == "\\boxed{4}"
    with pytest.raises(RequestFailed, match=r"status 400: a\\x00\\x1b\[31m b$"):  # nothing that a terminal obeys
        ask(server.client(status(400, b"a\x00\x1b[31m\r\nb")))


@pytest.mark.parametrize("address", ["foo:bar", "http://xn--/", "http://[", "/again"])
def test_a_redirect_is_a_failed_request(server: Server, address: str) -> None:
    with pytest.raises(RequestFailed, match=r"status 302|impossible address"):
        ask(server.client(status(302, Location=address)))


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}',
     b'{"choices": [{"message": {"content": 4}}]}', b'{"choices": [{"message": {"content": [1]}}]}', b"[" * 60_000,
     b"\xff\xfe"],
)  # fmt: skip
def test_a_malformed_answer_is_a_failed_request(server: Server, body: bytes) -> None:
    with pytest.raises(RequestFailed, match="not a chat completion") as error:
        ask(server.client(raw(body)))
    assert error.value.retryable and len(server.requests) == 1 and len(error.value.detail) < 500


@pytest.mark.parametrize("code", [400, 413, 422, 307])
def test_a_refused_request_is_not_sent_again(server: Server, code: int) -> None:
    with pytest.raises(RequestFailed, match=f"status {code}: too long"):
        ask(server.client(status(code, b"too long")))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "fix"), [(401, "environment variable FIRM_KEY"), (403, "FIRM_KEY"), (404, "check base_url")]
)
def test_a_refused_key_or_a_wrong_address_ends_the_run(
    server: Server, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    monkeypatch.setenv("FIRM_KEY", "secret")
    with pytest.raises(UserError, match=fix) as error:
        ask(server.client(status(code), api_key_env="FIRM_KEY"))
    assert server.url in str(error.value) and "secret" not in str(error.value) and len(server.requests) == 1


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    client = open_chat(EndpointChat(base_url=url, model="m", deadline_s=0.7))
    with pytest.raises(UserError, match="cannot be reached") as error:
        client.complete([user_message("x")], max_tokens=1, temperature=0, seed=None)
    assert url in str(error.value) and "start the server" in str(error.value)


AWAY = {"starts": status(503), "drops": drop, "hangs": hang}


@pytest.mark.parametrize("name", AWAY)
def test_a_server_that_answers_nobody_is_waited_for_beyond_deadlines(server: Server, name: str) -> None:
    script = [AWAY[name]] * 6
    options = {"deadline_s": 0.1, "timeout_s": 0.2}
    with pytest.raises(RequestFailed, match="gave up"):
        ask(server.client(*script, ok(), **options))
    assert ask(server.client(*script, ok(), patience_s=60, **options)).text == "\\boxed{4}"


@pytest.mark.parametrize("name", AWAY)
def test_a_server_that_answers_nobody_for_too_long_ends_the_run(server: Server, name: str) -> None:
    client = server.client(AWAY[name], deadline_s=0.3, timeout_s=0.2, patience_s=1)
    with pytest.raises(UserError, match=r"answered nobody for \d s") as error:
        ask(client)
    assert server.url in str(error.value) and "to resume" in str(error.value)


def test_patience_is_no_second_deadline_for_what_the_server_does_not_answer_alone(server: Server) -> None:
    """Others are answered meanwhile: this one is lost, and nobody waits for it."""

    def step(request: HTTPRequest) -> None:
        hang(request) if b"slow" in request.body else ok()(request)

    client = server.client(step, deadline_s=0.6, timeout_s=0.2, patience_s=60)
    with ThreadPoolExecutor(1) as executor:
        slow = executor.submit(client.complete, [user_message("slow")], max_tokens=1, temperature=0, seed=None)
        while not slow.done():
            ask(client)
    with pytest.raises(RequestFailed, match=r"gave up after 0\.6 s"):
        slow.result()


def test_a_server_that_fails_every_request_is_given_up(server: Server) -> None:
    client = server.client(status(400, b"no such option"), max_failures=3)
    for _ in range(2):
        with pytest.raises(RequestFailed):
            ask(client)
    for _ in range(2):  # it stays given up
        with pytest.raises(UserError, match="fails every request"):
            ask(client)
    assert len(server.requests) == 3


def test_one_good_answer_resets_the_count_of_failures(server: Server) -> None:
    client = server.client(status(400), status(400), ok(), status(400), status(400), ok(), max_failures=3)
    outcomes = []
    for _ in range(6):
        try:
            outcomes.append(ask(client).text)
        except RequestFailed:
            outcomes.append("failed")
    assert outcomes == ["failed", "failed", "\\boxed{4}"] * 2


def test_a_judge_over_http(server: Server) -> None:
    """Every kind of trouble in one run: outcomes are scores or reasons, in the order of the items."""
    client = server.client(
        ok("\\boxed{4}"), status(500), ok("\\boxed{2}"), raw(b"{}"), ok("hm"), ok("\\boxed{9}"),
        status(400, b"bad image"), ok("so far", "length"), ok(""), ok("still cut", "length"), ok("\\boxed{1}"),
    )  # fmt: skip
    judge = ChatJudge(client, {"instruction_following": "short_instruction_following"})
    rows = judge.judge([JudgeInput(Prompt(text=f"item {i}"), [PNG]) for i in range(6)])
    outcomes = [row["instruction_following"] for row in rows]
    assert [o.score if isinstance(o, Judgement) else o.reason for o in outcomes] == [
        4, 2, "out_of_range", "request_failed", "truncated", 1,
    ]  # fmt: skip
    failed = outcomes[3]
    assert isinstance(failed, Invalid) and "bad image" in failed.detail


def test_many_requests_in_flight(server: Server) -> None:
    def slow(request: HTTPRequest) -> None:
        time.sleep(0.1)
        ok()(request)

    judge = ChatJudge(server.client(slow, concurrency=8), {"quality": "short_quality"}, concurrency=8)
    start = time.monotonic()
    rows = judge.judge([JudgeInput(Prompt(text="x"), [PNG])] * 32)
    assert rows == [{"quality": Judgement(score=4)}] * 32 and time.monotonic() - start < 1.6
