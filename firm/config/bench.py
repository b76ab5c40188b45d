"""What the bench measures of a critic, and the rules of the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from firm.config.data_path import DataPath
from firm.config.section import NamedFile, Positive, Section
from firm.records import SCORES

METRICS = (
    "n", "num_valid", "soft_share", "coverage", "mae", "mae_low", "mae_high", "mae_penalised", "macro_mae",
    "skill", "skill_low", "skill_high", "spearman", "spearman_low", "spearman_high",
    "pairwise", "pairwise_low", "pairwise_high", "num_pairs", "qwk", "exact", "within_1", "bias",
    "constant_score", "constant_mae", *(f"constant_{s}_mae" for s in SCORES),
)  # fmt: skip
"""Names of the metrics of agreement, which the gate's rules use."""

Whose = Literal["people", "teacher", "auditor"]
SCORES_OF = {
    "people": "people's scores",
    "teacher": "the teacher's scores",
    "auditor": "the auditor's scores",
    "both": "people's and the teacher's scores",
}
"""Whose scores a judge is compared with, in words."""


class PolicySource(Section):
    """Images of the policy that RL starts from, on held-out prompts, judged by curation's teacher."""

    kind: Literal["policy"] = "policy"
    name: str = "policy"
    num_images: PositiveInt  # every prompt equally often, so in groups of one prompt
    num_inference_steps: PositiveInt
    guidance_scale: Positive = 1.0

    @property
    def shows_policy(self) -> bool:
        """Whether these are images of the policy that RL starts from."""
        return True


class ScoresSource(Section):
    """A JSONL or Parquet file of images with scores, one row for each rater's judgement (firm.bench.scores)."""

    kind: Literal["scores"] = "scores"
    name: str
    path: DataPath
    whose: Literal["people", "teacher"] = "people"
    of_policy: bool = False  # these are images of the policy that RL starts from

    @property
    def shows_policy(self) -> bool:
        """Whether these are images of the policy that RL starts from."""
        return self.of_policy

    def named_files(self) -> Iterator[NamedFile]:
        """The rows and their images."""
        yield NamedFile("path", self.path, follow=("image", "images", "source_image"))


BenchSource = Annotated[PolicySource | ScoresSource, Field(discriminator="kind")]


class Rule(Section):
    """One condition of the gate, on a metric of the bench, for example ``mae <= 0.6``."""

    metric: str
    dimension: str | None = None  # default: every dimension of the reward
    source: str | None = None  # only examples of this source, of curation or the bench
    at_most: float | None = None
    at_least: float | None = None

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}: use one of {', '.join(METRICS)}")
        return metric

    @model_validator(mode="after")
    def _one_bound(self) -> Rule:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a rule needs at_most or at_least")
        return self

    def holds(self, value: float | None) -> bool:
        """Whether a value of the metric keeps the rule; an undefined one does not."""
        if value is None or not math.isfinite(value):
            return False
        # Written so that a bound that is not a number is not kept, either.
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def covers(self, what: str, dimension: str) -> bool:
        """Whether it demands skill (better than any constant) or pairwise accuracy (better than chance)."""
        if self.at_least is None or self.dimension not in (None, dimension):
            return False
        if what == "skill_low":
            return self.metric == "skill_low" and self.at_least >= 0
        return self.metric in ("pairwise", "pairwise_low") and self.at_least > 0.5


PROOFS = ("skill_low", "pairwise")
"""What a critic must show in each dimension of the reward: see `BenchConfig.gaps`."""


class Gate(Section):
    """A critic that fails a rule never becomes a reward."""

    rules: list[Rule] = Field(min_length=1)
    accept_gaps: list[str] = []  # what the rules may leave out, such as quality.skill_low


class BenchConfig(Section):
    """Critic against held-out scores; the gate decides whether it may steer RL."""

    num_bootstrap: PositiveInt = 1000
    point_estimate: Literal["score", "soft_score", "median"] = "score"
    sources: list[BenchSource] = []  # besides the test examples of curation's sources
    auditor_images: PositiveInt = 512  # of each source: an auditor may be a large model, asked for every dimension
    gate: Gate

    @property
    def policy_sources(self) -> list[str]:
        """Names of the sources that show the policy's own images."""
        return [source.name for source in self.sources if source.shows_policy]

    def gaps(self, dimensions: Sequence[str]) -> list[str]:
        """What the gate does not look at, as ``dimension.skill_low`` or ``dimension.pairwise``.

        On images of the policy that RL starts from, each dimension of the reward needs a critic that beats every
        constant and ranks images of one prompt better than chance.
        """
        rules = [rule for rule in self.gate.rules if rule.source in self.policy_sources]
        return [
            f"{dimension}.{what}"
            for dimension in dimensions
            for what in PROOFS
            if not any(rule.covers(what, dimension) for rule in rules)
        ]

    def open_gaps(self, dimensions: Sequence[str]) -> list[str]:
        """Gaps that nobody has accepted: with them a critic may not steer RL."""
        return [gap for gap in self.gaps(dimensions) if gap not in self.gate.accept_gaps]
