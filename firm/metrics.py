"""Metrics of a training run, one line per step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Metrics of a training run: ``metrics.jsonl`` (deterministic) and TensorBoard events next to the artifact."""

    def __init__(self, path: Path, tensorboard: Path, keep: int) -> None:
        """Append to ``path`` after its first ``keep`` lines; later lines belong to work that is being redone."""
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
        path.write_text("".join(lines))
        self._file = open(path, "a")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(str(tensorboard), purge_step=keep)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one line of values at ``step``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in ((n, v) for n, v in values.items() if v is not None):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
