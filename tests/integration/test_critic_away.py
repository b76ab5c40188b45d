"""A served critic goes away in the middle of RL: it is waited for, or RL stops with one sentence and resumes."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from integration.asked import Teacher, until
from servers import free_port, started
from shared import CPU, gate

from firm.config import CriticConfig, RunConfig
from firm.config.critic import CriticEndpoint
from firm.config.loading import load_config
from firm.critics.child import command
from firm.critics.judge import JudgeInput, judging
from firm.critics.load import load_critic
from firm.images import encode_image
from firm.metrics import read_metrics
from firm.records import Judgement, Prompt, UserError
from firm.rl import train as rl_train
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS
from firm.storage.artifacts import Output

pytestmark = pytest.mark.slow
AWAY_S = 3.0
"""Scaled down, as is the deadline: five minutes, where a judgement has ten, are nothing to notice."""
KEPT = ("metrics.jsonl", "audits.jsonl", "policy/transformer/diffusion_pytorch_model.safetensors")


def settings(folder: Path, teacher: Teacher, patience_s: float) -> RunConfig:
    endpoint = {
        "base_url": teacher.url, "model": "pixel-teacher", "concurrency": 4, "logprobs": False,
        "deadline_s": 1.0, "patience_s": patience_s,
    }  # fmt: skip
    plain = {
        "base": "gen-shapes",
        "name": "small",
        "curation": None,
        "reward": {"soft": False},
        "critic": {
            "kind": "endpoint",
            "endpoint": endpoint,
            "answer_style": "reason_first",
            "rubrics": {"instruction_following": "instruction_following", "quality": "quality"},
        },
        "auditor": {"num_images": 4, "every": 2},
        "bench": {
            "sources": [], "point_estimate": "score", "gate": json.loads(gate({"metric": "coverage", "at_least": 0})),
        },
        "rl": {
            "prompts_per_epoch": 4, "group_size": 8, "max_epochs": 2, "checkpoint_epochs": 1, "num_inference_steps": 1,
            "batch_size": 8,
        },
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(plain))
    return load_config(str(folder / "small.yaml"))


@contextmanager
def killed_after(teacher: Teacher, number: int, away_s: float) -> Iterator[None]:
    """Kill the critic when it was asked so often, and start it again after a while; never, if that is infinite."""

    def work() -> None:
        until(lambda: teacher.requests("rating").total() >= number, "the critic is not asked")
        teacher.kill()
        if away_s < 60:
            time.sleep(away_s)
            teacher.start()

    teacher.forget()
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def train(config: RunConfig, folder: Path) -> list[bytes]:
    out = Output.open(str(folder))
    rl_train.train({"config": config.model_dump(mode="json")}, {}, out)
    assert [line["invalid_judgements"] for line in read_metrics(out.folder / "metrics.jsonl")] == [0, 0]
    return [(out.folder / name).read_bytes() for name in KEPT]


def test_a_critic_that_goes_away_is_waited_for_or_rl_stops_and_resumes(teacher: Teacher, tmp_path: Path) -> None:
    """Whatever happens, the result is that of a run without."""
    whole = train(settings(tmp_path, teacher, 60), tmp_path / "whole")
    with killed_after(teacher, 40, AWAY_S):
        assert train(settings(tmp_path, teacher, 60), tmp_path / "waited") == whole
    impatient = settings(tmp_path, teacher, AWAY_S / 3)
    with killed_after(teacher, 40, float("inf")), pytest.raises(UserError, match="answered nobody for") as error:
        train(impatient, tmp_path / "stopped")
    assert str(error.value).count("\n") == 1 and teacher.url in str(error.value)
    teacher.start()
    assert train(impatient, tmp_path / "stopped") == whole


def test_a_critic_that_is_served_by_firm_judges_on_after_it_was_killed(tmp_path: Path) -> None:
    """Half of the questions are asked of a server that is killed, and the rest of the next one at its address."""
    pairs = [candidate(i, 0, "train") for i in range(40)]
    items = [JudgeInput(Prompt(text=prompt), [encode_image(image)]) for prompt, image in pairs]
    port = free_port()
    critic = CriticConfig.model_validate({
        "model": str(WEIGHTS / "critic"), "answer_style": "score_first", "rubrics": {"quality": "short_quality"},
        "dtype": "float32", "batch_size": 1, "serve": {},
    })  # fmt: skip
    assert critic.serve
    here = load_critic(WEIGHTS / "critic", critic, CPU).judge(items)
    endpoint = {"base_url": f"http://127.0.0.1:{port}/v1", "model": "critic", "deadline_s": 1, "patience_s": 600}
    asked = critic.model_copy(update={"kind": "endpoint", "endpoint": CriticEndpoint(concurrency=1, **endpoint)})
    serve = command(critic, critic.serve, critic.model, port)
    with judging(load_critic(None, asked, CPU)) as judged:
        with started(serve) as server:
            judged.add(items[:1])
            judged.assessments()  # it is there
            judged.add(items[1:])
            time.sleep(0.2)
            server.kill()
            server.wait()
        time.sleep(AWAY_S)
        with started(serve):
            there = judged.assessments()
    for mine, theirs in zip(here, there, strict=True):
        one, other = mine["quality"], theirs["quality"]
        assert isinstance(one, Judgement) and isinstance(other, Judgement)
        assert other.distribution == pytest.approx(one.distribution, abs=1e-4)
