"""Messages and in-process judges; the endpoint's client is tested over real HTTP in tests/integration."""

import base64
import textwrap
from pathlib import Path

import pytest

from firm.chat.client import EndpointClient, PythonClient, open_chat
from firm.chat.messages import Reply, RequestFailed, user_message
from firm.config import EndpointChat, PythonChat
from firm.critics.answers import parse_answer
from firm.records import Judgement, UserError

PNG = b"\x89PNG\r\n\x1a\nrest"
OPTIONS = {"max_tokens": 8, "temperature": 0.0, "seed": 1}

MODULE = """
class Judge:
    def complete(self, messages, *, max_tokens=1024, temperature=0.0, seed=None):
        text = messages[0]["content"][-1]["text"]
        if text == "refuse":
            raise ValueError("an unknown prompt")
        if text == "number":
            return 4
        if text == "reply":
            from firm.chat.client import Reply
            return Reply("cut", True)
        return f"{text} {max_tokens} {temperature} {seed}"

class Mute:
    pass

class Broken:
    def __init__(self, argument):
        pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_judge_of_mine.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return "a_judge_of_mine"


def test_user_message_has_the_images_before_the_text() -> None:
    message = user_message("which is better", [PNG, PNG + b"2"])
    assert message["role"] == "user"
    *images, text = message["content"]
    assert text == {"type": "text", "text": "which is better"}
    url = images[1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,") and base64.b64decode(url.partition(",")[2]) == PNG + b"2"
    with pytest.raises(ValueError, match="PNG"):
        user_message("x", [b"\xff\xd8\xff jpeg"])


def test_a_python_judge(module: str) -> None:
    chat = open_chat(PythonChat(target=f"{module}:Judge"))
    assert isinstance(chat, PythonClient) and chat.name == f"{module}:Judge"
    assert chat.complete([user_message("hello")], **OPTIONS) == Reply("hello 8 0.0 1")  # type: ignore[arg-type]
    assert chat.complete([user_message("reply")], **OPTIONS) == Reply("cut", True)  # type: ignore[arg-type]
    for text, match in (("refuse", "an unknown prompt"), ("number", "returned int")):
        with pytest.raises(RequestFailed, match=match):
            chat.complete([user_message(text)], **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Missing", "Mute", "Broken", ""])
def test_a_python_judge_that_is_none(module: str, name: str) -> None:
    with pytest.raises(UserError, match="judge") as error:
        open_chat(PythonChat(target=f"{module}:{name}"))
    assert error.value.exit_code == 2


@pytest.mark.parametrize("target", ["no.such.module:Judge", "nodots", ":Judge", ""])
def test_a_wrong_dotted_name(target: str) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        open_chat(PythonChat(target=target))


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://host/v1", "http://host:port/v1"])
def test_a_wrong_url(url: str) -> None:
    with pytest.raises(UserError, match="URL") as error:
        open_chat(EndpointChat(base_url=url, model="m"))
    assert error.value.exit_code == 2


def test_a_key_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "a\nb")
    with pytest.raises(UserError, match="MY_KEY"):
        EndpointClient(EndpointChat(base_url="http://host/v1", model="m", api_key_env="MY_KEY"))


def test_half_a_surrogate_pair_does_not_get_into_files() -> None:
    outcome = parse_answer(Reply("It is \ud83d red. \\boxed{4}").text, "boxed")
    assert isinstance(outcome, Judgement) and outcome.rationale == "It is \ufffd red."
    assert Judgement.model_validate_json(outcome.model_dump_json()) == outcome
