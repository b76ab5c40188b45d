"""What a critic is: anything that judges (prompt, images) on its dimensions and says `Invalid` when it can not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from firm.config import CriticConfig
from firm.critics.rubrics import IMAGE_MARK, Rubric
from firm.records import Assessment, Invalid, Reason

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Item:
    """What is judged.

    Attributes:
        prompt: The image's prompt.
        images: PNG bytes: one image for generation, (source, edited) for editing.
        material: What only a teacher is given: name -> lines, such as the questions of a plan.
    """

    prompt: str
    images: list[bytes]
    material: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Critic(Protocol):
    """A judge of images, trained or served."""

    def judge(self, items: Sequence[Item]) -> list[Assessment]:
        """Judge items; the result has the order and the length of ``items``, and every dimension in each."""
        ...


def question(rubric: Rubric, prompt: str, material: Mapping[str, Sequence[str]] | None = None) -> str:
    """Text of the user message that asks a judge, with one ``<image>`` mark per image.

    The marks stand where the template has them, else in front. Curation writes this text into training examples and
    critics are asked with it, in this process and at an endpoint, so training and judging are the same. A mark inside
    the prompt is made harmless, as marks are counted.
    """
    values = {"plan": (), "prompt": prompt.replace(IMAGE_MARK, "< image >"), **(material or {})}
    text = rubric.render({name: values[name] for name in rubric.placeholders if name in values})
    return text if IMAGE_MARK in rubric.text else IMAGE_MARK * rubric.images + text


def all_invalid(dimensions: Iterable[str], reason: Reason, detail: str = "") -> Assessment:
    """An assessment that failed on every dimension."""
    return {dimension: Invalid(reason=reason, detail=detail) for dimension in dimensions}


def soft_scores(assessments: Iterable[Assessment], dimension: str, soft: bool = True) -> list[float | None]:
    """Scores in [1, 5] of one dimension, soft or hard; None (never a number) where the judgement failed."""
    outcomes = (assessment.get(dimension) for assessment in assessments)
    return [
        None if o is None or isinstance(o, Invalid) else (o.soft_score if soft else float(o.score)) for o in outcomes
    ]


def invalid_counts(assessments: Iterable[Assessment]) -> dict[str, dict[str, int]]:
    """Number of failed judgements as dimension -> reason -> count, for reports."""
    counts: dict[str, Counter[str]] = {}
    for assessment in assessments:
        for dimension, outcome in assessment.items():
            counter = counts.setdefault(dimension, Counter())
            if isinstance(outcome, Invalid):
                counter[outcome.reason] += 1
    return {dimension: dict(counter) for dimension, counter in counts.items()}


def load_critic(folder: Path, config: CriticConfig, device: torch.device) -> Critic:
    """The critic of a run: the model trained by the sft stage in ``folder``, or the served one of the configuration."""
    if config.kind == "trained":
        from firm.critics.local import LocalCritic

        return LocalCritic(folder, config, device)
    from firm.critics.judge import open_judge

    assert config.endpoint is not None, "validated by CriticConfig"
    return open_judge(config.endpoint, config.rubrics, answer_style=config.answer_style)
