"""What a person watches while a critic is trained."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from firm.metrics import Board
from firm.pace import memory
from firm.storage.artifacts import Output


class Watched(TrainerCallback):
    """The first rank's board: loss, gradient norm and learning rate of each step, examples a second and memory.

    Where held-out examples are judged, their numbers as well.
    """

    def __init__(self, out: Output) -> None:
        """The board is beside the artifact ``out``."""
        self._out = out
        self._board: Board | None = None
        self._last = (0, 0.0)  # step and time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the board; what it has of steps that are redone is not shown."""
        if state.is_world_process_zero:
            self._board = Board(self._out, state.global_step + 1)
            self._last = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write what the Trainer logs."""
        if self._board is None:
            return
        step, now = state.global_step, time.monotonic()
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = step - self._last[0]  # none, where what held-out examples have shown follows the loss
        speed = {"examples_a_second": steps * batch / max(now - self._last[1], 1e-9)} if steps else {}
        self._last = (step, now)
        plain = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._board.write(step, {**plain, **speed, **memory()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish the rest."""
        if self._board is not None:
            self._board.close()
