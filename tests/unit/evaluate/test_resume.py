"""Evaluation that is interrupted anywhere ends with the samples of one that is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from firm.config import RunConfig
from firm.config.loading import load_config
from firm.evaluate.run import run
from firm.evaluate.suite import SUITES, Scores
from firm.policies.policy import Policy, save_policy
from firm.records import Prompt, Sample, Summary
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

NUMBER = 10  # no multiple of the batch


class Counting:
    """A suite that fails at a given batch."""

    fails_at = -1
    asked = 0

    def __init__(self, *_: Any) -> None:
        pass

    def prompts(self) -> list[Prompt]:
        return [Prompt(text=f"a {('red', 'blue')[i % 2]} circle") for i in range(NUMBER)]

    def score(self, prompts: Sequence[Prompt], images: Sequence[bytes]) -> list[Scores]:
        type(self).asked += 1
        if self.asked == self.fails_at:
            raise KeyboardInterrupt
        return [{"bytes": len(png)} for png in images]

    def summary(self, samples: Sequence[Sample]) -> Summary:
        return Summary(stage="evaluate", metrics={"n": len(samples)})


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setitem(SUITES, "counting", f"{__name__}:Counting")
    settings = "{suite: counting, num_images: 10, num_inference_steps: 1, batch_size: 4}"
    config = load_config("gen-shapes", [f"evaluate={settings}"])
    policy = Policy(config.policy, torch.device("cpu"))
    policy.train(None, (), seed=0)
    save_policy(tmp_path / "rl" / "policy", policy)
    return config


def evaluate(config: RunConfig, folder: Path, name: str, fails_at: int = -1) -> list[Sample]:
    Counting.fails_at = fails_at
    Counting.asked = 0
    out = Output.open(str(folder / name))
    try:
        run(config, {"critic": folder, "policy": folder / "rl"}, out)
    except KeyboardInterrupt:
        return []
    return list(iter_shards(out.folder / "samples", Sample))


def test_wherever_it_is_interrupted(config: RunConfig, tmp_path: Path) -> None:
    whole = evaluate(config, tmp_path, "whole")
    assert [(s.policy, s.index) for s in whole] == [(which, i) for which in ("base", "final") for i in range(NUMBER)]
    for batch in range(1, 7):
        assert evaluate(config, tmp_path, f"cut{batch}", fails_at=batch) == []
        assert evaluate(config, tmp_path, f"cut{batch}") == whole
        assert Counting.asked <= 7 - batch + 1, "finished shards are sampled again"
