"""Images with reference scores, from curation's test examples and from the teacher's judgements of policy images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from firm.config import CurationConfig
from firm.config.bench import Whose
from firm.critics.agreement import Expected, Prediction
from firm.critics.judge import JudgeInput
from firm.critics.labeller import find_labeller
from firm.looks import look
from firm.records import Assessment, Example, JudgedCandidate, Judgement, Prompt


@dataclass(frozen=True)
class Item:
    """An image with its reference scores.

    Attributes:
        id: Unique.
        prompt: Its prompt.
        source: Where it comes from.
        difficulty: How hard it is to judge.
        whose: Whose the reference scores are.
        references: Dimension -> score in [1, 5].
        images: Reads the PNG images: one for generation, (source, edited) for editing.
    """

    id: str
    prompt: Prompt
    source: str
    difficulty: str
    whose: Whose
    references: Mapping[str, float]
    images: Callable[[], list[bytes]]

    def expected(self) -> list[Expected]:
        """An example for each dimension. Of edits the untouched ones are named: a reward may be hacked by them."""
        seen = "untouched" if self.prompt.image and look(self.images())["copies"] else ""
        return [
            Expected(
                id=self.id,
                dimension=dimension,
                prompt=self.prompt,
                difficulty=self.difficulty,
                source=self.source,
                whose=self.whose,
                reference=score,
                seen=seen,
            )
            for dimension, score in self.references.items()
        ]

    def question(self) -> JudgeInput:
        """What a judge is asked: what there is a reference for, without the teacher's material."""
        return JudgeInput(self.prompt, self.images(), dimensions=tuple(self.references))


def predictions(expected: Sequence[Expected], assessment: Assessment) -> list[Prediction]:
    """A judge's outcome for each dimension of an item that has a reference score."""
    return [Prediction(**e.model_dump(), outcome=assessment[e.dimension]) for e in expected]


def asked(items: Iterable[Item], dimensions: Collection[str], limit: int | None = None) -> Iterator[Item]:
    """What a judge of these dimensions is asked; at most the first ``limit`` items of each source."""
    number = Counter[str]()
    for item in items:
        references = {d: score for d, score in item.references.items() if d in dimensions}
        number[item.source] += bool(references)
        if references and (limit is None or number[item.source] <= limit):
            yield replace(item, references=references)


def of_examples(examples: Iterable[Example]) -> Iterator[Item]:
    """Curation's test examples; those of one image, which follow one another, are judged at once."""
    for name, group in groupby(examples, key=lambda e: e.id.removesuffix(f"-{e.dimension}")):
        mine = list(group)
        yield _teacher_s(name, mine[0], mine[0].difficulty, {e.dimension: e.score for e in mine})


def of_judged(judged: Iterable[JudgedCandidate], config: CurationConfig) -> Iterator[Item]:
    """What the labeller has judged; a failed judgement is no reference."""
    difficulty = find_labeller(config.labeller).difficulty
    for j in judged:
        scores = {d: o.score for d, o in j.assessment.items() if isinstance(o, Judgement)}
        yield _teacher_s(f"{j.source}-{j.split}-{j.index}", j, difficulty(j, config), scores)


def _teacher_s(name: str, record: Example | JudgedCandidate, difficulty: str, scores: Mapping[str, int]) -> Item:
    images: Sequence[bytes] = record.images
    return Item(name, record.prompt, record.source, difficulty, "teacher", dict(scores), lambda: list(images))
