"""Planted critics against the gate and the auditor of the preset gen-shapes: `make planted`.

Every critic, on every seed, goes through the stages bench and gate as a trained critic would, and where the gate lets
it pass, through RL. A row is written when a critic is done, RL resumes from its checkpoints, and what is in the rows is
not run again. The rows are rendered into docs/trust.md.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from planted.critics import BAD, GOOD, Planted
from planted.table import ROWS, Row, read_rows, render

from firm.bench import run as bench
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.critics.load import open_judge
from firm.gate import run as gate
from firm.records import UserError, Verdict
from firm.rl import train as rl
from firm.rl.audit import Audit
from firm.stage import execute
from firm.storage.artifacts import Output
from firm.storage.inputs import open_input, read_ref

SEEDS = (0, 1, 2)
TEST_IMAGES = 300  # of each source of curation, before its scores are balanced


def planted_config(seed: int, store: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The preset with the curation of test examples alone, as no critic is trained."""
    config = load_config("gen-shapes", [f"seed={seed}", f"store={store}", "name=planted", *overrides])
    sources = [s.model_copy(update={"num_images": 2 * TEST_IMAGES}) for s in config.curation.sources]
    curation = config.curation.model_copy(update={"sources": sources, "test_share": 0.5})
    return config.model_copy(update={"curation": curation})


def curated(config: RunConfig, folder: Path) -> Path:
    """Folder of the curated examples, made or found."""
    folder.mkdir(parents=True, exist_ok=True)
    pointer = folder / f"data-{config.seed}.json"
    execute("curation", config.model_dump(mode="json"), {}, str(pointer))
    return open_input(read_ref(pointer))


@contextmanager
def in_place_of_a_trained_one(critic: Planted) -> Iterator[None]:
    """Bench and RL load this critic."""
    with patch.object(bench, "load_critic", lambda *_: critic), patch.object(rl, "load_critic", lambda *_: critic):
        yield
