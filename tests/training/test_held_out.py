"""Held-out examples are judged while a critic trains: by the bench's numbers, and training is as without."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from shared import CPU
from training.critics import CRITIC, DIMENSION
from training.test_sft_learns import kill_at, train, weights

from firm.critics.agreement import Expected, Prediction, agreement
from firm.critics.judge import JudgeInput
from firm.critics.local import LocalCritic
from firm.metrics import read_metrics
from firm.records import Example, UserError
from firm.sft.held_out import HeldOut
from firm.storage.shards import ShardWriter, iter_shards

disable_progress_bars()
FEW = {"max_steps": 12, "checkpoint_steps": 5, "batch_size": 8}
EVALUATED = {**FEW, "eval_steps": 4, "eval_examples": 30}


def numbers(out: Path) -> list[dict[str, float]]:
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines]


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train(data, folder, **EVALUATED)
    return folder


def test_training_is_as_without(data: Path, out: Path, tmp_path: Path) -> None:
    train(data, tmp_path, **FEW)
    found, expected = weights(out), weights(tmp_path)
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    plain = [
        {k: v for k, v in line.items() if not k.startswith("eval/")} for line in read_metrics(out / "metrics.jsonl")
    ]
    assert plain == read_metrics(tmp_path / "metrics.jsonl")
    assert [bool(line) for line in numbers(out)] == [step % 4 == 0 for step in range(1, 13)]


def test_the_numbers_are_those_that_the_bench_would_find(data: Path, out: Path) -> None:
    held_out = HeldOut(str(data), CRITIC, 30, 0)
    chosen = {row["id"] for batch in held_out._batches for row in held_out._rows.__getitems__(batch)}
    examples = [e for e in iter_shards(data / "test", Example) if e.id in chosen]
    assert len(examples) == 30
    critic = LocalCritic(out / "critic", CRITIC, CPU)
    assessments = critic.judge([JudgeInput(e.prompt, e.images) for e in examples])
    predictions = []
    for e, assessment in zip(examples, assessments, strict=True):
        kept = {name: value for name, value in e if name in Expected.model_fields}
        predictions.append(Prediction(**kept, whose="teacher", reference=e.score, outcome=assessment[DIMENSION]))
    found = agreement(predictions).headline()
    last = numbers(out)[-1]
    assert last["eval/mae"] == last[f"eval/{DIMENSION}_mae"] == pytest.approx(found["overall_mae"])
    for name in ("pairwise", "spearman"):
        assert last[f"eval/{DIMENSION}_{name}"] == pytest.approx(found[f"{DIMENSION}_{name}"])
    assert last[f"eval/{DIMENSION}_invalid"] == 0


def test_they_are_whole_prompts_of_the_test_split(data: Path) -> None:
    held_out = HeldOut(str(data), CRITIC, 30, 0)
    rows = [row for batch in held_out._batches for row in held_out._rows.__getitems__(batch)]
    examples = {e.id: str(e.prompt) for e in iter_shards(data / "test", Example)}
    prompts = {row["prompt"] for row in rows}
    left_out = prompts & {prompt for name, prompt in examples.items() if name not in {row["id"] for row in rows}}
    assert len(rows) == 30 and {row["id"] for row in rows} <= examples.keys() and len(left_out) <= 1
    other = HeldOut(str(data), CRITIC, 30, 1)
    assert {row["prompt"] for batch in other._batches for row in other._rows.__getitems__(batch)} != prompts


def test_without_test_examples_it_is_said_before_training(data: Path, tmp_path: Path) -> None:
    ShardWriter(tmp_path / "data" / "test", Example, 10).close()
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    with pytest.raises(UserError, match=r"no test examples.*sft\.eval_steps") as caught:
        train(tmp_path / "data", tmp_path / "out", **EVALUATED)
    assert caught.value.exit_code == 2


def test_resumed_in_the_middle_it_finds_the_same(data: Path, out: Path, tmp_path: Path) -> None:
    kill_at(data, tmp_path, 9, EVALUATED)
    train(data, tmp_path / "parts", **EVALUATED)
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    found, expected = weights(tmp_path / "parts"), weights(out)
    assert all(torch.equal(found[name], t) for name, t in expected.items())
