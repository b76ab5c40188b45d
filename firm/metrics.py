"""Metrics of a training run: one line per step in its artifact, and what a person watches beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firm.images import decode_image
from firm.storage.artifacts import BOARD, Output

PUBLISH_EVERY_S = 60.0
SHOWN = 16
"""Images of a grid."""
SIDE = 128
"""Pixels of a side of an image in a grid: a board is published again and again, as a whole."""


class Board:
    """TensorBoard's files beside an artifact, in its folder ``tensorboard``: published while they grow, and kept.

    They hold what differs between equal runs, such as speed, so they are no part of the artifact.
    """

    def __init__(self, out: Output, keep: int) -> None:
        """``keep``: later steps of earlier attempts belong to work that is being redone."""
        from torch.utils.tensorboard import SummaryWriter

        self._out = out
        self._writer = SummaryWriter(str(out.folder / BOARD), purge_step=keep)
        self._published = time.monotonic()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values at ``step``."""
        for name, value in ((n, v) for n, v in values.items() if v is not None):
            self._writer.add_scalar(name, value, step)
        self._publish(PUBLISH_EVERY_S)

    def show(self, step: int, name: str, images: Sequence[bytes]) -> None:
        """Write a grid of the first images at ``step``; nothing where there are none."""
        import numpy as np

        small = [np.asarray(decode_image(png, name).resize((SIDE, SIDE))) for png in images[:SHOWN]]
        if small:
            self._writer.add_images(name, np.stack(small), step, dataformats="NHWC")
            self._publish(PUBLISH_EVERY_S)

    def close(self) -> None:
        """Flush, publish and close."""
        self._publish(0)
        self._writer.close()

    def _publish(self, every_s: float) -> None:
        if time.monotonic() - self._published >= every_s:
            self._writer.flush()
            self._out.publish(BOARD)
            self._published = time.monotonic()


class MetricsLog:
    """Metrics of a training run: ``metrics.jsonl``, the same in equal runs, and a board beside the artifact."""

    def __init__(self, path: Path, board: Board, keep: int) -> None:
        """Append to ``path`` after its first ``keep`` lines; later lines belong to work that is being redone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
        path.write_text("".join(lines))
        self._file = open(path, "a")  # noqa: SIM115 (closed in close)
        self.board = board

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one line of values at ``step``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self.board.write(step, values)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
