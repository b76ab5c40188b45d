"""Records that travel between stages, and the one error class meant for people.

Plain data: pydantic models without behaviour beyond validation. This module does not load torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from firm.terminal import visible

SCORES = (1, 2, 3, 4, 5)


class UserError(Exception):
    """A mistake or fault that the user can fix: what was wrong, where, and what to do.

    Attributes:
        what: What was wrong, one sentence.
        where: The culprit: a key path, file, URL or prompt; may be empty, as `fix`, the next step to take.
        usage: True when the request itself was wrong (exit code 2), False for a failure (exit code 1).
    """

    def __init__(self, what: str, where: str = "", fix: str = "", usage: bool = False) -> None:
        super().__init__(what, where, fix, usage)
        self.what = what
        self.where = where
        self.fix = fix
        self.usage = usage

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f"\n  -> {self.fix}" if self.fix else ""
        return visible(f"{self.what}{where}{fix}")

    @property
    def exit_code(self) -> int:
        """2 for a usage error, 1 for a failure."""
        return 2 if self.usage else 1


class Record(BaseModel):
    """Base of all records: immutable, unknown fields rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ---- judgements -------------------------------------------------------------------------------------------------


class Judgement(Record):
    """A parsed answer of a judge on one dimension.

    Attributes:
        score: Hard score, 1..5.
        distribution: Probabilities of the scores 1..5 where the judge exposes them (sums to 1).
        rationale: The judge's explanation.
        parts: Sub-scores, where the rubric asks for several; the lowest is the score.
        invalid_samples: How many of several samples of the question failed and were left out.
    """

    kind: Literal["judgement"] = "judgement"
    score: int = Field(ge=1, le=5)
    distribution: tuple[float, float, float, float, float] | None = None
    rationale: str = ""
    parts: tuple[int, ...] = ()
    invalid_samples: int = 0

    @model_validator(mode="after")
    def _distribution_sums_to_one(self) -> Judgement:
        if self.distribution is not None:
            total = sum(self.distribution)
            if not (abs(total - 1) < 1e-3 and min(self.distribution) >= 0):  # also false for NaN
                raise ValueError(f"distribution must be non-negative and sum to 1, got {self.distribution}")
        return self

    @property
    def soft_score(self) -> float:
        """Expectation over the five score tokens, in [1, 5]; the hard score where there is no distribution."""
        if self.distribution is None:
            return float(self.score)
        return sum(s * p for s, p in zip(SCORES, self.distribution, strict=True))


Reason = Literal["empty", "unparsable", "out_of_range", "truncated", "request_failed", "non_finite", "unusable"]


class Invalid(Record):
    """A judgement that failed. Never a number: it is retried, masked, counted and reported."""

    kind: Literal["invalid"] = "invalid"
    reason: Reason
    detail: str = ""


Outcome = Annotated[Judgement | Invalid, Field(discriminator="kind")]
Assessment = dict[str, Outcome]
"""Outcome of each judged dimension, for example ``instruction_following`` and ``quality``."""


# ---- rows of shards ---------------------------------------------------------------------------------------------


class Message(Record):
    """One chat message of a training example; images are marked ``<image>`` in the text."""

    role: Literal["system", "user", "assistant"]
    content: str


class Provenance(Record):
    """Where a judgement came from: teacher, rubric versions (template hashes) and the raw answers."""

    teacher: str
    rubrics: dict[str, str]
    answers: dict[str, str]


Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class Prompt(Record):
    """What a group is made of: a text and, for editing, a reference to its source image.

    A text alone is written as just that text, in JSON and in shards.

    Attributes:
        text: What is asked for.
        image: Path of the source image, its data URL, or, of a curated candidate, its digest; None for generation.
    """

    text: str
    image: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.startswith("{") else {"text": value}

    @model_serializer
    def _write(self) -> str:
        if self.image is None and not self.text.startswith("{"):
            return self.text
        return json.dumps({"text": self.text, "image": self.image}, ensure_ascii=False)

    def __str__(self) -> str:
        return self.text


class Candidate(Record):
    """An image to be judged. ``images`` holds PNG bytes: one image for generation, (source, edited) for editing."""

    index: int
    prompt: Prompt
    source: str
    split: Split
    images: list[bytes]


class Rewritten(Record):
    """What a candidate was asked before, how that was judged, and the rewriter's reason why the new prompt misses."""

    prompt: Prompt
    assessment: Assessment
    reason: str


class JudgedCandidate(Candidate):
    """A candidate with the teacher's privileged material (name -> lines, such as a plan) and its outcomes.

    ``failed`` says what there is not, and why: material, without which it was judged, or a ``rewriting`` of its prompt.
    """

    material: dict[str, list[str]]
    failed: dict[str, Invalid] = {}
    assessment: Assessment
    provenance: Provenance
    rewritten: Rewritten | None = None


class Example(Record):
    """A labelled record for the critic, readable by LLaMA-Factory and TRL (``messages``, ``images``)."""

    id: str
    split: Split
    dimension: str
    prompt: Prompt
    source: str
    difficulty: str
    score: int = Field(ge=1, le=5)
    messages: list[Message]
    images: list[bytes]


SampledPolicy = Literal["base", "final", "guided"]
"""The base and the final policy under the same settings; the base with guidance, as users sample it."""


class Sample(Record):
    """One generated image, behind its source if it was edited, with the seed of its noise and a suite's scores."""

    index: int
    prompt: Prompt
    seed: int
    policy: SampledPolicy
    images: list[bytes]
    scores: dict[str, Any]


# ---- the gate ---------------------------------------------------------------------------------------------------


class Check(Record):
    """One rule applied to one dimension. ``value`` is None where the metric is undefined, which fails the rule."""

    metric: str
    dimension: str
    source: str | None
    value: float | None
    bound: str
    passed: bool
    message: str


class Verdict(Record):
    """Result of the gate: trusted only if every check passed. No rule looks at the ``accepted_gaps``."""

    trusted: bool
    checks: list[Check]
    accepted_gaps: list[str] = []
    critic: str = ""  # hash of the manifest of the trained critic that was measured; empty: of none
    gaps: list[str] = []  # what no rule looks at, and nobody has accepted: not enough for RL

    @property
    def failures(self) -> list[str]:
        """One sentence for each rule that is not kept."""
        return [check.message for check in self.checks if not check.passed]


# ---- stages -----------------------------------------------------------------------------------------------------


class Stage(Record):
    """What the result of a stage depends on, besides its inputs.

    Attributes:
        name: Name of its package.
        sections: Keys of the configuration, also of a part of a section, or of what follows from it.
        reads: Input -> start of the paths that it reads, or several, where that is not all of them.
        worker: Module that torchrun starts, of a stage that launches a job.
        compares: Whether it is the same in all rounds, seeds included.
    """

    name: str
    sections: tuple[str, ...]
    reads: dict[str, str | tuple[str, ...]] = {}
    worker: str | None = None
    compares: bool = False


# ---- artifacts --------------------------------------------------------------------------------------------------


class Entry(Record):
    """One file of an artifact: path relative to its root, size and SHA-256."""

    path: str
    bytes: int
    sha256: str


class Manifest(Record):
    """Table of contents of an artifact, written last: an artifact without a manifest does not exist.

    ``inputs`` maps an input's name to the SHA-256 of that artifact's own manifest, which makes lineage a hash chain.
    """

    stage: str
    key: str
    entries: list[Entry]
    inputs: dict[str, str] = {}
    metadata: dict[str, Any] = {}


class ArtifactRef(Record):
    """Pointer that travels through the pipeline: where an artifact is and which one it must be."""

    uri: str
    sha256: str


class Curve(Record):
    """A named series: ``x`` (for example epochs) against ``y``."""

    name: str
    x: list[float]
    y: list[float]


class ConfusionMatrix(Record):
    """Counts [category of the reference score][category of the prediction]."""

    categories: list[str]
    counts: list[list[int]]


class Summary(Record):
    """What a stage reports: the report page and the KFP metrics read nothing else.

    Attributes:
        stage: Name of the stage.
        metrics: Headline numbers, shown as KFP metrics.
        tables: Named tables of JSON scalars (list of rows).
        curves: Named series for figures.
        confusion: What the KFP UI draws as a matrix.
        notes: Sentences for the reader, such as why a run stopped early.
    """

    stage: str
    metrics: dict[str, float] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    curves: list[Curve] = []
    confusion: ConfusionMatrix | None = None
    notes: list[str] = []
