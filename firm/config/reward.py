"""The reward formula."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from firm.config.section import Dimension, NonNegative, Section


class RewardConfig(Section):
    """Reward formula (paper section 3.4). Scores are normalised with (s-1)/4."""

    formula: Literal["qma", "cme", "weighted_sum", "base_only", "base_and_bonus"] = "qma"
    base: Dimension = "instruction_following"
    bonuses: list[Dimension] = ["quality"]
    weights: list[NonNegative] = [0.4, 0.6]  # w1 (base alone), then one per bonus
    soft: bool = True  # expectation over the score tokens instead of the hard score

    @model_validator(mode="after")
    def _weights_match(self) -> RewardConfig:
        if self.formula == "base_only":
            return self
        if self.formula in ("qma", "cme") and len(self.bonuses) != 1:
            raise ValueError(f"{self.formula} takes exactly one bonus")
        if len(self.weights) != 1 + len(self.bonuses):
            raise ValueError(f"weights must have {1 + len(self.bonuses)} entries: the base, then one per bonus")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError("weights must sum to 1")
        return self
