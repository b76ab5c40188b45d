"""The run's own critic behind a server: a child that judges as the critic in this process, and ends with its owner."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from in_process import run_stages, stay_here
from PIL import Image
from shared import ALONE, CPU, serving, whole_run

from firm import preflight
from firm.config import CriticConfig
from firm.config.loading import load_config
from firm.critics import child
from firm.critics.child import command, served
from firm.critics.judge import JudgeInput
from firm.critics.load import load_critic
from firm.images import encode_image
from firm.lifeline import identity
from firm.metrics import read_metrics
from firm.records import Judgement, Prompt, UserError
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS
from firm.storage.inputs import open_input, read_ref

FOLDER = WEIGHTS / "critic"
OWNER = """
import sys, time
from pathlib import Path
from firm.config import CriticConfig
from firm.critics.child import served
with served(CriticConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])) as critic:
    print(critic.endpoint.base_url, flush=True)
    time.sleep(600)
"""


def config(kind: str = "trained", max_pixels: int | None = None, **serve: object) -> CriticConfig:
    rubrics = {"instruction_following": "short_instruction_following", "quality": "short_quality"}
    plain = {
        "kind": kind, "max_pixels": max_pixels, "model": str(FOLDER), "answer_style": "score_first", "rubrics": rubrics,
        "dtype": "float32", "batch_size": 4, "max_new_tokens": 8, "serve": serve,
    }  # fmt: skip
    return CriticConfig.model_validate(plain)


def listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def within(seconds: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def test_a_server_judges_as_the_critic_in_this_process_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the teacher's")
    pairs = [candidate(i, 0, "train") for i in range(5)]
    pairs.append(("a red cube", Image.new("RGB", (2100, 2100), "red")))  # more than a server takes of strangers
    items = [JudgeInput(Prompt(text=prompt), [encode_image(image)]) for prompt, image in pairs]
    bounded = config("existing", max_pixels=256, concurrency=4)
    here = load_critic(None, bounded.model_copy(update={"serve": None}), CPU).judge(items)
    with served(bounded, None, tmp_path / "work") as asked:
        assert (asked.kind, asked.endpoint and asked.endpoint.concurrency) == ("endpoint", 4)
        there = load_critic(None, asked, CPU).judge(items)
        assert asked.endpoint and listens(asked.endpoint.base_url)
        monkeypatch.setenv(asked.endpoint.api_key_env, "of another server")
        with pytest.raises(UserError, match="refuses the key"):
            load_critic(None, asked, CPU).judge(items)
    assert not listens(asked.endpoint.base_url)
    for mine, theirs in zip(here, there, strict=True):
        for dimension in mine:
            one, other = mine[dimension], theirs[dimension]
            assert isinstance(one, Judgement) and isinstance(other, Judgement)
            assert other.distribution == pytest.approx(one.distribution, abs=1e-4)


@pytest.mark.parametrize("end", ["killed", "killed with its group", "told to end"])
def test_it_ends_with_its_owner_however_that_ends(tmp_path: Path, end: str) -> None:
    arguments = [config().model_dump_json(), str(FOLDER), str(tmp_path)]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout
        url = owner.stdout.readline().strip()
        assert listens(url), (tmp_path / "critic-server.log").read_text()
    finally:
        {"killed": owner.kill, "told to end": owner.terminate}.get(end, lambda: os.killpg(owner.pid, signal.SIGKILL))()
        owner.wait()
    assert within(5, lambda: not listens(url))


def test_a_server_that_does_not_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**serve: Any) -> str:
        with pytest.raises(UserError, match=r"the critic's server") as error, served(config(**serve), FOLDER, tmp_path):
            pass
        assert "critic.serve" in str(error.value)
        return str(error.value)

    monkeypatch.setenv("PATH", "")  # no program vllm
    assert "ended with exit code 1" in (said := refused(program="vllm")) and "vllm" in said
    sleeps = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    log = tmp_path / "critic-server.log"
    monkeypatch.setattr(child, "command", lambda *_: sleeps)
    monkeypatch.setattr(child, "_answers", lambda *_: within(60, lambda: "loading" in log.read_text()) and False)
    assert "does not answer within 1 s: loading" in refused(start_s=1)


@pytest.mark.parametrize("status", [HTTPStatus.OK, HTTPStatus.UNAUTHORIZED])
def test_another_server_at_its_port_is_not_taken_for_it(status: HTTPStatus) -> None:
    """One without a key, and one with a key of its own."""
    with serving(lambda request: request.reply(status, b"{}")) as url:
        assert not child._answers(int(url.rpartition(":")[2]), "key")
    with serving(lambda request: request.reply(200 if "Authorization" in request.headers else 401, b"{}")) as url:
        assert child._answers(int(url.rpartition(":")[2]), "key")


def test_what_a_program_has_started_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not care for SIGTERM, and neither does what it has started, as with vLLM's workers."""
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(worker.pid)); time.sleep(600)"
    )
    pid = tmp_path / "pid"
    monkeypatch.setattr(child, "command", lambda *_: [sys.executable, "-c", code, str(pid)])
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    monkeypatch.setattr(child, "_answers", lambda *_: pid.exists() and pid.read_text() != "")
    with served(config(), FOLDER, tmp_path):
        worker = int(pid.read_text())
        assert identity(worker)
    assert within(5, lambda: not identity(worker))


def test_the_command_line_of_vllm() -> None:
    vllm = config(program="vllm", arguments=["--tensor-parallel-size=2", "--gpu-memory-utilization=0.4"])
    assert vllm.serve
    assert command(vllm, vllm.serve, "/critic", 8123) == [
        "vllm", "serve", "/critic", "--host", "127.0.0.1", "--port", "8123", "--served-model-name", "critic",
        "--dtype", "float32", "--max-logprobs", "20", "--tensor-parallel-size=2", "--gpu-memory-utilization=0.4",
    ]  # fmt: skip


def test_vllm_is_not_asked_to_bound_the_images_of_a_model_as_it_is() -> None:
    with pytest.raises(ValueError, match="remove `max_pixels`"):
        config("existing", max_pixels=256, program="vllm")
    config(max_pixels=256, program="vllm")  # sft has written the bound beside the model


def test_a_program_that_is_not_there_is_missed_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = load_config("critic-gen-shapes", ["critic.serve.program=vllm"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no program vllm") as error:
        preflight.check(vllm)
    assert error.value.exit_code == 2
    (tmp_path / "vllm").touch(mode=0o755)
    preflight.check(vllm)


def test_processes_of_a_machine_share_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on two machines; the second one of the second machine starts none."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(child, "_running", None)
    others = [["http://first/v1", "a"], ["", "b"], ["http://second/v1", "c"]]
    monkeypatch.setattr(child, "gather", lambda mine, _: [*others, *mine])
    with served(config(), FOLDER, tmp_path, replace(ALONE, rank=3, size=4)) as asked:
        assert asked.endpoint and (asked.endpoint.base_url, asked.endpoint.concurrency) == ("http://second/v1", 4)
        assert os.environ[asked.endpoint.api_key_env] == "c"
    assert asked.endpoint.api_key_env not in os.environ
    assert (asked.endpoint.timeout_s, asked.endpoint.deadline_s) == (600, 2400)
    with served(config(program="vllm", timeout_s=9), FOLDER, tmp_path, replace(ALONE, rank=3, size=4)) as asked:
        assert asked.endpoint and (asked.endpoint.timeout_s, asked.endpoint.concurrency) == (9, 32)


@pytest.mark.slow
def test_the_stages_of_a_run_ask_a_server_of_its_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench, rl and evaluate, each its own; and the verdict names the critic."""
    stay_here(monkeypatch)
    plain = yaml.safe_load(whole_run({"kind": "python", "target": "firm.shapes.teacher:PixelTeacher"}))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**plain, "critic": {"serve": {"concurrency": 8}}}))
    urls: list[str] = []
    running = child._running

    @contextmanager
    def noted(*arguments: Any) -> Iterator[str]:
        with running(*arguments) as url:
            urls.append(url)
            yield url

    monkeypatch.setattr(child, "_running", noted)
    run_stages(load_config(str(tmp_path / "small.yaml"), [f"store={tmp_path}"]), tmp_path)
    assert len(urls) == 3 and not any(map(listens, urls))
    pointers = tmp_path / "kfp" / "firm-1"
    verdict = open_input(read_ref(pointers / "gate" / "verdict")) / "verdict.json"
    assert json.loads(verdict.read_text())["critic"] == read_ref(pointers / "sft" / "critic").sha256
    lines = read_metrics(open_input(read_ref(pointers / "rl" / "policy")) / "metrics.jsonl")
    assert [(line["invalid_judgements"], line["soft_share"]) for line in lines] == [(0, 1)] * 4


def test_without_it_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_running", None)
    plain = config().model_copy(update={"serve": None})
    with served(plain, FOLDER, tmp_path) as asked:
        assert asked is plain
    with pytest.raises(ValueError, match="is served already"):
        CriticConfig.model_validate({
            "kind": "endpoint", "endpoint": {"base_url": "http://there/v1", "model": "m"}, "rubrics": {}, "serve": {},
        })  # fmt: skip
