"""The critic server over real HTTP: judges as the critic in this process does, in batches, and says what is wrong."""

import base64
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from shared import CPU, serving

from firm import preflight
from firm.chat.messages import Reply, RequestFailed, user_message
from firm.chat.server import ChatServer
from firm.config import CriticConfig, RunConfig
from firm.config.loading import load_config
from firm.critics.batching import BatchingChat
from firm.critics.judge import Judge, JudgeInput
from firm.critics.load import load_critic
from firm.critics.local import LocalCritic
from firm.critics.serve import model_folder, serve
from firm.images import encode_image
from firm.records import Judgement, Prompt, UserError
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS
from firm.storage.artifacts import Output

RUBRICS = {"instruction_following": "short_instruction_following", "quality": "short_quality"}
PNG = encode_image(Image.new("RGB", (32, 32)))
PIXEL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def config(**changes: object) -> CriticConfig:
    plain = {
        "model": str(WEIGHTS / "critic"), "answer_style": "score_first", "rubrics": RUBRICS, "dtype": "float32",
        "batch_size": 4, "max_new_tokens": 8,
    }  # fmt: skip
    return CriticConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the sft stage leaves: a critic and the manifest."""
    out = Output.open(str(tmp_path_factory.mktemp("sft")))
    shutil.copytree(WEIGHTS / "critic", out.folder / "critic")
    out.commit("sft", "key", {}, {}, ["critic"])
    return out.folder


@pytest.fixture(scope="module")
def items() -> list[JudgeInput]:
    pairs = [candidate(i, 0, "train") for i in range(6)]
    return [JudgeInput(Prompt(text=prompt), [encode_image(image)]) for prompt, image in pairs]


@pytest.fixture(scope="module")
def url(artifact: Path) -> Iterator[str]:
    with ChatServer(BatchingChat("tiny", LocalCritic(artifact / "critic", config(), CPU))).running() as url:
        yield url


def post(url: str, body: object, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body).encode())
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(url: str, path: str) -> str:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def ask(text: str, image: bytes = PNG, model: str = "tiny") -> dict[str, Any]:
    return {"model": model, "messages": [user_message(text, [image])]}


def spelling(critic: LocalCritic) -> LocalCritic:
    """A critic with random weights that writes "score : N" and ends; which N, it believes by itself."""
    token = critic.encoder.tokenizer.convert_tokens_to_ids
    digits = list("12345")
    grammar = {"score": [":"], ":": digits, **{digit: ["<|im_end|>"] for digit in digits}}
    after = {token(word): token(words) for word, words in grammar.items()}

    def spell(_module: object, _arguments: object, options: dict[str, Any], output: Any) -> None:
        for row, last in zip(output.logits[:, -1], options["input_ids"][:, -1].tolist(), strict=True):
            allowed = after.get(last, [token("score")])
            beliefs = 8 * row[allowed]
            row.fill_(-50)[allowed] = beliefs - beliefs.max()

    critic.model.register_forward_hook(spell, with_kwargs=True)
    return critic


def served(url: str, critic: CriticConfig) -> Judge:
    """The judge of a run whose critic is served."""
    endpoint = {"base_url": url, "model": "tiny", "concurrency": 3, "max_tokens": 8}
    return load_critic(Path(), config(**critic.model_dump() | {"kind": "endpoint", "endpoint": endpoint}), CPU)


@pytest.mark.parametrize("changes", [{}, {"answer_style": "reason_first"},
                                     {"answer_style": "reason_first", "num_samples": 5, "temperature": 3}])  # fmt: skip
def test_the_endpoint_gives_the_soft_scores_of_the_critic_in_this_process(
    artifact: Path, items: list[JudgeInput], changes: dict[str, Any]
) -> None:
    critic = LocalCritic(artifact / "critic", config(**changes), CPU)
    if critic.config.answer_style == "reason_first":
        spelling(critic)
    expected = critic.judge(items)
    with ChatServer(BatchingChat("tiny", critic)).running() as url:
        found = served(url, critic.config).judge(items)
    beliefs = set()
    for here, there in zip(expected, found, strict=True):
        for dimension in RUBRICS:
            mine, theirs = here[dimension], there[dimension]
            assert isinstance(mine, Judgement) and isinstance(theirs, Judgement) and mine.distribution
            assert theirs.distribution == pytest.approx(mine.distribution, abs=1e-4)
            assert theirs.model_copy(update={"distribution": None}) == mine.model_copy(update={"distribution": None})
            beliefs.add(round(mine.soft_score, 3))
    assert len(beliefs) > 6  # they say something about the images


def test_logprobs_have_the_fields_of_the_protocol(url: str) -> None:
    asked = {**ask("quality"), "logprobs": True, "top_logprobs": 3}
    [prefix, score] = post(url, asked)[1]["choices"][0]["logprobs"]["content"]
    assert prefix["token"] == "Score:" and score["token"] in {f" {s}" for s in range(1, 6)}
    assert score["bytes"] == list(score["token"].encode())
    first, second, third = score["top_logprobs"]
    assert first == {name: score[name] for name in ("token", "logprob", "bytes")}
    assert 0 > first["logprob"] >= second["logprob"] >= third["logprob"]
    alone = post(url, {**ask("quality"), "logprobs": True})[1]["choices"][0]
    assert [token["top_logprobs"] for token in alone["logprobs"]["content"]] == [[], []]
    assert alone["message"]["content"] == prefix["token"] + score["token"]
    for silent in (False, None):
        assert post(url, {**ask("quality"), "logprobs": silent})[1]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"logprobs": 5}, "logprobs must be true or false, got 5"),
        ({"top_logprobs": 5}, "top_logprobs may be set only where logprobs is true"),
        ({"logprobs": False, "top_logprobs": 5}, "only where logprobs is true"),
        *(({"logprobs": True, "top_logprobs": top}, "a whole number from 0 to 20") for top in (21, -1, 2.0, True, "5")),
        ({"n": 2}, "n=2 is not supported"),
        ({"seed": "one"}, "seed must be a whole number"),
    ],
)
def test_wrong_options_are_refused(url: str, options: dict[str, Any], complaint: str) -> None:
    status, answer = post(url, {**ask("quality"), **options})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert complaint in answer["error"]["message"]


def test_a_seed_makes_an_answer_and_none_leaves_it_to_chance(artifact: Path) -> None:
    critic = LocalCritic(artifact / "critic", config(answer_style="reason_first", max_new_tokens=20), CPU)
    with ChatServer(BatchingChat("tiny", critic)).running() as url:

        def answer(**options: object) -> str:
            asked = {**ask("quality"), "temperature": 2, **options}
            text: str = post(url, asked)[1]["choices"][0]["message"]["content"]
            return text

        assert answer(seed=1) == answer(seed=1) != answer(seed=2)
        assert len({answer() for _ in range(5)}) > 1


def run_with(url: str, *assignments: str) -> RunConfig:
    """The shapes run with a served critic."""
    endpoint = f"critic.endpoint={{base_url: '{url}', model: tiny, deadline_s: 1}}"
    rubrics = "critic.rubrics={instruction_following: short_instruction_following, quality: short_quality}"
    return load_config("gen-shapes", ["critic.kind=endpoint", endpoint, rubrics, *assignments])


def test_a_run_with_soft_rewards_starts_only_with_a_critic_that_gives_distributions(url: str) -> None:
    preflight.ask_critic(run_with(url))
    preflight.ask_critic(load_config("gen-shapes"))

    class Bare:
        name = "tiny"

        def complete(self, *_: object, **__: object) -> Reply:
            return Reply("Score: 4")

    with ChatServer(Bare()).running() as bare:
        with pytest.raises(UserError, match="logprobs are not supported by the model 'tiny'") as error:
            preflight.ask_critic(run_with(bare))
        assert "reward.soft to false" in error.value.fix and bare in error.value.where
        for ways in (
            ["reward.soft=false", "bench.point_estimate=score"],
            ["critic.num_samples=3", "critic.answer_style=reason_first"],
        ):
            with pytest.raises(
                UserError, match="logprobs are not supported"
            ) as error:  # nor would the bench be answered
                preflight.ask_critic(run_with(bare, *ways))
            assert "critic.endpoint.logprobs to false" in error.value.fix
            preflight.ask_critic(run_with(bare, *ways, "critic.endpoint.logprobs=false"))


def test_logprobs_without_alternatives_are_not_enough() -> None:
    content = [
        {"token": "Score:", "logprob": 0, "top_logprobs": []},
        {"token": " 4", "logprob": -1, "top_logprobs": []},
    ]
    answer = json.dumps({"choices": [{"message": {"content": "Score: 4"}, "logprobs": {"content": content}}]})
    with serving(lambda request: request.reply(200, answer.encode())) as url:
        run = run_with(f"{url}/v1")
        with pytest.raises(UserError, match="answers without top_logprobs"):
            preflight.ask_critic(run)


class Slow:
    """Stands for a LocalCritic whose first batch takes until `go`; a text of "bad" spoils its batch."""

    def __init__(self) -> None:
        self.config, self.encoder = config(), SimpleNamespace(max_tokens=99, questions=self._questions)
        self.go, self.sizes = threading.Event(), list[int]()

    def _questions(self, texts: list[str], images: list[list[bytes]]) -> dict[str, Any]:
        return {"attention_mask": torch.ones(len(texts), 9, dtype=torch.long), "texts": texts}

    def score(self, inputs: dict[str, Any]) -> list[list[float]]:
        texts = [text.removeprefix("<image>") for text in inputs["texts"]]
        self.sizes.append(len(texts))
        assert self.go.wait(10)
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return [[float(text == str(s)) for s in range(1, 6)] for text in texts]


def test_requests_that_wait_are_answered_together() -> None:
    critic = Slow()
    chat = BatchingChat("slow", critic, patience_s=0)  # type: ignore[arg-type]
    gauges = {"firm_queue_length": chat.waiting}
    with ChatServer(chat, gauges=gauges).running() as url, ThreadPoolExecutor(16) as executor:
        first = executor.submit(post, url, ask("5", model="slow"))
        until(lambda: critic.sizes == [1])
        rest = [executor.submit(post, url, ask(str(1 + i % 5), model="slow")) for i in range(6)]
        until(lambda: "firm_queue_length 6.0\n" in get(url, "/metrics"))
        critic.go.set()
        texts = [f.result()[1]["choices"][0]["message"]["content"] for f in [first, *rest]]
        assert texts == [f"Score: {n}" for n in (5, 1, 2, 3, 4, 5, 1)]
        assert critic.sizes == [1, 4, 2]
        metrics = get(url, "/metrics")
    assert 'firm_requests_total{code="200"} 7.0\n' in metrics and "firm_request_seconds_count 7.0\n" in metrics
    assert float(re.search(r"firm_request_seconds_sum (\S+)", metrics)[1]) > 0  # type: ignore[index]


def until(done: Any) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failure_of_the_model_is_told_and_the_server_lives() -> None:
    critic = Slow()
    critic.go.set()
    with ChatServer(BatchingChat("slow", critic)).running() as url:  # type: ignore[arg-type]
        status, answer = post(url, ask("bad", model="slow"))
        assert (status, answer["error"]) == (500, {"message": "RuntimeError: out of memory", "type": "server_error"})
        assert post(url, ask("3", model="slow"))[0] == 200


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def message(*parts: object, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (message({"type": "text", "text": "hi"}, role="system"), "one message of the role user"),
        ([*message({"type": "text", "text": "hi"})] * 2, "one message of the role user"),
        (["hi"], "one message of the role user"),
        (message(), "no content"),
        (message({"type": "text", "text": "hi"}), "has no image"),
        (message(None), "content part 0 is neither"),
        (message({"type": "input_audio"}), "content part 0 is neither"),
        (message(image_part("http://example.com/a.png")), "content part 0: images must be data URIs"),
        (message(image_part("file:///etc/passwd")), "images must be data URIs"),
        (message(image_part("data:image/png;base64,%%")), "content part 0"),
        (message(image_part("data:image/png;base64," + base64.b64encode(b"no").decode())), "cannot decode image"),
        (message(image_part(PIXEL), {"type": "text", "text": "x" * 65_537}), "more than 65536"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(url: str, messages: object, complaint: str) -> None:
    status, answer = post(url, {"model": "tiny", "messages": messages})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert complaint in answer["error"]["message"]


def test_a_bad_request_does_not_spoil_its_batch(url: str) -> None:
    good, bad = ask("quality"), ask("quality", b"\x89PNG\r\n\x1a\nnot really")
    with ThreadPoolExecutor(4) as executor:
        statuses = [status for status, _ in executor.map(lambda body: post(url, body), [good, bad, good, bad])]
    assert statuses == [200, 400, 200, 400]


def test_what_has_been_asked_is_answered_before_a_stop() -> None:
    class Sleeper:
        name = "sleeper"

        def complete(self, *_: object, **__: object) -> Reply:
            asked.set()
            time.sleep(0.3)
            return Reply("done")

    asked, server = threading.Event(), ChatServer(Sleeper())
    with ThreadPoolExecutor(2) as executor:
        serving = executor.submit(server.serve, 10)
        answer = executor.submit(post, server.url, {"messages": [{}]})
        assert asked.wait(10)
        server.stop()
        serving.result(10)
        assert server.registry.get_sample_value("firm_requests_in_progress") == 0
    assert answer.result()[1]["choices"][0]["message"]["content"] == "done"


def test_a_port_that_is_taken_is_named() -> None:
    chat = SimpleNamespace(name="any")
    server = ChatServer(chat)  # type: ignore[arg-type]
    with server.running(), pytest.raises(UserError, match="cannot listen"):
        ChatServer(chat, port=server.port)  # type: ignore[arg-type]


def test_a_trained_critic_is_served_by_its_artifact(artifact: Path, tmp_path: Path) -> None:
    assert model_folder(str(artifact)) == str(artifact / "critic")
    assert model_folder("org/name") == "org/name"
    with pytest.raises(UserError, match="there is no model folder"):
        model_folder(str(tmp_path / "nothing"))


def test_a_trained_critic_is_served_from_s3(artifact: Path, s3_uri: str) -> None:
    with pytest.raises(UserError, match="there is no critic"):
        model_folder(s3_uri)
    out = Output.open(s3_uri)
    for path in (artifact / "critic").iterdir():
        (out.folder / "critic").mkdir(exist_ok=True)
        (out.folder / "critic" / path.name).write_bytes(path.read_bytes())
    out.commit("sft", "key", {}, {}, ["critic"])
    folder = Path(model_folder(s3_uri))
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (artifact / "critic").iterdir())


@pytest.mark.parametrize(("options", "where"), [({"dtype": "float8"}, "--dtype"), ({"batch_size": 0}, "--batch-size")])
def test_a_wrong_option_is_named(artifact: Path, options: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError, match=where) as error:
        serve(str(artifact), **options)
    assert error.value.exit_code == 2


def test_serve_stops_when_told(artifact: Path) -> None:
    code = (
        "import sys; from firm.critics.serve import serve\n"
        "serve(sys.argv[1], port=0, served_model_name='m', answer_style='score_first', dtype='float32')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(artifact)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = next(line for line in process.stderr if line.startswith("serving "))
    url = f"http://127.0.0.1:{line.split()[3].split(':')[1]}/v1"
    assert post(url, ask("quality", model="m"))[1]["choices"][0]["message"]["content"].startswith("Score: ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()


def test_a_chat_that_can_not_answer_is_the_callers_mistake() -> None:
    class Refusing:
        name = "refusing"

        def complete(self, *_: object, **__: object) -> Reply:
            raise RequestFailed("not like this")

    with ChatServer(Refusing()).running() as url:
        assert post(url, {"messages": [{}]}) == (
            400, {"error": {"message": "not like this", "type": "invalid_request_error"}}
        )  # fmt: skip
