"""The judge that RL does not optimise."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import PositiveInt

from firm.config.chat import ChatConfig
from firm.config.section import NamedRubric, NonNegative, Section


class AuditorConfig(Section):
    """A judge that RL does not optimise. Stops RL when the reward rises while this judge's score falls."""

    judge: ChatConfig
    rubrics: dict[str, str]  # template names in firm/critics/templates
    every: PositiveInt = 10  # epochs between checks
    patience: PositiveInt = 3  # checks in a row below the best before RL stops
    tolerance: NonNegative = 0.0  # a fall smaller than this does not count
    num_images: PositiveInt = 128

    def named_rubrics(self) -> Iterator[NamedRubric]:
        """One for each dimension."""
        for dimension, name in self.rubrics.items():
            yield NamedRubric(f"rubrics.{dimension}", name, dimension)
