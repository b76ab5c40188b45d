"""The reward formula."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from firm.config.section import NonNegative, Section

REWARD = "reward"
"""What the formula makes of a judge's scores, beside the names of the dimensions that it makes it of."""

# The paper's named settings of base-and-bonus (section 3.4): generation and editing.
NAMED: dict[str, dict[str, Any]] = {
    "qma": {"base": "instruction_following", "bonuses": ["quality"], "weights": [0.4, 0.6]},
    "cme": {"base": "execution", "bonuses": ["consistency"], "weights": [0.6, 0.4]},
}


class RewardConfig(Section):
    """Reward formula (paper section 3.4). Scores are normalised with (s-1)/4.

    ``qma`` and ``cme`` are ``base_and_bonus`` with the paper's dimensions, and its weights unless others are given.
    """

    formula: Literal["qma", "cme", "base_and_bonus", "weighted_sum", "base_only"] = "qma"
    base: str
    bonuses: list[str] = []
    weights: list[NonNegative] = [1.0]  # w1 (base alone), then one per bonus
    soft: bool = True  # expectation over the score tokens instead of the hard score

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What the formula needs judgements of: the base, then the bonuses."""
        return (self.base,) if self.formula == "base_only" else (self.base, *self.bonuses)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_what_is_named(cls, data: Any) -> Any:
        return {**NAMED.get(str(data.get("formula", "qma")), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _dimensions_are_those_named(self) -> RewardConfig:
        named = NAMED.get(self.formula)
        if named and (self.base, self.bonuses) != (named["base"], named["bonuses"]):
            wanted = f"base {named['base']} and bonuses {named['bonuses']}"
            raise ValueError(f"{self.formula} has {wanted}; with other dimensions it is base_and_bonus")
        return self

    @model_validator(mode="after")
    def _weights_match(self) -> RewardConfig:
        if self.formula == "base_only":
            return self
        if len(self.weights) != 1 + len(self.bonuses):
            raise ValueError(f"weights must have {1 + len(self.bonuses)} entries: the base, then one per bonus")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError("weights must sum to 1")
        return self
