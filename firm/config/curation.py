"""Candidates, and how a teacher judges them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from firm.config.chat import ChatConfig
from firm.config.data_path import DataPath
from firm.config.policy import PolicyConfig
from firm.config.section import NamedFile, NamedRubric, NonNegative, Positive, Section, Share


class _Source(Section):
    """What all sources have."""

    name: str
    rewritten: Share = 0.0  # share of candidates judged by an instruction that was rewritten not to fit the images


class GeneratedSource(_Source):
    """Candidates sampled from a generator on the training (or held-out) prompts."""

    kind: Literal["generated"] = "generated"
    policy: PolicyConfig | Literal["kept"]  # kept: the policy of the last round
    num_images: PositiveInt
    num_inference_steps: PositiveInt
    guidance_scale: Positive = 1.0
    mismatched: Share = 0.0  # share of images paired with another prompt on purpose, as score 1 and 2 are rare


class FunctionSource(_Source):
    """Candidates from a function(index, seed, split), by dotted name.

    It gives (prompt, PIL image), for editing (prompt, source image, edited image).
    """

    kind: Literal["function"] = "function"
    function: str
    num_images: PositiveInt

    def named_files(self) -> Iterator[NamedFile]:
        """The module of the function."""
        yield NamedFile("function", self.function, is_code=True)


class FilesSource(_Source):
    """Candidates from a user's JSONL file of {"prompt": ..., "image": path relative to the file}.

    For editing the prompt is the instruction, and ``source_image`` the path of what was edited.
    """

    kind: Literal["files"] = "files"
    path: DataPath

    def named_files(self) -> Iterator[NamedFile]:
        """The rows and their images."""
        yield NamedFile("path", self.path, follow=("image", "source_image"))


CandidateSource = Annotated[GeneratedSource | FunctionSource | FilesSource, Field(discriminator="kind")]


class JudgedDimension(Section):
    """How curation judges one dimension: the teacher's rubric and the share of its examples that train the critic."""

    rubric: str
    share: Share = 1.0
    target: dict[int, NonNegative] = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}  # wanted ratio of the scores

    @model_validator(mode="after")
    def _target_covers_scores(self) -> JudgedDimension:
        if not set(self.target) <= {1, 2, 3, 4, 5} or sum(self.target.values()) <= 0:
            raise ValueError("target must map scores 1..5 to ratios, at least one of them positive")
        return self


class CurationConfig(Section):
    """Curation with privileged material (paper sections 3.1 and 3.2), instruction rewriting and score balancing."""

    labeller: str = "plan_then_score"  # a name in firm.critics.labeller.LABELLERS
    planner: ChatConfig | None = None  # plan_then_score: makes plans of prompts
    reporter: ChatConfig | None = None  # describes differences (difference_first), rewrites; default: the evaluator
    evaluator: ChatConfig
    sources: list[CandidateSource] = []  # none: nothing is curated, and the teacher judges for the bench alone
    planner_rubric: str = "plan"
    reporter_rubrics: list[str] = Field(default=["obvious_differences", "detailed_differences"], min_length=1)
    rewriter_rubric: str = "rewrite_instruction"
    dimensions: dict[str, JudgedDimension] = Field(min_length=1)
    rationale: Literal["full", "summary"] = "full"  # summary: the evaluator's Final Analysis only
    hard_from: PositiveInt = 6  # what has a plan or report of this many lines is "hard", the rest "easy"
    attempts: PositiveInt = 3  # tries for an answer that does not parse
    shard_size: PositiveInt = 1024
    batch_size: PositiveInt = 128
    test_share: Share = 0.1  # of each source, on held-out prompts; files follow prompts.test_share
    oversample: Positive = 1.0  # a scarce score may be repeated up to this factor in the training data

    @model_validator(mode="after")
    def _sources_have_names(self) -> CurationConfig:
        if len({s.name for s in self.sources}) != len(self.sources):
            raise ValueError("sources must have distinct names")
        return self

    @model_validator(mode="after")
    def _plans_have_a_planner(self) -> CurationConfig:
        if self.labeller == "plan_then_score" and self.planner is None:
            raise ValueError("plan_then_score needs a planner")
        return self

    def named_rubrics(self) -> Iterator[NamedRubric]:
        """The planner's, the reporter's, the rewriter's and, for each dimension, the evaluator's."""
        yield NamedRubric("planner_rubric", self.planner_rubric, None)
        for i, name in enumerate(self.reporter_rubrics):
            yield NamedRubric(f"reporter_rubrics.{i}", name, None)
        yield NamedRubric("rewriter_rubric", self.rewriter_rubric, None)
        for dimension, judged in self.dimensions.items():
            yield NamedRubric(f"dimensions.{dimension}.rubric", judged.rubric, dimension)
