"""The bench stage: judge every example with a reference score, measure agreement, apply the gate's rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from firm.bench.gate import judge_gate
from firm.bench.items import Item, asked, of_examples, of_judged, predictions
from firm.bench.scores import ScoreFile
from firm.chat.journal import Journals
from firm.config import MeasuredRun, PolicySource, TaughtRun
from firm.critics.agreement import Agreement, Prediction, agreement
from firm.critics.child import served
from firm.critics.judge import Judge
from firm.critics.labeller import open_labeller
from firm.critics.load import load_critic, open_judge, trained_critic
from firm.policies.generate import draw, encode, equally_often
from firm.policies.policy import Policy, load_policy
from firm.progress import Task
from firm.prompts import Splits, load_prompts, with_source
from firm.records import (
    Assessment,
    Candidate,
    Example,
    Invalid,
    JudgedCandidate,
    Prompt,
    Record,
    Stage,
    Summary,
    Verdict,
)
from firm.storage.artifacts import WORK, Output
from firm.storage.inputs import hash_of
from firm.storage.lines import report_damage, seal, unseal
from firm.storage.published import PublishedShards
from firm.storage.shards import iter_shards

TEACHER = (
    "labeller", "planner", "reporter", "evaluator", "planner_rubric", "reporter_rubrics", "dimensions", "hard_from",
    "attempts", "batch_size",
)  # fmt: skip
STAGE = Stage(
    name="bench",
    sections=(
        "seed", "images", "prompts", "policy", "critic", "bench", *(f"curation.{key}" for key in TEACHER),
        "reward.dimensions", "auditor.judge", "auditor.rubrics",
    ),
    reads={"data": "test/"},
)  # fmt: skip
JUDGED = "judged"
VERDICT = "verdict.json"
BATCH = 256
_LINE = TypeAdapter(list[Prediction])


class Assessed(Record):
    """A `JudgedCandidate` without its image."""

    failed: dict[str, Invalid]
    assessment: Assessment


def run(config: MeasuredRun, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Measure the critic, and the auditor beside it if there is one, on all sources.

    Args:
        config: The run.
        inputs: ``critic``, if one was trained; ``data``, whose test examples are the first sources, if it was curated;
            ``last_policy``, if RL starts from the one that the last round kept.
        out: Gets ``critic.jsonl`` and ``auditor.jsonl``, a prediction a line, ``verdict.json``, and in ``judged`` the
            policy's images with the teacher's scores.
    """
    bench = config.bench
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shows = any(source.kind == "policy" for source in bench.sources)
    taught = config.having(TaughtRun, "the policy's images, of bench.sources,") if shows else None
    if taught:
        _judge_policy(taught, inputs, out, device)
    splits = Splits(config.prompts) if config.curation else None
    limits = config.images.limits
    scores = [source for source in bench.sources if source.kind == "scores"]
    files = [ScoreFile(source, config.critic.rubrics, splits, limits) for source in scores]
    items = partial(_items, inputs, taught, files, out)
    folder, work = trained_critic(inputs), out.folder / WORK
    with served(config.critic, folder, work) as asked_critic, Journals(work / "answers") as open_chat:
        critic = load_critic(folder, asked_critic, device, open_chat)
        result = _measure("critic", critic, lambda: asked(items(), config.critic.rubrics), config, out)
        tables = result.tables()
        if config.auditor:
            auditor = open_judge(
                config.auditor.judge, config.auditor.rubrics, chat=open_chat("auditor", config.auditor.judge)
            )
            some = partial(asked, dimensions=config.auditor.rubrics, limit=bench.auditor_images)
            audited = _measure("auditor", auditor, lambda: some(items()), config, out).tables()
            tables = {name: rows + audited[name] for name, rows in tables.items()}
    if taught:
        tables["invalid"] += _failures(iter_shards(out.folder / JUDGED, Assessed))
    verdict = _verdict(config, result, hash_of(inputs, "critic"))
    (out.folder / VERDICT).write_text(verdict.model_dump_json(indent=1))
    return Summary(
        stage="bench",
        metrics={"trusted": float(verdict.trusted), **result.headline()},
        tables={
            **tables,
            "gate": [check.model_dump() for check in verdict.checks],
            "raters": [row for file in files for row in file.raters()],
        },
        notes=verdict.failures + [note for file in files for note in file.notes()],
        confusion=result.confusion(config.dimensions[0]),
    )


def _verdict(config: MeasuredRun, result: Agreement, critic: str) -> Verdict:
    """What the gate says of the critic with this manifest, and what no rule looked at."""
    verdict = judge_gate(config.bench.gate, result, config.dimensions)
    return verdict.model_copy(update={"gaps": config.bench.open_gaps(config.dimensions), "critic": critic})


def _items(
    inputs: Mapping[str, Path], taught: TaughtRun | None, files: Sequence[ScoreFile], out: Output
) -> Iterator[Item]:
    """Curation's test examples, the policy's images and those of files, as far as there are any."""
    if "data" in inputs:
        yield from of_examples(iter_shards(inputs["data"] / "test", Example))
    if taught:
        yield from of_judged(iter_shards(out.folder / JUDGED, JudgedCandidate), taught.curation)
    for file in files:
        yield from file.items()


def _judge_policy(config: TaughtRun, inputs: Mapping[str, Path], out: Output, device: torch.device) -> None:
    """Sample the policy that RL starts from and have the teacher judge; what is in a shard is not judged again."""
    sources = [source for source in config.bench.sources if source.kind == "policy"]
    total = sum(source.num_images for source in sources)
    size = config.curation.batch_size
    shards = PublishedShards(out, JUDGED, JudgedCandidate, size)
    done = shards.rows_done
    if done == total:
        return
    task = Task("bench", "judging the policy's images", total, "images", done)
    last = inputs.get("last_policy")
    policy = load_policy(last / "policy", device) if last else Policy(config.policy, device)
    with open_labeller(config.curation, out.folder / WORK) as labeller:
        for source in sources:
            test = load_prompts(config.prompts, "test")
            prompts = equally_often(test, source.num_images, config.seed, f"bench/{source.name}")
            for start in range(0, source.num_images, size):
                indices = range(start, min(start + size, source.num_images))
                if done >= len(indices):
                    done -= len(indices)
                    continue
                # A batch is made whole, as images may differ in the last bit with its size.
                candidates = _candidates(config, policy, source, prompts, indices)[done:]
                done = 0
                shards.write(labeller.label(candidates))
                task.advance(len(candidates))
    shards.close()


def _failures(judged: Iterable[Assessed]) -> list[dict[str, Any]]:
    """Rows of how often the teacher failed on the policy's images, in a dimension or its material, and why."""
    outcomes = ((d, o) for j in judged for d, o in (*j.failed.items(), *j.assessment.items()))
    failed = Counter((d, o.reason) for d, o in outcomes if isinstance(o, Invalid))
    return [{"judge": "teacher", "dimension": d, "reason": why, "count": n} for (d, why), n in sorted(failed.items())]


def _candidates(
    config: TaughtRun, policy: Policy, source: PolicySource, prompts: Sequence[Prompt], indices: range
) -> list[Candidate]:
    images = draw(
        policy,
        encode(policy, [prompts[i] for i in indices], guided=source.guidance_scale != 1),
        indices,
        config.seed,
        f"bench/{source.name}",
        num_inference_steps=source.num_inference_steps,
        guidance_scale=source.guidance_scale,
    )
    return [
        Candidate(index=i, prompt=prompts[i], source=source.name, split="test", images=with_source(prompts[i], png))
        for i, png in zip(indices, images, strict=True)
    ]


def _measure(
    name: str, judge: Judge, items: Callable[[], Iterator[Item]], config: MeasuredRun, out: Output
) -> Agreement:
    """Judge all items and compare with their reference scores; those in the journal are not asked for again.

    The journal is published after every batch, so that other machines do not ask for them either.
    """
    expected = [item.expected() for item in items()]
    lines = f"{WORK}/{name}.jsonl"
    journal = out.folder / lines
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = _complete(journal, len(expected))
    journal.write_bytes(_lines(done))
    task = Task("bench", f"the {name} judges", len(expected), "images", len(done))
    rest = islice(items(), len(done), None)
    with journal.open("ab") as file:
        while batch := list(islice(rest, BATCH)):
            assessments = judge.judge([item.question() for item in batch])
            mine = expected[len(done) : len(done) + len(batch)]
            new = [predictions(line, a) for line, a in zip(mine, assessments, strict=True)]
            file.write(_lines(new))
            file.flush()
            out.publish(lines)
            done += new
            task.advance(len(new))
    found = [prediction for line in done for prediction in line]
    (out.folder / f"{name}.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in found))
    bench = config.bench
    wanted = [e for line in expected for e in line]
    return agreement(found, bench.point_estimate, bench.num_bootstrap, config.seed, wanted, name)


def _complete(journal: Path, total: int) -> list[list[Prediction]]:
    """Predictions of an interrupted run: all of them, or whole batches, so that batching is that of a run without.

    None behind a damaged one is kept.
    """
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    sound = list(takewhile(lambda record: record is not None, map(unseal, whole)))
    report_damage(journal, len(whole) - len(sound))
    kept = sound if len(sound) == total else sound[: len(sound) // BATCH * BATCH]
    return [_LINE.validate_json(record) for record in kept if record]


def _lines(predictions: Iterable[list[Prediction]]) -> bytes:
    return b"".join(seal(_LINE.dump_json(line)) for line in predictions)
