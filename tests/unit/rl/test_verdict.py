"""RL starts with the gate's permission only, and with one that looked at all that RL needs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from firm.config.loading import load_config
from firm.records import ArtifactRef, Check, UserError, Verdict
from firm.rl.run import run


class Launched(Exception):
    """The job would have been started."""


MEASURED = "ab" * 32
BOTH = ("instruction_following", "quality")


def start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdict: dict[str, Any],
    *overrides: str,
    ruled: Sequence[str] = BOTH,
) -> None:
    """Run RL with a verdict whose rules were about the dimensions ``ruled``."""

    def launch(*_: object) -> None:
        raise Launched

    checks = [
        Check(metric="pairwise", dimension=d, source="policy", value=0.9, bound="", passed=True, message="")
        for d in ruled
    ]
    (folder / "verdict.json").write_text(Verdict(checks=checks, **{"critic": MEASURED, **verdict}).model_dump_json())
    monkeypatch.setattr("firm.rl.run.launch", launch)
    monkeypatch.setattr("firm.rl.run.TrainingJob", lambda *_: None)

    class Inputs(dict[str, Path]):
        refs: ClassVar = {"critic": ArtifactRef(uri="critic", sha256=MEASURED)}

    class Out:
        folder = None

    run(load_config("gen-shapes", overrides), Inputs(verdict=folder), Out())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ({"trusted": False}, "the critic is not trusted, so it will not steer RL"),
        ({"trusted": True, "gaps": ["quality.pairwise"]}, "has passed no rule for quality.pairwise on images of"),
    ],
)  # fmt: skip
def test_without_it_nothing_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        start(tmp_path, monkeypatch, verdict)
    assert refused.value.exit_code == 2


def test_a_verdict_for_a_reward_of_fewer_dimensions_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no rule for quality\.skill_low, quality\.pairwise on images of"):
        start(tmp_path, monkeypatch, {"trusted": True}, ruled=BOTH[:1])


@pytest.mark.parametrize(
    ("gaps", "overrides"),
    [
        ([], []),
        (["beauty.pairwise"], []),  # of no dimension of the reward
        (
            ["quality.pairwise"],
            [
                "bench.gate.accept_gaps=[quality.pairwise]",
                "bench.gate.rules=[{metric: skill_low, source: policy, at_least: 0}, {metric: pairwise, "
                "dimension: instruction_following, source: policy, at_least: 0.8}]",
            ],
        ),
    ],
)
def test_with_it_the_job_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gaps: list[str], overrides: list[str]
) -> None:
    with pytest.raises(Launched):
        start(tmp_path, monkeypatch, {"trusted": True, "gaps": gaps}, *overrides)


@pytest.mark.parametrize(("measured", "named"), [("cd" * 32, "cdcdcdcdcdcd"), ("", "none that was trained")])
def test_a_critic_that_was_not_the_measured_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: str, named: str
) -> None:
    with pytest.raises(UserError, match="on another critic") as refused:
        start(tmp_path, monkeypatch, {"trusted": True, "critic": measured})
    assert named in str(refused.value) and MEASURED[:12] in str(refused.value)
    with pytest.raises(Launched):
        start(tmp_path, monkeypatch, {"trusted": True})
    critic = {
        "kind": "existing",
        "model": "pkg://firm.shapes/weights/critic",
        "rubrics": {d: f"short_{d}" for d in BOTH},
    }
    untrained = [f"critic={json.dumps(critic)}"]
    with pytest.raises(Launched):
        start(tmp_path, monkeypatch, {"trusted": True, "critic": ""}, *untrained)
    with pytest.raises(UserError, match=rf"{MEASURED[:12]}.*none that was trained") as refused:
        start(tmp_path, monkeypatch, {"trusted": True}, *untrained)
