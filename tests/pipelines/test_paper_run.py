"""The paper's presets go through on two processes, with tiny models in the place of the big ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared import TINY, gate, rendered
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firm.config.loading import load_config
from firm.storage.artifacts import BOARD, MANIFEST

TEACHER = {"kind": "python", "target": "firm.shapes.teacher:PixelTeacher"}
FEW = {"num_images": 8, "num_inference_steps": 2}
WITHOUT = ("policy", "reward", "rl", "auditor", "evaluate", "prompts")
# What two cores and models of a million parameters cannot do as the paper does. All other keys are the preset's.
SMALL: dict[str, Any] = {
    "prompts": {"function": "firm.shapes.generation:prompts"},
    "policy": {"model": TINY.model, "resolution": 32, "max_sequence_length": 1},
    "curation": {"planner": TEACHER, "evaluator": TEACHER, "sources": [rendered(96)], "shard_size": 32},
    # It has not learned to reason: what it says first is read as its score.
    "critic": {"model": "pkg://firm.shapes/weights/critic", "answer_style": "score_first"},
    "sft": {"max_steps": 2},
    "bench": {
        "num_bootstrap": 20,
        "sources": [{"kind": "policy", "name": "policy", **FEW}],
        "gate": json.loads(gate({"metric": "coverage", "at_least": 0})),
    },
    "rl": {"prompts_per_epoch": 2, "group_size": 4, "max_epochs": 2, "num_inference_steps": 3},
    "auditor": {"judge": TEACHER, "num_images": 8, "every": 1},
    "evaluate": {**FEW, "num_bootstrap": 20},
    "launch": {"num_workers": 2, "gpus": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gen-sd35-8xh100", "critic-gen-8b"])
def test_it_goes_through(preset: str, tmp_path: Path) -> None:
    has = load_config(preset)
    small = {key: section for key, section in SMALL.items() if getattr(has, key) is not None or key == "prompts"}
    if has.policy is None:
        small["bench"] = {**SMALL["bench"], "sources": []}
        small["bench"]["gate"] = {"rules": SMALL["bench"]["gate"]["rules"]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"base": preset, "name": "small", **small}))
    command = [sys.executable, "-m", "firm.cli", "run", str(path), "--set", f"store={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    log = tmp_path / "small" / "run.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-5000:] if log.exists() else "")
    made = {found.parent.name.partition("-")[0] for found in (tmp_path / "small").glob(f"*/{MANIFEST}")}
    assert {"curation", "sft", "bench", "gate", "report"} | ({"rl", "evaluate"} if has.rl else set()) == made
    assert {"loss", "examples_a_second", "memory/process_gb"} <= watched(tmp_path, "sft")["scalars"]
    if has.rl:
        board = watched(tmp_path, "rl")
        parts = {f"seconds/{part}" for part in ("sampling", "judging", "updating", "audit")}
        assert {*parts, "images_a_second", "memory/process_gb", "reward"} <= board["scalars"]
        assert "audit" in board["images"]


def watched(folder: Path, stage: str) -> dict[str, set[str]]:
    """Tags of what a person could watch of a stage, by kind."""
    [board] = (folder / "small").glob(f"{stage}-*/{BOARD}")
    found = EventAccumulator(str(board))
    found.Reload()
    return {kind: set(tags) for kind, tags in found.Tags().items() if isinstance(tags, list)}
