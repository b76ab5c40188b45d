"""Bench, rl and evaluate with judges at an endpoint: killed in the middle, they ask only what has no answer yet.

With a store in S3 and another machine that goes on, they ask again what was not yet published.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.asked import Teacher, until
from shared import CPU, gate, rendered, stage_command

from firm.config import RunConfig
from firm.config.loading import load_config
from firm.curation.run import run as curate
from firm.policies.policy import Policy, save_policy
from firm.records import Verdict
from firm.storage.artifacts import Output
from firm.storage.inputs import write_ref

pytestmark = pytest.mark.slow
CONCURRENCY = 4
IMAGES = 12
INPUTS = {
    "bench": ("data", "critic"),
    "rl": ("critic", "verdict"),
    "evaluate": ("critic", "policy"),
}
# An image is three questions (two samples of the critic, one of the auditor) on each of two dimensions. Bench has
# IMAGES and test examples, evaluate those of two policies; rl three checks of 8 and two samples behind them, of two
# policies and one at least; and the critic alone judges two epochs of 16.
AT_LEAST = {"bench": 6 * IMAGES, "rl": 6 * 8 * (3 + 2 + 1) + 4 * 16 * 2, "evaluate": 6 * IMAGES * 2}


@pytest.fixture(scope="module")
def config(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose critic and auditor are at the endpoint; limits of their own tell their questions apart."""
    folder = tmp_path_factory.mktemp("run")

    def chat(max_tokens: int) -> dict[str, Any]:
        limits = {"concurrency": CONCURRENCY, "max_tokens": max_tokens, "logprobs": False}
        return {"kind": "endpoint", "base_url": teacher.url, "model": "pixel-teacher", **limits}

    few = {"num_images": IMAGES, "num_inference_steps": 1}
    rubrics = {"instruction_following": "instruction_following", "quality": "quality"}
    plain = {
        "base": "gen-shapes",
        "name": "small",
        "curation": {"sources": [rendered(32)], "test_share": 0.25},
        "critic": {
            "kind": "endpoint",
            "endpoint": chat(1001),
            "answer_style": "reason_first",
            "num_samples": 2,
            "rubrics": rubrics,
        },
        "auditor": {"judge": chat(1002), "rubrics": rubrics, "num_images": 8, "every": 1, "stops": False},
        "bench": {
            "sources": [{"kind": "policy", **few}],
            "gate": json.loads(gate({"metric": "coverage", "at_least": 0})),
        },
        "rl": {
            "prompts_per_epoch": 2, "group_size": 8, "max_epochs": 2, "checkpoint_epochs": 1, "num_inference_steps": 1,
        },
        "evaluate": {**few, "batch_size": IMAGES},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(plain))
    return load_config(str(folder / "small.yaml"))


@pytest.fixture(scope="module")
def inputs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> pointer file of an artifact."""
    folder = tmp_path_factory.mktemp("inputs")
    outputs = {name: Output.open(str(folder / name)) for name in ("data", "critic", "verdict", "policy")}
    curate(config, {}, outputs["data"])
    outputs["data"].discard("work")
    policy = Policy(config.policy, CPU)
    for parameter in policy.train(None, (), seed=0).trainable:
        parameter.data.mul_(1.05)
    save_policy(outputs["policy"].folder / "policy", policy)
    (outputs["verdict"].folder / "verdict.json").write_text(Verdict(trusted=True, checks=[]).model_dump_json())
    for name, out in outputs.items():
        (out.folder / "here").write_text(name)
        write_ref(out.commit(name, name, {}, {}, out.files()), folder / f"{name}.ref")
    return {name: str(folder / f"{name}.ref") for name in outputs}


def kill_after(number: int, command: list[str], teacher: Teacher, env: Mapping[str, str] | None = None) -> None:
    """Start a stage, and kill -9 it and its worker when the teacher was asked so often."""
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until(lambda: teacher.requests("rating").total() >= number or process.poll() is not None, "it hangs")
        assert process.poll() is None, process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("stage", "kills"), [("bench", (30,)), ("rl", (60, 180)), ("evaluate", (60,))])
def test_nothing_is_asked_twice_beyond_what_was_in_flight(
    teacher: Teacher, config: RunConfig, inputs: dict[str, str], tmp_path: Path, stage: str, kills: tuple[int, ...]
) -> None:
    teacher.forget()
    plain = {**config.model_dump(mode="json", exclude_none=True), "store": str(tmp_path)}
    command = stage_command(stage, plain, {name: inputs[name] for name in INPUTS[stage]}, tmp_path / "made")
    for number in kills:
        kill_after(number, command, teacher)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    asked = teacher.requests("rating")
    assert AT_LEAST[stage] <= len(asked) <= asked.total() <= len(asked) + CONCURRENCY * len(kills)
    assert not list(tmp_path.glob("small/*/work"))


MANY = 280
# Stage -> when it is killed, and how many of these questions another machine asks again at most. Bench has published
# a batch of 256 images of the critic's, four questions each; rl the check of the base (48) and an epoch (64 at most);
# evaluate a batch of IMAGES.
ELSEWHERE = {"bench": (4 * 256 + 40, 40), "rl": (150, 64), "evaluate": (100, 6 * IMAGES)}


@pytest.mark.parametrize("stage", ELSEWHERE)
def test_another_machine_asks_only_what_was_not_published(
    teacher: Teacher, config: RunConfig, inputs: dict[str, str], tmp_path: Path, s3_uri: str, stage: str
) -> None:
    number, again = ELSEWHERE[stage]
    teacher.forget()
    plain = {**config.model_dump(mode="json", exclude_none=True), "store": s3_uri}
    plain["bench"]["sources"][0]["num_images"] = MANY
    command = stage_command(stage, plain, {name: inputs[name] for name in INPUTS[stage]}, tmp_path / "made")
    for machine in ("lost", "heir"):
        (tmp_path / machine).mkdir()
    kill_after(number, command, teacher, {**os.environ, "TMPDIR": str(tmp_path / "lost")})
    env = {**os.environ, "TMPDIR": str(tmp_path / "heir")}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    asked = teacher.requests("rating")
    assert number < len(asked) <= asked.total() <= len(asked) + again + CONCURRENCY
