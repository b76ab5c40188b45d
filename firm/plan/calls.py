"""What a run asks of others: how many questions, and how many tokens they have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from firm.config import ChatConfig, CuratedRun, FilesSource, RunConfig
from firm.config.curation import CandidateSource
from firm.critics.rubrics import load_rubric
from firm.curation.sources import count
from firm.plan.assumptions import Assumptions, Calls
from firm.prompts import load_prompts
from firm.records import SPLITS, Split

CHARACTERS = 4
"""Of an English text, to a token."""
PATCH = 32
"""Pixels of a side of what becomes a token of an image, as Qwen3-VL has it."""


def candidates(config: CuratedRun, given: Assumptions) -> dict[Split, int]:
    """Candidates of each split, of all sources; a file that is not there has as many rows as is assumed."""
    counts = dict.fromkeys(SPLITS, 0)
    for source in config.curation.sources:
        for split in SPLITS:
            counts[split] += rows(config, source, split, given)
    return counts


def rows(config: CuratedRun, source: CandidateSource, split: Split, given: Assumptions) -> int:
    """Candidates of a source in a split."""
    if not isinstance(source, FilesSource) or Path(source.path).exists():
        return count(source, config.curation, config.prompts, split)
    test = round(given.candidates * config.prompts.test_share)
    return test if split == "test" else given.candidates - test


def questions(
    role: str, judge: ChatConfig, rubrics: Sequence[str], number: int, side: int, given: Assumptions, extra: int = 0
) -> Calls:
    """Questions by each of the rubrics about ``number`` items with images of ``side`` pixels.

    ``extra`` tokens are what else is in each question.
    """
    found = [load_rubric(name) for name in rubrics]
    texts = sum(math.ceil(len(rubric.text) / CHARACTERS) for rubric in found)
    images = sum(rubric.images for rubric in found) * math.ceil(side / PATCH) ** 2
    prompts = given.prompt_tokens * sum("prompt" in rubric.placeholders for rubric in found)
    each = texts + images + prompts + extra * len(found)
    asked = number * len(found)
    return Calls(role, judge.who, asked, number * each, asked * given.answer_tokens)


def teaching(config: CuratedRun, number: int, side: int, given: Assumptions) -> list[Calls]:
    """What the teachers of curation are asked to label ``number`` candidates."""
    curation = config.curation
    rubrics = [judged.rubric for judged in curation.dimensions.values()]
    if curation.labeller == "plan_then_score" and curation.planner is not None:
        prompts = min(number, distinct_prompts(config, number))
        helper = questions("planner", curation.planner, [curation.planner_rubric], prompts, 0, given)
    else:
        reporter = curation.reporter or curation.evaluator
        helper = questions("reporter", reporter, curation.reporter_rubrics, number, side, given)
    judged = questions("evaluator", curation.evaluator, rubrics, number, side, given, extra=given.answer_tokens)
    return [helper, judged]


def distinct_prompts(config: RunConfig, otherwise: int) -> int:
    """Number of prompts; ``otherwise`` where their file is not there."""
    path = config.prompts.path
    if not config.prompts.given or (path is not None and not Path(path).exists()):
        return otherwise
    return sum(len(load_prompts(config.prompts, split)) for split in SPLITS)
