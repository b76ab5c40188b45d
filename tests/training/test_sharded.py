"""Two ranks that share a critic's parameters train as one process that has them all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from shared import python_path
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training.critics import request

from firm import dist
from firm.config.launch import LocalLaunch
from firm.launch.job import TrainingJob, worker_main
from firm.launch.launcher import launch
from firm.metrics import read_metrics
from firm.sft import train as worker
from firm.shapes.models import WEIGHTS
from firm.storage.artifacts import Output
from firm.storage.checkpoint import Checkpoints
from firm.storage.parts import Parts, local, write_part

disable_progress_bars()
STEPS = 12  # of 20 that an epoch has
KILLED = 8
EVALUATED = {"eval_steps": 5, "eval_examples": 20}  # also where a checkpoint is taken
WHOLE, STOPPED, RESUMED = "whole", "stopped", "resumed"


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Numbers that this rank holds: parameters, their gradients and the optimizer's states."""
    states = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(local(t).numel() for t in (*model.parameters(), *gradients, *states))


class Watched(worker.Reporter):
    """Remembers the most that this rank holds, and the model; may be killed after a step."""

    most = 0
    model: nn.Module
    killed_after = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Watched.model = kwargs["model"]
        Watched.most = max(Watched.most, held(kwargs["model"], kwargs["optimizer"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == Watched.killed_after:
            self.checkpoints.finish()
            raise KeyboardInterrupt


def asked(batch_size: int, **options: Any) -> dict[str, Any]:
    few = {"max_steps": STEPS, "checkpoint_steps": 5, "learning_rate": 1e-3, "sharding": "full"}
    return request(batch_size=batch_size, **{**few, **options})


def train(request: dict[str, Any], folder: Path, killed_after: int = 0) -> None:
    Watched.most, Watched.killed_after = 0, killed_after
    worker.Reporter = Watched  # type: ignore[misc]
    worker.train(request, {"data": Path(request["data"])}, Output.attach(str(folder)))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "critic" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def judged(folder: Path) -> list[dict[str, float]]:
    """What held-out examples have shown, by step."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name.startswith("eval/")} for line in lines]


@pytest.fixture
def together(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Runs the worker at the end of this file on two ranks; returns where it wrote."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", python_path(here, here.parent))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)

    def run(request: dict[str, Any]) -> Path:
        job = TrainingJob("run", "sft", Path(__file__).stem, {**request, "data": str(data)}, {})
        launch(job, Output.open(str(tmp_path / "two")), LocalLaunch(num_workers=2))
        return tmp_path / "two"

    return run


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EVALUATED, id="all"),
        pytest.param({"lora": {"rank": 4, "alpha": 8}, **EVALUATED}, id="lora"),
        pytest.param({"sharding": "none"}, id="copies", marks=pytest.mark.slow),
        pytest.param(
            {"gradient_accumulation": 2, "gradient_checkpointing": True}, id="accumulated", marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_that_share_the_parameters_train_as_one(
    together: Callable[[dict[str, Any]], Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    """The same loss from at most 0.6 of the memory; and resumed, by two or by one, as if never killed."""
    two = together(asked(8, **options))
    monkeypatch.setattr(worker, "Reporter", worker.Reporter)  # restored after the test
    alone = {**asked(16, **{**options, "sharding": "none"}), "data": str(data)}
    train(alone, tmp_path / "one")
    assert losses(two / WHOLE) == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    share = max(json.loads((two / f"most{rank}.json").read_text()) for rank in range(2)) / Watched.most
    assert share == 1 if "sharding" in options else share <= 0.6
    base, one, both = (
        load_file(WEIGHTS / "critic" / "model.safetensors"),
        weights(tmp_path / "one"),
        weights(two / WHOLE),
    )
    assert both.keys() == one.keys()
    way = sum((t - base[name]).square().sum() for name, t in one.items()) ** 0.5
    apart = sum((t - both[name]).square().sum() for name, t in one.items()) ** 0.5
    print(f"{share:.3f} of the memory, {apart / way:.5f} of the way apart")
    assert apart <= 0.02 * way, "the critic that is saved is the one that was trained"

    assert judged(two / WHOLE) == [pytest.approx(line, abs=0.02) for line in judged(tmp_path / "one")]
    assert any(judged(two / WHOLE)) == ("eval_steps" in options)
    assert judged(two / RESUMED) == judged(two / WHOLE)
    assert losses(two / RESUMED) == losses(two / WHOLE)
    whole, resumed = weights(two / WHOLE), weights(two / RESUMED)
    assert whole.keys() == resumed.keys() and all(torch.equal(t, resumed[name]) for name, t in whole.items())

    assert not (two / STOPPED / "critic").exists()
    train({**asked(16, **options), "data": str(data)}, two / STOPPED)
    assert losses(two / STOPPED)[:5] == losses(two / WHOLE)[:5], "from the checkpoint"
    assert losses(two / STOPPED) == pytest.approx(losses(two / WHOLE), rel=2e-4)


def work(request: dict[str, Any], inputs: Any, out: Output) -> None:
    """The worker of the tests above."""
    ranks = dist.start()
    train(request, out.folder / WHOLE)
    (out.folder / f"most{ranks.rank}.json").write_text(json.dumps(Watched.most))
    check_parts(out.folder / "parts", ranks)
    for folder in (STOPPED, RESUMED):
        try:
            train(request, out.folder / folder, KILLED)
        except KeyboardInterrupt:
            assert (Checkpoints(Output.attach(str(out.folder / folder))).last() or out.folder).name == "checkpoint-5"
    train(request, out.folder / RESUMED)


def check_parts(folder: Path, ranks: dist.Ranks) -> None:
    """Two ranks read what one has written."""
    trained = dict(Watched.model.named_parameters())
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    if ranks.is_main:
        write_part(folder, 0, 1, full)
    dist.barrier()
    parts = Parts(folder, ranks)
    assert all(torch.equal(parts.read(name, p), local(p)) for name, p in trained.items())


if __name__ == "__main__":
    worker_main(work)
