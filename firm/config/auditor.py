"""The judge that RL does not optimise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from firm.config.chat import ChatConfig
from firm.config.section import NamedRubric, Section


class AuditorConfig(Section):
    """A judge that RL does not optimise. Stops RL when this judge's scores fall and the critic does not see it."""

    judge: ChatConfig
    rubrics: dict[str, str]  # template names in firm/critics/templates, for all dimensions of the reward at least
    stops: bool = True  # false: it only looks on, for comparisons of what RL does to the end; the report says so
    every: PositiveInt = 10  # epochs between checks
    window: PositiveInt = 3  # checks that are averaged on either side of a comparison; at most half of the run's
    false_stops: Annotated[float, Field(gt=0, lt=1)] = 0.05  # chance that a run in which nothing fell is stopped
    num_images: PositiveInt = 512  # two of each prompt; with too few no fall can be told from noise

    def named_rubrics(self) -> Iterator[NamedRubric]:
        """One for each dimension."""
        for dimension, name in self.rubrics.items():
            yield NamedRubric(f"rubrics.{dimension}", name, dimension)
