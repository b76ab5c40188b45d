"""The bench stage: judge every test example, measure agreement, apply the gate's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from firm.bench.agreement import Expected, agreement
from firm.bench.gate import judge_gate
from firm.config import RunConfig
from firm.critics.judge import Judge, JudgeInput
from firm.critics.load import load_critic
from firm.progress import Task
from firm.records import Example, Prediction, Stage, Summary
from firm.storage.artifacts import Output
from firm.storage.shards import count_rows, iter_shards

STAGE = Stage(name="bench", sections=("seed", "critic", "bench", "reward.base"))
PREDICTIONS = "predictions.jsonl"
VERDICT = "verdict.json"
BATCH = 256


def run(config: RunConfig, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Judge ``inputs["data"]``'s test examples with the critic in ``inputs["critic"]``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    critic = load_critic(inputs["critic"] / "critic", config.critic, device)
    test = inputs["data"] / "test"
    expected = [_expected(e) for e in iter_shards(test, Example)]
    predictions = _judge_all(critic, test, out.folder / "work" / PREDICTIONS, count_rows(test))
    (out.folder / PREDICTIONS).write_text("".join(p.model_dump_json() + "\n" for p in predictions))
    bench = config.bench
    result = agreement(predictions, bench.point_estimate, bench.num_bootstrap, config.seed, expected)
    verdict = judge_gate(bench.gate, result, config.reward.base)
    (out.folder / VERDICT).write_text(verdict.model_dump_json(indent=1))
    checks = [check.model_dump() for check in verdict.checks]
    return Summary(
        stage="bench",
        metrics={"trusted": float(verdict.trusted), **result.headline()},
        tables={**result.tables(), "gate": checks},
        notes=verdict.failures,
        confusion=result.confusion(config.reward.base),
    )


def _expected(e: Example) -> Expected:
    return Expected(
        id=e.id, dimension=e.dimension, prompt=e.prompt, difficulty=e.difficulty, source=e.source, human=e.score
    )


def _judge_all(critic: Judge, test: Path, journal: Path, total: int) -> list[Prediction]:
    """Predictions of all examples; those in the journal are not asked for again."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = list(_complete(journal))
    task = Task("bench", "judging test examples", total, "examples", len(done))
    rest = islice(iter_shards(test, Example), len(done), None)
    journal.write_text("".join(p.model_dump_json() + "\n" for p in done))
    with journal.open("a") as file:
        while batch := list(islice(rest, BATCH)):
            new = _judge(critic, batch)
            file.write("".join(p.model_dump_json() + "\n" for p in new))
            file.flush()
            done += new
            task.advance(len(new))
    return done


def _complete(journal: Path) -> Iterator[Prediction]:
    """Predictions of an interrupted run, in whole batches, so that batching does not depend on the interruption."""
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    yield from (Prediction.model_validate_json(line) for line in whole[: len(whole) // BATCH * BATCH])


def _judge(critic: Judge, examples: Sequence[Example]) -> list[Prediction]:
    outcomes = critic.judge([JudgeInput(e.prompt, e.images) for e in examples])
    return [
        Prediction(
            id=e.id,
            dimension=e.dimension,
            prompt=e.prompt,
            difficulty=e.difficulty,
            source=e.source,
            human=e.score,
            outcome=outcome[e.dimension],
        )
        for e, outcome in zip(examples, outcomes, strict=True)
    ]
