"""A run of two rounds: the second starts from the first one's policy and critic, and the chain of hashes goes on."""

import hashlib
import json
from pathlib import Path

import pytest
from shared import EDITING, GENERATION, events, finish, gate, generated, rendered, small_run

from firm.records import Manifest

pytestmark = pytest.mark.slow


def rounds(task: str) -> str:
    """The file of a run of two rounds."""
    few = rendered(64, task), generated(32, num_inference_steps=2, task=task)
    settings = """
critic: {answer_style: score_first}
sft: {batch_size: 8, max_steps: 4, checkpoint_steps: 2}
bench:
  num_bootstrap: 20
  sources: [{kind: policy, num_images: 8, num_inference_steps: 2}]
  gate: GATE
rl: {prompts_per_epoch: 2, group_size: 4, max_epochs: 2, num_inference_steps: 2, checkpoint_epochs: 1}
auditor: {every: 1, num_images: 8}
evaluate: {num_images: 8, batch_size: 8, num_inference_steps: 2, num_bootstrap: 20}
rounds: 2
further_rounds:
  curation:
    sources:
      - {kind: generated, name: kept, policy: kept, num_images: 64, num_inference_steps: 2}
  sft: {max_steps: 2}
  bench: {gate: GATE}
"""
    passing = gate({"metric": "coverage", "at_least": 0.9}, task=task)
    return small_run(*few, task=task, shard_size=32, batch_size=32) + settings.replace("GATE", passing)


@pytest.fixture(scope="module", params=[GENERATION, EDITING])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rounds")
    config = path / "rounds.yaml"
    config.write_text(rounds(request.param))
    finish(path, config)
    return path


def test_the_second_round_goes_on_from_the_first(folder: Path) -> None:
    made: dict[str, list[Manifest]] = {}
    digests: dict[str, str] = {}
    for path in sorted((folder / "small").glob("*-*/manifest.json"), key=lambda p: p.stat().st_mtime):
        manifest = Manifest.model_validate_json(path.read_text())
        made.setdefault(manifest.stage, []).append(manifest)
        digests[manifest.key] = hashlib.sha256(path.read_bytes()).hexdigest()
    first, second = ({stage: both[i] for stage, both in made.items()} for i in (0, 1))
    assert all(len(both) == 2 for both in made.values())
    policy, critic, report = (digests[first[stage].key] for stage in ("rl", "sft", "report"))
    assert not any("last_policy" in m.inputs for m in first.values())
    assert [second[s].inputs["last_policy"] for s in ("curation", "bench", "rl")] == [policy] * 3
    assert second["sft"].inputs["last_critic"] == critic and second["report"].inputs["last_report"] == report


def test_a_round_ends_with_its_report_before_the_next_begins(folder: Path) -> None:
    ended = [(e["round"], e["stage"]) for e in events(folder) if e.get("state") in ("finished", "reused")]
    assert [number for number, _ in ended] == [1] * 7 + [2] * 7
    assert ended[6] == (1, "report") and ended[13] == (2, "report")


def test_the_page_is_the_last_rounds_and_knows_both(folder: Path) -> None:
    page = (folder / "small" / "report.html").read_text()
    data = [json.loads(path.read_text()) for path in (folder / "small").glob("report-*/data.json")]
    assert sorted(len(each["rounds"]) for each in data) == [1, 2]
    assert "Round 2 of 2" in page
