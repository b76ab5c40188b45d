"""The teacher over real HTTP."""

import base64
import http.client
import io
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from firm.config.serve import ServerLimits
from firm.shapes import generation, serve, teacher


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve.teacher_server().running() as base:
        yield base


def request(url: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def rating_request(prompt: str) -> tuple[dict, int]:
    """Returns a request about candidate 0 and the score it should get."""
    _, image = generation.candidate(0, 0, "train")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "text", "text": f"<START OF PROMPT>\n{prompt}\n<END OF PROMPT>"},
        {"type": "image_url", "image_url": {"url": data}},
    ]
    body = {
        "model": "pixel-teacher",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 512,
        "temperature": 0,
    }
    return body, teacher.instruction_following("a red circle", image)


def test_health_and_models(url: str) -> None:
    assert url.endswith("/v1")
    assert request(url, "GET", "/health") == (200, {"status": "ok"})
    status, answer = request(url, "GET", "/v1/models")
    assert (status, answer["data"][0]["id"]) == (200, "pixel-teacher")


def test_a_completion_has_the_standard_form(url: str) -> None:
    body, score = rating_request("a red circle")
    status, answer = request(url, "POST", "/v1/chat/completions", body)
    assert status == 200
    assert (answer["object"], answer["model"]) == ("chat.completion", "pixel-teacher")
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["message"]["role"]) == ("stop", "assistant")
    assert choice["message"]["content"].endswith(f"\\boxed{{{score}}}")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        ([], "not a JSON object"),
        ({}, "messages must be"),
        ({"messages": "hello"}, "messages must be"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{}], "stream": True}, "stream=True is not supported"),
        ({"messages": [{}], "n": 2}, "n=2 is not supported"),
        ({"messages": [{}], "max_tokens": 0.5}, "max_tokens must be"),
        ({"messages": [{}], "temperature": -1}, "temperature must be"),
        ({"messages": [{"role": "user", "content": [None]}]}, "content part"),
        (rating_request("a cat")[0], "does not know the prompt 'a cat'"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(url: str, body: object, complaint: str) -> None:
    status, answer = request(url, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert complaint in answer["error"]["message"]


def test_unknown_paths_are_not_found(url: str) -> None:
    assert request(url, "GET", "/v2")[0] == 404
    assert request(url, "POST", "/v1/completions", {})[0] == 404


def test_a_body_too_large_is_refused_unread(url: str) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(ServerLimits().max_body_bytes + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_another_model_is_not_found(url: str) -> None:
    status, answer = request(url, "POST", "/v1/chat/completions", {"model": "gpt", "messages": []})
    assert status == 404 and "only 'pixel-teacher'" in answer["error"]["message"]


def test_with_a_token_only_its_bearer_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRM_TEACHER_TOKEN", "secret")
    body, _ = rating_request("a red circle")
    with serve.teacher_server().running() as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status, answer = request(url, "POST", "/v1/chat/completions", body, **headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert request(url, "POST", "/v1/chat/completions", body, Authorization="Bearer secret")[0] == 200
        assert request(url, "GET", "/health")[0] == 200
