"""The whole pipeline as a user runs it: through the command line and KFP's local runner, killed and resumed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from in_process import run_stages, stay_here
from shared import DIMENSIONS, EDITING, events, finish, gate, generated, kill_in, rendered, small_run

from firm.config import STAGES, RunConfig
from firm.config.loading import load_config
from firm.metrics import read_metrics
from firm.progress import PROGRESS_FILE
from firm.records import Example, JudgedCandidate, Manifest, Sample, Summary
from firm.storage.shards import iter_shards

# Small enough for a test, large enough that every stage has several pieces to be killed between.
SOURCES = rendered(240), generated(96, num_inference_steps=4)
SETTINGS = """
sft: {batch_size: 8, max_steps: 24, checkpoint_steps: 8}
bench:
  num_bootstrap: 50
  sources: [{kind: policy, num_images: 96, num_inference_steps: 4}]
  gate: GATE
rl: {prompts_per_epoch: 4, group_size: 4, max_epochs: 6, num_inference_steps: 4, checkpoint_epochs: 2}
auditor: {every: 3, num_images: 16}
evaluate: {num_images: 32, batch_size: 16, num_inference_steps: 4, num_bootstrap: 50}
"""
SMALL = small_run(*SOURCES, shard_size=64, batch_size=32)
SMALL += SETTINGS.replace("GATE", gate({"metric": "coverage", "at_least": 0.9}))
# Smaller still, and in this process: that a stage resumes does not depend on the task.
FEW_EDITS = rendered(48, EDITING), generated(16, 2, EDITING)
EDITS = small_run(*FEW_EDITS, task=EDITING, shard_size=64, batch_size=32)
EDITS += SETTINGS.replace("GATE", gate({"metric": "coverage", "at_least": 0.9}, task=EDITING))
# Where each kill strikes: in the middle of the stages that take long.
KILLS = [("curation", 150), ("sft", 12), ("bench", 32), ("rl", 3), ("evaluate", 16)]


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


@pytest.mark.slow
def test_killed_in_every_long_stage_it_ends_with_the_same_artifacts(whole: Path, config: Path, tmp_path: Path) -> None:
    for stage, done in KILLS:
        kill_in(tmp_path, config, stage, done)
    finish(tmp_path, config)
    mine = manifests(tmp_path)
    theirs = manifests(whole)
    for stage in STAGES:
        assert mine[stage] == theirs[stage], f"{stage} differs after kills"
    leftovers = [p for p in (tmp_path / "small").glob("*-*/work") if p.exists()]
    assert not leftovers


@pytest.mark.slow
def test_an_untrusted_critic_stops_the_run_before_rl(whole: Path, config: Path) -> None:
    strict = ["--set", "bench.gate.rules=[{metric: mae, at_most: 0.01}]"]
    command = [sys.executable, "-m", "firm.cli", "run", str(config), "--set", f"store={whole}", *strict]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 1
    assert "the critic is not trusted" in result.stderr and "must be at most 0.01" in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(e["stage"] == "rl" for e in events(whole))


def test_config_show_of_the_run_parses_back(config: Path) -> None:
    command = [sys.executable, "-m", "firm.cli", "config", "show", str(config)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    path = config.parent / "shown.yaml"
    path.write_text(shown)
    assert load_config(str(path)) == load_config(str(config))


# ---- edits


def few(folder: Path) -> RunConfig:
    """Edits through everything in seconds; every epoch with a copy raises an alarm."""
    path = folder / "edits.yaml"
    path.write_text(EDITS)
    trial = [
        "critic.answer_style=score_first",
        "sft.max_steps=4",
        "bench.sources=[{kind: policy, num_images: 16, num_inference_steps: 2}]",
    ]
    steps = ["rl.prompts_per_epoch=4", "rl.max_epochs=2", "rl.num_inference_steps=8", "rl.checkpoint_epochs=1"]
    looks = ["rl.monitors={window: 1, copies: 0}", "auditor.every=1", "auditor.num_images=8", "evaluate.num_images=8"]
    return load_config(str(path), [f"store={folder}", *trial, *steps, *looks])


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of edits."""
    folder = tmp_path_factory.mktemp("edited")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_here(monkeypatch)
        monkeypatch.setenv(PROGRESS_FILE, str(folder / "progress.jsonl"))
        monkeypatch.setattr("firm.progress.EVENT_EVERY_S", 0.0)
        run_stages(few(folder), folder)
    yield folder


def artifact(folder: Path, stage: str) -> Path:
    [found] = (folder / "small").glob(f"{stage}-*")
    return found


@pytest.mark.parametrize(
    ("stage", "name", "model"),
    [
        ("curation", "judged", JudgedCandidate),
        ("curation", "train", Example),
        ("bench", "judged", JudgedCandidate),
        ("evaluate", "samples", Sample),
    ],
)
def test_every_edit_that_is_kept_is_behind_its_own_source(
    edited: Path, stage: str, name: str, model: type[JudgedCandidate] | type[Example] | type[Sample]
) -> None:
    rows: list[JudgedCandidate | Example | Sample] = list(iter_shards(artifact(edited, stage) / name, model))
    sources: dict[str | None, bytes] = {}
    for row in rows:
        source, _ = row.images
        assert row.prompt.image and sources.setdefault(row.prompt.image, source) == source
    assert len(set(sources.values())) > 1


def test_edits_are_judged_trusted_rewarded_and_reported(edited: Path) -> None:
    assert sorted(manifests(edited)) == sorted(STAGES)
    summaries = {
        stage: Summary.model_validate_json((artifact(edited, stage) / "summary.json").read_text()) for stage in STAGES
    }
    assert summaries["bench"].metrics["trusted"] == 1
    untouched = [r for r in summaries["bench"].tables["agreement"] if (r["judge"], r["by"]) == ("critic", "seen")]
    assert {r["dimension"]: r["constant_score"] for r in untouched} == {"execution": 1, "consistency": 5}
    gained = [row for row in summaries["evaluate"].tables["scores"] if row["policy"] == "gain"]
    measures = ("reward", *DIMENSIONS[EDITING])
    assert {(row["judge"], row["dimension"]) for row in gained} == set(product(("auditor", "critic"), measures))
    assert "FIRM improves an image editor" in (artifact(edited, "report") / "report.html").read_text()


def test_copies_are_watched_and_raise_alarms(edited: Path) -> None:
    """In the numbers of each epoch, in the progress and in the summary."""
    lines = read_metrics(artifact(edited, "rl") / "metrics.jsonl")
    assert len(lines) == 2 and all(line["alarms"] == (line["copies"] > 0) for line in lines)
    assert any(line["copies"] for line in lines)
    told = [json.loads(line) for line in (edited / "progress.jsonl").read_text().splitlines()]
    notes = {event["done"]: event["note"] for event in told if event["stage"] == "rl" and event.get("done")}
    for note, line in zip(notes.values(), lines, strict=True):
        assert ("; ALARM: " in note) == bool(line["alarms"])
    summary = Summary.model_validate_json((artifact(edited, "rl") / "summary.json").read_text())
    assert [row["monitor"] for row in summary.tables["alarms"]] == ["copies"]
    assert all("copies" in row for row in summary.tables["audits"])


@pytest.mark.slow
def test_a_critic_that_reasons_first_is_trained_trusted_and_steers_rl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay_here(monkeypatch)
    path = tmp_path / "edits.yaml"
    path.write_text(small_run(rendered(400, EDITING), task=EDITING) + EDITS[EDITS.index("\nsft:") :])
    learned = ["sft.max_steps=150", "sft.checkpoint_steps=150", "rl.max_epochs=2", "auditor.every=1"]
    config = load_config(str(path), [f"store={tmp_path}", *learned])
    assert config.critic.answer_style == "reason_first"
    run_stages(config, tmp_path)
    judged = [json.loads(line)["outcome"] for line in (artifact(tmp_path, "bench") / "critic.jsonl").open()]
    read = [outcome for outcome in judged if outcome["kind"] == "judgement"]
    assert len(read) >= 0.9 * len(judged) and all(o["rationale"] and sum(o["distribution"]) > 0.99 for o in read)
    assert all(line["reward"] is not None for line in read_metrics(artifact(tmp_path, "rl") / "metrics.jsonl"))
    assert sorted(manifests(tmp_path)) == sorted(STAGES)
