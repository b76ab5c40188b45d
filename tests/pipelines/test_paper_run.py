"""The paper's presets go through on two processes, with tiny models in the place of the big ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from shared import paper_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firm.config.loading import load_config
from firm.storage.artifacts import BOARD, MANIFEST


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gen-sd35-8xh100", "critic-gen-8b"])
def test_it_goes_through(preset: str, tmp_path: Path) -> None:
    has = load_config(preset)
    path = tmp_path / "small.yaml"
    path.write_text(paper_run(preset))
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
