"""What the bench measures of a critic, and the rules of the gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from firm.config.section import Section


class Rule(Section):
    """One condition of the gate, on a metric of the bench, for example ``mae <= 0.6``."""

    metric: str
    dimension: str | None = None  # default: the reward's base
    source: str | None = None  # only examples of this candidate source
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Rule:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a rule needs at_most or at_least")
        return self


class BenchConfig(Section):
    """Critic against held-out scores; the gate decides whether it may steer RL."""

    num_bootstrap: PositiveInt = 1000
    point_estimate: Literal["score", "soft_score", "median"] = "score"
    gate: list[Rule] = Field(min_length=1)
