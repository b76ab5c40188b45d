"""The curation stage: candidates -> judgements with provenance -> balanced examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from firm.chat.journal import Journals
from firm.config import CandidateSource, CuratedRun
from firm.critics.labeller import find_labeller
from firm.critics.rubrics import load_rubric
from firm.curation.balance import balance, histogram
from firm.curation.examples import student_example
from firm.curation.rewriting import REWRITING, Rewriter, audit
from firm.curation.sources import Source, check_images, count, no_candidates, open_source
from firm.progress import Task
from firm.records import (
    SPLITS,
    Candidate,
    Example,
    Invalid,
    JudgedCandidate,
    Judgement,
    Split,
    Stage,
    Summary,
    UserError,
)
from firm.storage.artifacts import WORK, Output
from firm.storage.published import PublishedShards
from firm.storage.shards import iter_shards

STAGE = Stage(
    name="curation", sections=("seed", "images", "prompts", "curation", "critic.rubrics", "critic.answer_style")
)


class Batch(NamedTuple):
    """Consecutive items of one source and split."""

    source: CandidateSource
    split: Split
    indices: range


def run(config: CuratedRun, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Judge every candidate and write balanced examples; finished shards and answered requests are never repeated.

    ``inputs["last_policy"]`` is the policy that the last round kept, where there was one.
    """
    last = inputs.get("last_policy")
    _judge_all(config, last / "policy" if last else None, out)
    scores = _Scores.read(config, out)
    for split in SPLITS:
        _write_examples(config, out, scores, split)
    return scores.summary(config)


def _judge_all(config: CuratedRun, kept: Path | None, out: Output) -> None:
    batches = list(_batches(config))
    shards = PublishedShards(out, "judged", JudgedCandidate, config.curation.shard_size)
    done = shards.rows_done
    total = sum(len(b.indices) for b in batches)
    task = Task("curation", "judging candidates", total, "images", done)
    if done < total:
        with Journals(out.folder / WORK) as open_teacher:
            labeller = find_labeller(config.curation.labeller)(config.curation, open_teacher)
            rewriter = Rewriter(config, open_teacher, labeller)
            for candidates in _ahead(_candidates(config, kept, batches, done)):
                shards.write(rewriter.rewrite(labeller.label(candidates)))
                task.advance(len(candidates), candidates[0].source)
    shards.close()


def _ahead(batches: Iterator[list[Candidate]]) -> Iterator[list[Candidate]]:
    """Make the next batch while the present one is judged."""
    with ThreadPoolExecutor(1, thread_name_prefix="candidates") as executor:
        pending = executor.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = executor.submit(next, batches, None)
            yield batch


def _batches(config: CuratedRun) -> Iterator[Batch]:
    size = config.curation.batch_size
    for source in config.curation.sources:
        for split in SPLITS:
            number = count(source, config.curation, config.prompts, split)
            for start in range(0, number, size):
                yield Batch(source, split, range(start, min(start + size, number)))


def _candidates(config: CuratedRun, kept: Path | None, batches: list[Batch], done: int) -> Iterator[list[Candidate]]:
    """Candidates of all batches after the first ``done`` rows.

    Batches are always made whole: what a generator samples may differ in the last bit with the size of its batch.
    """
    judged = next(iter(config.curation.dimensions.values()))
    wanted = load_rubric(judged.rubric).images
    source: Source | None = None
    opened = ""
    for batch in batches:
        if done >= len(batch.indices):
            done -= len(batch.indices)
            continue
        if source is None or opened != batch.source.name:
            source = open_source(batch.source, config.prompts, config.seed, kept, config.images.limits)
            opened = batch.source.name
        candidates = source.make(batch.split, batch.indices)
        check_images(candidates, wanted)
        yield candidates[done:]
        done = 0


class _Scores:
    """Split, source and score per dimension of every judged row, in row order; and why judgements failed."""

    def __init__(self, uri: str, dimensions: Iterable[str]) -> None:
        self.uri = uri
        self.invalid = list[Invalid]()
        self.failed = Counter[tuple[str, str]]()  # (name of the material, reason) -> candidates judged without it
        self.rewritten = list[JudgedCandidate]()  # without their images
        self.splits = list[Split]()
        self.sources = list[str]()
        self.scores: dict[str, list[int | None]] = {d: [] for d in dimensions}

    @classmethod
    def read(cls, config: CuratedRun, out: Output) -> _Scores:
        read = cls(out.uri, config.curation.dimensions)
        for judged in iter_shards(out.folder / "judged", JudgedCandidate):
            read.splits.append(judged.split)
            read.sources.append(judged.source)
            read.failed.update((name, invalid.reason) for name, invalid in judged.failed.items())
            read.rewritten += [judged.model_copy(update={"images": []})] if judged.rewritten else []
            for dimension, column in read.scores.items():
                outcome = judged.assessment[dimension]
                column.append(outcome.score if isinstance(outcome, Judgement) else None)
                read.invalid += [outcome] if isinstance(outcome, Invalid) else []
        return read

    def chosen(self, config: CuratedRun, split: Split) -> dict[str, Counter[int]]:
        """How often each row becomes an example, per dimension: balanced for training, each once for testing."""
        curation = config.curation
        counts = {}
        for dimension, column in self.scores.items():
            mine = [s if at == split else None for s, at in zip(column, self.splits, strict=True)]
            if split == "test":
                rows = [i for i, s in enumerate(mine) if s is not None]
            else:
                wanted = curation.dimensions[dimension]
                rows = balance(mine, wanted.target, curation.oversample, wanted.share, config.seed)
            counts[dimension] = Counter(rows)
        if not any(counts.values()):
            raise self._nothing(split)
        return counts

    def _nothing(self, split: Split) -> UserError:
        if split not in self.splits:
            return no_candidates(split)
        what = f"curation has no valid judgement for the {split} split"
        if self.invalid:
            [(reason, number)] = Counter(i.reason for i in self.invalid).most_common(1)
            detail = next(i.detail for i in self.invalid if i.reason == reason)
            what += f": {number} answers are {reason}, such as {detail!r}"
        fix = f"fix the evaluator (or the target of its dimension), then remove {self.uri} and run again"
        return UserError(what, "curation.evaluator", fix)

    def summary(self, config: CuratedRun) -> Summary:
        rows = []
        for dimension, column in self.scores.items():
            for name in dict.fromkeys(self.sources):
                mine = [s for s, source in zip(column, self.sources, strict=True) if source == name]
                rows.append({"dimension": dimension, "what": f"judged: {name}", **histogram(mine)})
            for split in SPLITS:
                chosen = self.chosen(config, split)[dimension]
                rows.append(
                    {
                        "dimension": dimension,
                        "what": f"{split} examples",
                        **histogram([column[i] for i in chosen.elements()]),
                    }
                )
        invalid = sum(s is None for column in self.scores.values() for s in column)
        metrics = {"candidates": len(self.splits), "invalid_judgements": invalid}
        metrics["without_material"] = sum(n for (name, _), n in self.failed.items() if name != REWRITING)
        metrics["rewritten"] = len(self.rewritten)
        failed = [{"material": name, "reason": why, "count": n} for (name, why), n in sorted(self.failed.items())]
        for split in SPLITS:
            metrics[f"{split}_examples"] = sum(c.total() for c in self.chosen(config, split).values())
        tables = {"histogram": rows, "failed": failed, **(audit(self.rewritten) if self.rewritten else {})}
        return Summary(stage="curation", metrics=metrics, tables=tables, notes=list(self._lacking(config)))

    def _lacking(self, config: CuratedRun) -> Iterator[str]:
        """Yields which scores of a dimension have a target that balancing leaves out for want of candidates."""
        for dimension, column in self.scores.items():
            there = {score for score, split in zip(column, self.splits, strict=True) if split == "train"}
            target = config.curation.dimensions[dimension].target
            lacking = [str(score) for score, weight in sorted(target.items()) if weight and score not in there]
            if lacking:
                number = " or ".join(lacking)
                yield f"{dimension}: no candidate for training scored {number}, so there are no such examples"


def _write_examples(config: CuratedRun, out: Output, scores: _Scores, split: Split) -> None:
    chosen = scores.chosen(config, split)
    shards = PublishedShards(out, split, Example, config.curation.shard_size)
    rest = islice(_examples(config, out.folder, chosen), shards.rows_done, None)
    while block := list(islice(rest, config.curation.shard_size)):
        shards.write(block)
    shards.close()


def _examples(config: CuratedRun, folder: Path, chosen: Mapping[str, Counter[int]]) -> Iterator[Example]:
    for row, judged in enumerate(iter_shards(folder / "judged", JudgedCandidate)):
        for dimension, counter in chosen.items():
            if counter[row]:
                rubric = config.critic.rubrics.get(dimension)
                if rubric is not None:
                    example = student_example(judged, dimension, rubric, config.critic.answer_style, config.curation)
                    yield from [example] * counter[row]
