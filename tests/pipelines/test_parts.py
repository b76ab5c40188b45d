"""Runs that have some of the stages: a critic alone, a critic that is there already, RL with a served critic."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import run_stages, stay_here
from shared import DIMENSIONS, GENERATION, HTTPRequest, events, finish, gate, serving
from typer.testing import CliRunner

from firm import preflight
from firm.cli import app
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.records import Manifest, Summary, UserError, Verdict
from firm.shapes import generation, teacher
from firm.stage import execute
from pipelines.local import StageFailed

BASE, BONUS = DIMENSIONS[GENERATION]
RULES = {"rules": [{"metric": "coverage", "at_least": 0}]}
SHORT = {d: f"short_{d}" for d in DIMENSIONS[GENERATION]}
FILES = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's images, a file that names them with their prompts, and one that has people's scores as well."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for i in range(FILES):
        prompt, image = generation.candidate(i, 5, "train")
        image.save(folder / f"{i}.png")
        scores = {BASE: teacher.instruction_following(prompt, image), BONUS: 1 + i % 5}
        rows.append({"prompt": prompt, "image": f"{i}.png", "scores": scores})
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "candidates.jsonl").write_text("\n".join(json.dumps({**row, "scores": None}) for row in rows))
    return folder


def written(folder: Path, **plain: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"name": "small", **plain}))
    return path


def critic_alone(images: Path, **changes: Any) -> dict[str, Any]:
    """Without prompts: which of them are held out follows from their texts."""
    source = {"kind": "files", "name": "mine", "path": str(images / "candidates.jsonl")}
    return {
        "base": "critic-gen-shapes",
        "prompts": None,
        "curation": {"sources": [source], "shard_size": 32, "batch_size": 32},
        "sft": {"batch_size": 8, "max_steps": 3},
        "bench": {"num_bootstrap": 20, "gate": RULES},
        **changes,
    }


def measured(images: Path, **changes: Any) -> dict[str, Any]:
    """A critic that is there: the shapes' one, which has not learned to judge."""
    sources = [{"kind": "scores", "name": "people", "path": str(images / "scores.jsonl")}]
    critic = {"kind": "existing", "model": "pkg://firm.shapes/weights/critic", "answer_style": "score_first"}
    return {
        "critic": {**critic, "rubrics": SHORT, "dtype": "float32"},
        "bench": {"num_bootstrap": 20, "sources": sources, "gate": RULES},
        **changes,
    }


def artifacts(folder: Path) -> dict[str, Path]:
    """Stage -> its artifact."""
    found = [path.parent for path in (folder / "small").glob("*-*/manifest.json")]
    return {Manifest.model_validate_json((path / "manifest.json").read_text()).stage: path for path in found}


def summary(artifact: Path) -> Summary:
    return Summary.model_validate_json((artifact / "summary.json").read_text())


@pytest.mark.slow
def test_a_critic_alone_is_trained_measured_and_gated(tmp_path: Path, images: Path) -> None:
    output = finish(tmp_path, written(tmp_path, **critic_alone(images)))
    assert "The report is" in output
    stages = ["curation", "sft", "bench", "gate", "report"]
    assert [e["stage"] for e in events(tmp_path) if e.get("state") == "finished"] == stages
    made = artifacts(tmp_path)
    assert set(made) == set(stages)
    verdict = Verdict.model_validate_json((made["gate"] / "verdict.json").read_text())
    assert verdict.gaps == [f"{d}.{what}" for d in SHORT for what in ("skill_low", "pairwise")]
    data = json.loads((made["report"] / "data.json").read_text())
    assert [row["name"] for row in data["lineage"]] == ["verdict", "bench", "critic", "data"]
    assert [h["title"].split(":")[0] for h in data["headlines"]] == ["The critic is trusted"]
    page = (tmp_path / "small" / "report.html").read_text()
    assert "it had no RL" in page and "What the critic learned from" in page
    assert 'id="samples"' not in page and 'id="rl"' not in page


def test_a_critic_that_is_there_is_measured_and_gated(tmp_path: Path, images: Path) -> None:
    finish(tmp_path, written(tmp_path, **measured(images)))
    made = artifacts(tmp_path)
    assert set(made) == {"bench", "gate", "report"}
    manifest = Manifest.model_validate_json((made["bench"] / "manifest.json").read_text())
    assert manifest.inputs == {}
    rows = summary(made["bench"]).tables["agreement"]
    assert {(row["judge"], row["whose"]) for row in rows} == {("critic", "people")}
    assert not summary(made["bench"]).notes, "nobody knows what such a critic was trained on"
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Can the critic be trusted?" in page and 'id="data"' not in page
    [headline] = json.loads((made["report"] / "data.json").read_text())["headlines"]
    lacking = ", ".join(f"{d}.{what}" for d in SHORT for what in ("skill_low", "pairwise"))
    assert f"No rule looks at {lacking} on images of a policy, so rl refuses this critic." in headline["text"]


def in_process(folder: Path, monkeypatch: pytest.MonkeyPatch, **plain: Any) -> dict[str, Path]:
    stay_here(monkeypatch)
    config = load_config(str(written(folder, **plain)), [f"store={folder}"])
    preflight.check(config)
    run_stages(config, folder)
    return artifacts(folder)


def test_a_critic_that_is_there_is_measured_on_what_a_teacher_judges(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = measured(images)["critic"]
    made = in_process(tmp_path, monkeypatch, **critic_alone(images, critic=critic))
    assert summary(made["sft"]).notes == ["The critic is used as it is: nothing was trained."]
    assert not (made["sft"] / "critic").exists()
    assert {row["whose"] for row in summary(made["bench"]).tables["agreement"]} == {"teacher"}


def test_data_alone_and_a_report_that_says_so(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = measured(images)["critic"]
    made = in_process(tmp_path, monkeypatch, **critic_alone(images, critic=critic, bench=None))
    assert set(made) == {"curation", "sft", "report"}
    assert summary(made["report"]).notes == ["Whether the critic can be trusted is not known."]


def test_a_critic_that_fails_ends_the_run_at_the_gate(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = {**measured(images)["bench"], "gate": {"rules": [{"metric": "mae", "at_most": 0.01}]}}
    with pytest.raises(StageFailed) as failed:
        in_process(tmp_path, monkeypatch, **measured(images, bench=strict))
    assert failed.value.stage == "gate" and set(artifacts(tmp_path)) == {"bench"}


# ---- RL with a served critic


def answer(request: HTTPRequest) -> None:
    """A served critic that sees nothing: its score follows from the question."""
    score = 1 + len(request.body) % 5
    said = {"choices": [{"message": {"content": f"Score: {score}"}, "finish_reason": "stop"}]}
    request.reply(200, json.dumps(said).encode())


def served(url: str, rules: str = "") -> dict[str, Any]:
    few = {"num_images": 8, "num_inference_steps": 1}
    bench = {"num_bootstrap": 20, "point_estimate": "score", "sources": [{"kind": "policy", **few}]}
    endpoint = {"kind": "endpoint", "base_url": f"{url}/v1", "model": "m", "logprobs": False}
    return {
        "base": GENERATION,
        "curation": {"sources": []},
        "critic": {"kind": "endpoint", "endpoint": endpoint, "rubrics": SHORT},
        "bench": {**bench, "gate": json.loads(rules or gate({"metric": "coverage", "at_least": 0.9}))},
        "reward": {"soft": False},
        "rl": {"prompts_per_epoch": 2, "group_size": 2, "max_epochs": 2, "num_inference_steps": 1},
        "auditor": {"num_images": 8, "every": 1},
        "evaluate": {**few, "batch_size": 8, "num_bootstrap": 20},
    }  # fmt: skip


def test_a_served_critic_is_gated_on_the_policys_images_and_steers_rl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(answer) as url:
        made = in_process(tmp_path, monkeypatch, **served(url))
    assert set(made) == {"bench", "gate", "rl", "evaluate", "report"}
    rows = summary(made["bench"]).tables["agreement"]
    assert {(row["judge"], row["whose"]) for row in rows} == {("critic", "teacher"), ("auditor", "teacher")}
    manifest = Manifest.model_validate_json((made["rl"] / "manifest.json").read_text())
    assert set(manifest.inputs) == {"verdict"}
    assert 'id="rl"' in (made["report"] / "report.html").read_text()


def test_a_served_critic_that_fails_never_steers_rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = gate({"metric": "mae", "source": "policy", "at_most": 0.01})
    with serving(answer) as url, pytest.raises(StageFailed) as failed:
        in_process(tmp_path, monkeypatch, **served(url, strict))
    assert failed.value.stage == "gate" and set(artifacts(tmp_path)) == {"bench"}


def of_critic(images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], RunConfig]:
    """The inputs of RL as a run of the critic alone has left them, and a configuration with RL."""
    made = in_process(folder, monkeypatch, **critic_alone(images))
    assert made["gate"]
    pointers = folder / "kfp" / "firm-1"
    inputs = {"critic": str(pointers / "sft" / "critic"), "verdict": str(pointers / "gate" / "verdict")}
    few = ["rl.max_epochs=1", "rl.prompts_per_epoch=2", "rl.group_size=2", "auditor.num_images=8", "auditor.every=1"]
    return inputs, load_config(GENERATION, [f"store={folder}", "name=small", *few])


def test_the_verdict_on_a_critic_that_was_never_shown_the_policy_is_not_enough_for_rl(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, config = of_critic(images, tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        execute("rl", config.model_dump(mode="json"), inputs, str(tmp_path / "policy"))
    assert ended.value.code == 2
    assert "has passed no rule for instruction_following.skill_low" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_a_run_without_work_is_refused_before_anything_starts(tmp_path: Path, images: Path) -> None:
    path = written(tmp_path, **critic_alone(images, curation=None))
    result = CliRunner().invoke(app, ["run", str(path), "--set", f"store={tmp_path}/runs"])
    assert isinstance(result.exception, UserError)
    assert "nothing from which the critic could learn" in str(result.exception)
    assert not (tmp_path / "runs").exists()
