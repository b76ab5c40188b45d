"""The critic learns from rendered examples, and a resumed run is the uninterrupted one."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from shared import CPU
from training.critics import CRITIC, DIMENSION, request

from firm.config import CriticConfig, SFTConfig
from firm.critics.encoder import Encoder
from firm.critics.judge import JudgeInput, soft_scores
from firm.critics.local import LocalCritic, load_processor
from firm.metrics import read_metrics
from firm.records import Example, Judgement, UserError
from firm.sft import train as worker
from firm.sft.train import Collator, prepare
from firm.shapes.models import WEIGHTS
from firm.storage.artifacts import Output
from firm.storage.checkpoint import Checkpoints
from firm.storage.shards import iter_shards

disable_progress_bars()


def train(data: Path, out: Path, last_critic: Path | None = None, **changes: Any) -> None:
    inputs = {"data": data} | ({"last_critic": last_critic} if last_critic else {})
    worker.train(request(**changes), inputs, Output.open(str(out)))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "critic" / "model.safetensors")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


def test_the_critic_learns(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out")
    found = losses(tmp_path / "out")
    assert len(found) == 100 and found[-1] < found[0] / 2
    critic = LocalCritic(tmp_path / "out" / "critic", CRITIC, CPU)
    examples = list(iter_shards(data / "test", Example))
    assessments = critic.judge([JudgeInput(e.prompt, e.images) for e in examples])
    scores = [s for s in soft_scores(assessments, DIMENSION) if s is not None]
    truth = [e.score for e in examples]
    usual = fmean(e.score for e in iter_shards(data / "train", Example))
    error = fmean(abs(a - b) for a, b in zip(scores, truth, strict=True))
    assert error < fmean(abs(usual - t) for t in truth), "no better than always saying the mean"
    hard = {outcome.score for a in assessments if isinstance(outcome := a[DIMENSION], Judgement)}
    assert len(hard) > 1


def test_without_a_learning_rate_nothing_is_learnt(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", max_steps=3, learning_rate=1e-12)
    start = load_file(WEIGHTS / "critic" / "model.safetensors")
    assert all(torch.allclose(start[name].float(), t, atol=1e-6) for name, t in weights(tmp_path / "out").items())


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["whole", "lora"])
def test_a_vision_tower_may_stay_as_it_is(data: Path, tmp_path: Path, lora: dict[str, int] | None) -> None:
    start = load_file(WEIGHTS / "critic" / "model.safetensors")
    for train_vision in (True, False):
        out = tmp_path / str(train_vision)
        train(data, out, max_steps=2, lora=lora, train_vision=train_vision, warmup_ratio=0.0)
        changed = {
            name for name, tensor in weights(out).items() if not torch.equal(tensor, start[name].to(tensor.dtype))
        }
        assert any("visual" in name for name in changed) == train_vision
        assert any("language_model" in name for name in changed)


class Seen(worker.Reporter):
    """Keeps what training ends with."""

    trained: dict[str, torch.Tensor]
    moments: list[torch.Tensor]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        Seen.trained = {name: p.detach().clone() for name, p in named if p.requires_grad}
        Seen.moments = [t for state in kwargs["optimizer"].state.values() for t in state.values() if t.dim()]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["whole", "lora"])
def test_steps_smaller_than_bfloat16_can_tell_are_not_lost(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, int] | None
) -> None:
    """A critic in bfloat16: what trains and the optimizer's moments are float32."""
    monkeypatch.setattr(worker, "Reporter", Seen)
    asked = request(max_steps=5, batch_size=8, learning_rate=1e-5, lora=lora)
    asked["critic"]["dtype"] = "bfloat16"
    worker.train(asked, {"data": data}, Output.open(str(tmp_path / "out")))
    start = prepare(CriticConfig.model_validate(asked["critic"]), SFTConfig.model_validate(asked["sft"]), 0)
    before = dict(start.named_parameters())
    assert {t.dtype for t in (*Seen.trained.values(), *Seen.moments)} == {torch.float32}
    matrices = {name: p for name, p in Seen.trained.items() if p.dim() > 1 and "embed" not in name}
    moved = [(p != before[name]).float().mean().item() for name, p in matrices.items()]
    assert fmean(moved) > 0.9, f"only {fmean(moved):.1%} of what trains has moved"
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_further_round_goes_on_from_the_last_critic(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "first", max_steps=3)
    train(data, tmp_path / "second", tmp_path / "first", max_steps=1, learning_rate=1e-12)
    train(data, tmp_path / "other", max_steps=1, learning_rate=1e-12)
    first, second, other = (weights(tmp_path / name) for name in ("first", "second", "other"))
    assert all(torch.allclose(t, second[k], atol=1e-6) for k, t in first.items())
    assert not all(torch.allclose(t, other[k], atol=1e-4) for k, t in first.items())


def test_only_answers_are_in_the_loss(data: Path) -> None:
    encoder = Encoder(load_processor(CRITIC.model))
    rows = [e.model_dump() for e in list(iter_shards(data / "train", Example))[:5]]
    batch = Collator(encoder)([{**r, "images": [{"bytes": png} for png in r["images"]]} for r in rows])
    for row, labels, tokens in zip(rows, batch["labels"], batch["input_ids"], strict=True):
        answer = encoder.answers([row["messages"][1]["content"]])[0]
        kept = labels != -100
        assert tokens[kept].tolist() == labels[kept].tolist() == answer
        assert answer[-1] == encoder.tokenizer.eos_token_id
        start = int(kept.int().argmax())
        assert kept[start : start + len(answer)].all()
        assert encoder.tokenizer.decode(tokens[:start]).endswith("<|im_start|> assistant")


class Killed(worker.Reporter):
    """Stands for a kill -9 at a step."""

    def __init__(self, checkpoints: Checkpoints, at: int) -> None:
        super().__init__(checkpoints)
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == self.at:
            self.checkpoints.finish()  # what is stored in the background had time enough
            raise KeyboardInterrupt


Options = dict[str, Any]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole"),
        pytest.param({"gradient_accumulation": 2, "batch_size": 4}, id="accumulated", marks=pytest.mark.slow),
        pytest.param({"lora": {"rank": 4, "alpha": 8}}, id="lora"),
        pytest.param({"optimizer": "muon"}, id="muon", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted(data: Path, tmp_path: Path, options: Options) -> None:
    options = {"max_steps": 20, "checkpoint_steps": 10, "batch_size": 8, **options}  # the loss is logged every 10 steps
    train(data, tmp_path / "whole", **options)
    kill_at(data, tmp_path, 13, options)
    assert not (tmp_path / "parts" / "critic").exists()
    train(data, tmp_path / "parts", **options)
    a = weights(tmp_path / "whole")
    b = weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.parametrize(
    "file",
    ["part-0-of-1.safetensors"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("trainer_state.json", "checkpoint.json")],
)
def test_a_damaged_checkpoint_trains_no_other_critic(data: Path, tmp_path: Path, file: str, capfd: Any) -> None:
    options = {"max_steps": 20, "checkpoint_steps": 10, "batch_size": 4}
    train(data, tmp_path / "whole", **options)
    kill_at(data, tmp_path, 13, options)
    path = tmp_path / "parts" / "work" / "checkpoints" / "checkpoint-10" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train(data, tmp_path / "parts", **options)
    a = weights(tmp_path / "whole")
    b = weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "checkpoint-10 is damaged" in capfd.readouterr().out


def kill_at(data: Path, tmp_path: Path, step: int, options: Options) -> None:
    """Train and be killed; Reporter is where the worker looks for its callbacks."""
    real: Callable[..., Any] = worker.Reporter
    try:
        worker.Reporter = lambda checkpoints: Killed(checkpoints, step)  # type: ignore[assignment,misc]
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "parts", **options)
    finally:
        worker.Reporter = real  # type: ignore[assignment,misc]


def test_a_checkpoint_is_also_taken_when_time_has_passed(data: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "checkpoint_steps": 100, "checkpoint_minutes": 1e-9, "batch_size": 4}
    train(data, tmp_path / "out", **options)
    kept = sorted(path.name for path in (tmp_path / "out" / "work" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]


def test_a_damaged_shard_is_said_and_nothing_is_read_any_more(data: Path, tmp_path: Path) -> None:
    """Rows are read by a thread, whose errors come through."""
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "train" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    for place in range(1000, len(content) // 2, 1000):
        content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"corrupt.*{shard.name}"):
        train(tmp_path / "data", tmp_path / "out", max_steps=40, batch_size=8)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_checkpoints_hold_no_pickle(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", max_steps=12, checkpoint_steps=10, batch_size=8)
    written = {p.name for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith("events.")}
    assert "part-0-of-1.safetensors" in written
    pickled = {n for n in written if n.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))}
    assert not pickled, f"pickles: {sorted(pickled)}"


def test_few_steps_are_reported(data: Path, tmp_path: Path) -> None:
    """The sft stage reads the last loss, however short the training."""
    train(data, tmp_path / "out", max_steps=3, batch_size=8)
    assert losses(tmp_path / "out")
