"""A user's file of images with scores: JSONL or Parquet, a row for each rater's judgement of an image.

A row has ``prompt``; ``image`` (or a list, ``images``), paths relative to the file; ``scores``, dimension -> score in
[1, 5] (or ``dimension`` and ``score``); and may have ``rater`` and, for editing, ``source_image`` (or ``images`` begin
with it). Rows of the same prompt and images are one example: its reference is the mean of its raters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from firm import stats
from firm.bench.items import Item
from firm.config import ScoresSource
from firm.images import Limits
from firm.prompts import Splits
from firm.records import Prompt, UserError
from firm.storage.files import parallel
from firm.storage.given import given
from firm.storage.pictures import image_size, read_image
from firm.storage.rows import iter_rows

FIX = 'give rows like {"prompt": "...", "image": "file.png", "scores": {"quality": 4}, "rater": "ann"}'
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Score = Annotated[float, Field(ge=1, le=5, strict=True, allow_inf_nan=False)]


class Row(BaseModel):
    """One rater's judgement of one image; other columns are ignored."""

    prompt: Text
    images: Annotated[list[Text], Field(min_length=1)]
    scores: Annotated[dict[Text, Score], Field(min_length=1)]
    rater: str | int | None = None
    source_image: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        row = {key: value for key, value in row.items() if value is not None}  # Parquet has nulls for what is not given
        if "image" in row:
            row.setdefault("images", [row["image"]])
        if "score" in row and "dimension" in row:
            row.setdefault("scores", {row["dimension"]: row["score"]})
        if isinstance(scores := row.get("scores"), dict):
            row["scores"] = {dimension: score for dimension, score in scores.items() if score is not None}
        return row


@dataclass
class Rated:
    """An image and its ratings: dimension -> rater -> score."""

    prompt: Prompt
    images: tuple[str, ...]
    where: str
    ratings: dict[str, dict[str, float]] = field(default_factory=dict)


class ScoreFile:
    """The rows of a file, one `Rated` for each image; images are read when they are judged.

    Raises:
        UserError: The file cannot be read, is empty, or a row is not as above: its line is named.
    """

    def __init__(
        self, source: ScoresSource, dimensions: Collection[str], splits: Splits | None, limits: Limits | None = None
    ) -> None:
        """``dimensions``: those that the critic judges; others are left out, and a note says so.

        ``splits``: of the run that has trained the critic, if it has.
        """
        self.source = source
        self.limits = limits
        self.file = given(source.path)
        self.splits = splits
        self._left_out = set[str]()
        rated: dict[tuple[Prompt, tuple[str, ...]], Rated] = {}
        for where, value in iter_rows(self.file.fetch(), self.file.name):
            row = _parse(value, where)
            images = tuple(self.file.beside(name) for name in (*filter(None, [row.source_image]), *row.images))
            prompt = Prompt(text=row.prompt, image=images[0] if len(images) > 1 else None)
            mine = rated.setdefault((prompt, images), Rated(prompt, images, where))
            for dimension, score in row.scores.items():
                if dimension in dimensions:
                    _add(mine.ratings.setdefault(dimension, {}), row.rater, score, where)
                else:
                    self._left_out.add(dimension)
        self.rated = [r for r in rated.values() if r.ratings]
        if not self.rated:
            what = f"no row has a score of {', '.join(dimensions)}, which the critic judges"
            raise UserError(what, source.path, FIX, usage=True)

    def check(self, wanted: Mapping[str, int]) -> None:
        """Check the heads of all images against the limits, and their number, ``wanted`` by the critic's rubrics.

        Raises:
            UserError: Names the row.
        """
        for rated in self.rated:
            for dimension in rated.ratings:
                if len(rated.images) != wanted[dimension]:
                    what = f"the critic judges {dimension} of {wanted[dimension]} image(s), not of {len(rated.images)}"
                    fix = "give each row a source_image" if wanted[dimension] > 1 else "leave source_image out"
                    raise UserError(what, rated.where, f"{fix}, or use another rubric", usage=True)
        named = [(image, f"{rated.where}: {image}") for rated in self.rated for image in rated.images]
        parallel(lambda one: image_size(*one, self.limits), named)

    def items(self) -> Iterator[Item]:
        """An item for each image, in the order of the file."""
        for i, rated in enumerate(self.rated):
            references = {d: float(np.mean(list(scores.values()))) for d, scores in rated.ratings.items()}
            name = f"{self.source.name}-{i}"
            whose = self.source.whose
            yield Item(name, rated.prompt, self.source.name, "unknown", whose, references, partial(self._read, rated))

    def _read(self, rated: Rated) -> list[bytes]:
        """The images as PNG."""
        return [read_image(path, f"{rated.where}: {path}", self.limits) for path in rated.images]

    def notes(self) -> list[str]:
        """What a reader should know of the prompts and dimensions."""
        prompts = {rated.prompt for rated in self.rated}
        notes = []
        if self.splits and (number := sum(self.splits.of(prompt) == "train" for prompt in prompts)):
            notes.append(
                f"{self.source.name}: {number} of its {len(prompts)} prompts belong to the training split, so the "
                "critic may have been trained on images of them"
            )
        if self._left_out:
            left_out = ", ".join(sorted(self._left_out))
            notes.append(f"{self.source.name}: scores of {left_out} are left out, as the critic does not judge it")
        return notes

    def raters(self) -> list[dict[str, Any]]:
        """The raters' own agreement, each against the mean of the others: a row for each dimension with several.

        It is the ceiling of what a critic can reach: ``mae``, ``spearman`` and ``pairwise`` (of one rater and prompt)
        as for a critic, over ``n`` judgements of ``images`` images that were rated by several of ``raters`` raters.
        """
        return [row for d in sorted({d for r in self.rated for d in r.ratings}) if (row := self._ceiling(d))]

    def _ceiling(self, dimension: str) -> dict[str, Any] | None:
        several = [(r.prompt, s) for r in self.rated if len(s := r.ratings.get(dimension, {})) > 1]
        if not several:
            return None
        own, others, clusters = [], [], []
        for prompt, scores in several:
            total = sum(scores.values())
            for rater, score in scores.items():
                own.append(score)
                others.append((total - score) / (len(scores) - 1))
                clusters.append((rater, prompt))
        return {
            "source": self.source.name,
            "dimension": dimension,
            "whose": self.source.whose,
            "raters": len({rater for rater, _ in clusters}),
            "images": len(several),
            "n": len(own),
            "mae": stats.mae(own, others),
            "spearman": stats.spearman(own, others),
            "pairwise": stats.pairwise_accuracy(own, others, clusters)[0],
        }


def _parse(value: Any, where: str) -> Row:
    try:
        return Row.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"not a scored image: {key or 'the row'}: {first['msg']}", where, FIX, usage=True) from error


def _add(scores: dict[str, float], rater: str | int | None, score: float, where: str) -> None:
    """Raters without a name are told apart by their order."""
    name = f"rater {len(scores) + 1}" if rater in (None, "") else str(rater)
    if name in scores:
        raise UserError(f"{name} has scored this image already", where, "keep one of the rows", usage=True)
    scores[name] = score
