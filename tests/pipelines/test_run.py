"""The whole pipeline as a user runs it: through the command line and KFP's local runner, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared import gate, generated, rendered, small_run

from firm.config import STAGES
from firm.config.loading import load_config
from firm.records import Manifest

# Small enough for a test, large enough that every stage has several pieces to be killed between.
SOURCES = rendered(240), generated(96, num_inference_steps=4)
SMALL = small_run(*SOURCES, shard_size=64, batch_size=32)
SMALL += f"""
sft: {{batch_size: 8, max_steps: 24, checkpoint_steps: 8}}
bench:
  num_bootstrap: 50
  sources: [{{kind: policy, num_images: 96, num_inference_steps: 4}}]
  gate: {gate({"metric": "coverage", "at_least": 0.9})}
rl: {{prompts_per_epoch: 4, group_size: 4, max_epochs: 6, num_inference_steps: 4, checkpoint_epochs: 2}}
auditor: {{every: 3, num_images: 16}}
evaluate: {{num_images: 32, batch_size: 16, num_inference_steps: 4, num_bootstrap: 50}}
"""
# Where each kill strikes: in the middle of the stages that take long.
KILLS = [("curation", 150), ("sft", 12), ("bench", 32), ("rl", 3), ("evaluate", 16)]


def start(folder: Path, config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "firm.cli", "run", str(config), "--set", f"store={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, config: Path) -> str:
    process = start(folder, config)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + (folder / "small" / "run.log").read_text()[-3000:]
    return output


def events(folder: Path) -> list[dict[str, object]]:
    path = folder / "small" / "progress.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in(folder: Path, config: Path, stage: str, done: int, number: int = 1) -> None:
    """Start a run and kill -9 the command, and nothing else, once a stage of a round has done so much."""
    process = start(folder, config)
    deadline = time.monotonic() + 200
    while not any(
        (e["stage"], e["round"]) == (stage, number) and int(str(e.get("done", 0))) >= done for e in events(folder)
    ):
        assert process.poll() is None and time.monotonic() < deadline, f"never got to {stage} {done}"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def manifests(folder: Path) -> dict[str, Manifest]:
    found = [Manifest.model_validate_json(p.read_text()) for p in (folder / "small").glob("*-*/manifest.json")]
    return {m.stage: m for m in found}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    output = finish(folder, config)
    assert "The report is" in output
    return folder


def test_every_stage_leaves_an_artifact_and_the_report(whole: Path) -> None:
    assert sorted(manifests(whole)) == sorted(STAGES)
    assert "<html" in (whole / "small" / "report.html").read_text()[:2000].lower()
    finished = [e["stage"] for e in events(whole) if e.get("state") == "finished"]
    assert finished == list(STAGES)


def test_lineage_is_a_chain_of_hashes(whole: Path) -> None:
    import hashlib

    digests = {
        Manifest.model_validate_json(p.read_text()).stage: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (whole / "small").glob("*-*/manifest.json")
    }
    found = manifests(whole)
    assert found["sft"].inputs == {"data": digests["curation"]}
    assert found["rl"].inputs == {"critic": digests["sft"], "verdict": digests["gate"]}
    assert found["evaluate"].inputs == {"critic": digests["sft"], "policy": digests["rl"]}


def test_a_second_run_reuses_everything(whole: Path, config: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "small").glob("*-*/manifest.json")}
    finish(whole, config)
    assert [e["state"] for e in events(whole) if "state" in e and e["state"] != "started"] == ["reused"] * len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_killed_in_every_long_stage_it_ends_with_the_same_artifacts(whole: Path, config: Path, tmp_path: Path) -> None:
    for stage, done in KILLS:
        kill_in(tmp_path, config, stage, done)
    finish(tmp_path, config)
    mine = manifests(tmp_path)
    theirs = manifests(whole)
    for stage in STAGES[:-1]:  # the report shows timings
        assert mine[stage] == theirs[stage], f"{stage} differs after kills"
    leftovers = [p for p in (tmp_path / "small").glob("*-*/work") if p.exists()]
    assert not leftovers


def test_an_untrusted_critic_stops_the_run_before_rl(whole: Path, config: Path) -> None:
    strict = ["--set", "bench.gate.rules=[{metric: mae, at_most: 0.01}]"]
    command = [sys.executable, "-m", "firm.cli", "run", str(config), "--set", f"store={whole}", *strict]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 1
    assert "the critic is not trusted" in result.stderr and "must be at most 0.01" in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(e["stage"] == "rl" for e in events(whole))


def test_config_show_of_the_run_parses_back(config: Path) -> None:
    command = [sys.executable, "-m", "firm.cli", "config", "show", str(config), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    path = config.parent / "shown.yaml"
    path.write_text(shown)
    assert load_config(str(path)) == load_config(str(config))
