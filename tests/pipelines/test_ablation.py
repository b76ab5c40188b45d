"""An ablation from end to end: what its runs share is made once, the rest is compared, and it resumes.

The stages run in this process. That KFP leaves its outputs where the ablation looks for them is tested with the real
command, which is slow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process import run_stages, stay_here
from shared import gate, rendered, small_run

from firm.ablation.result import Ablation, Run
from firm.ablation.rewards import Planned, plan
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.records import UserError
from pipelines import ablation, local
from pipelines.ablation import compare
from pipelines.local import StageFailed

SMALL = small_run(rendered(48), shard_size=64, batch_size=32)
SMALL += f"""
sft: {{batch_size: 8, max_steps: 3}}
bench:
  num_bootstrap: 20
  sources: [{{kind: policy, num_images: 16, num_inference_steps: 2}}]
  gate: {gate({"metric": "coverage", "at_least": 0.1})}
rl: {{prompts_per_epoch: 2, group_size: 2, max_epochs: 2, num_inference_steps: 2, checkpoint_epochs: 1}}
auditor: {{every: 1, num_images: 8}}
evaluate: {{num_images: 8, batch_size: 8, num_inference_steps: 2, num_bootstrap: 20}}
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return load_config(str(path), [f"store={tmp_path}/runs"])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "run_locally", partial(run_stages, without=["report"]))
    stay_here(monkeypatch)


def artifacts(folder: Path) -> dict[str, int]:
    """Stage -> how many artifacts of it are complete."""
    names = [path.parent.name.rpartition("-")[0] for path in folder.glob("*/manifest.json")]
    return {name: names.count(name) for name in names}


def compared(planned: list[Planned], folder: Path) -> tuple[Ablation, str, list[str]]:
    """Result, page and what was said."""
    said: list[str] = []
    page = compare(planned, folder, said.append)
    return Ablation.model_validate_json((folder / "ablation.json").read_text()), page.read_text(), said


def test_two_rewards_are_compared_and_what_they_share_is_made_once(
    config: RunConfig, tmp_path: Path, here: None
) -> None:
    folder = tmp_path / "runs" / "ablate"
    planned = plan(config, [0])
    result, page, said = compared(planned, folder)
    shared = {"curation": 1, "sft": 1}
    of_each = {"bench": 2, "gate": 2, "rl": 2, "evaluate": 2}  # one rewards a dimension that the other does not
    assert artifacts(tmp_path / "runs" / "small") == shared | of_each
    assert said == ["run 1 of 2: instruction following only, seed 0", "run 2 of 2: QMA, seed 0"]
    for run in result.runs:
        assert run.epochs == 2 and [row["epoch"] for row in run.checks] == [0, 1, 2]
        assert {"auditor_instruction_following", "auditor_quality", "critic_quality", "blanks"} <= set(run.audits[0])
        assert "blanks" in [curve.name for curve in run.curves] and run.held_out
    only, qma = (run.checks[0] for run in result.runs)
    assert all(only[name] == qma[name] for name in only if name.startswith("auditor_") and name != "auditor_reward")
    assert "| QMA, last epoch |" in page and "</svg>" in (folder / "ablation.svg").read_text()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "small").glob("*/manifest.json")}
    assert compared(planned, folder)[:2] == (result, page)  # everything is found again
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
def test_formulas_of_equal_dimensions_share_the_bench(config: RunConfig, tmp_path: Path, here: None) -> None:
    compare(plan(config, [0], ["weighted-sum-0.4-0.6", "qma"]), tmp_path / "runs" / "ablate", lambda _: None)
    found = artifacts(tmp_path / "runs" / "small")
    assert found == {"curation": 1, "sft": 1, "bench": 1, "gate": 1, "rl": 2, "evaluate": 2}


Runner = Callable[[RunConfig, Path], Path]


def failing(stage: str, seeds: tuple[int, ...]) -> Runner:
    def run(config: RunConfig, folder: Path) -> Path:
        if config.seed in seeds:
            raise StageFailed(stage, f"the {stage} says no", "run again", False)
        return folder

    return run


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end well leave summaries without audits."""

    def made(planned: Planned, *_: object) -> Any:
        row = {"sample": "check", "epoch": 0, "auditor_instruction_following": 3.0, "auditor_quality": 4.0}
        audits = [row, {**row, "sample": "report"}]
        return Run(reward=planned.reward, label=planned.label, seed=planned.config.seed, audits=audits)

    for name, function in (("of_run", made), ("newest", lambda *_: Path()), ("read_ref", lambda _: None)):
        monkeypatch.setattr(ablation, name, function)
    monkeypatch.setattr(ablation, "_summary", lambda _: None)


def test_a_seed_that_the_gate_refuses_leaves_the_others(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_numbers: None
) -> None:
    monkeypatch.setattr(ablation, "run_locally", failing("gate", (0,)))
    result, page, said = compared(plan(config, [0, 1]), tmp_path)
    assert [(run.seed, bool(run.refused)) for run in result.runs] == [(0, True), (0, True), (1, False), (1, False)]
    assert "## Refused by the gate\n\n- instruction following only, seed 0: the gate says no" in page
    assert "the gate refused it: the gate says no" in said


def test_refused_altogether_it_fails(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "run_locally", failing("gate", (0,)))
    with pytest.raises(UserError, match="refused every run"):
        compare(plan(config, [0]), tmp_path, lambda _: None)
    assert "the gate says no" in (tmp_path / "ablation.md").read_text() and not (tmp_path / "ablation.svg").exists()


def test_another_failure_ends_it_with_what_is_finished_written(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_numbers: None
) -> None:
    monkeypatch.setattr(ablation, "run_locally", failing("rl", (1,)))
    with pytest.raises(UserError, match="rl failed: the rl says no"):
        compare(plan(config, [0, 1]), tmp_path, lambda _: None)
    assert len(json.loads((tmp_path / "ablation.json").read_text())["runs"]) == 2


def test_the_newest_output_of_a_component_counts(tmp_path: Path) -> None:
    for i, name in enumerate(("firm-2", "firm-1")):
        path = tmp_path / "kfp" / name / "rl" / "policy"
        path.parent.mkdir(parents=True)
        path.write_text(name)
        os.utime(path, (i, i))
    assert local.newest(tmp_path, "rl/policy").read_text() == "firm-1"


@pytest.mark.endurance
def test_the_command_compares_and_resumes(config: RunConfig, tmp_path: Path) -> None:
    words = ["ablate", "rewards", str(tmp_path / "small.yaml"), "--seed", "0", "--set", f"store={tmp_path}/runs"]
    command = [sys.executable, "-m", "firm.cli", *words]
    pages = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "run 2 of 2: QMA, seed 0" in done.stdout
        pages.append((tmp_path / "runs" / "ablate-rewards-small" / "ablation.md").read_text())
    assert pages[0] == pages[1] and "| QMA, last epoch |" in pages[0]
    for name in ("base-only-seed-0", "qma-seed-0"):
        assert (tmp_path / "runs" / "ablate-rewards-small" / name / "report.html").exists()
