"""Image generators and editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from firm.config.section import NamedFile, Section


class PolicyConfig(Section):
    """An image generator or editor: the model that RL trains, or a source of candidates."""

    family: str = "sd3"  # a key of firm.policies.policy.FAMILIES
    model: str  # a folder, a hub id, or pkg://PACKAGE/PATH for files inside an installed package
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and computing; what trains is float32
    resolution: PositiveInt
    max_sequence_length: PositiveInt = 256  # T5 tokens of sd3; 1 where the model has no T5
    offload_encoders: bool = False  # encoders of text and of sources are on the host, except while they encode

    def named_files(self) -> Iterator[NamedFile]:
        """The model."""
        yield NamedFile("model", self.model, is_model=True)
