"""Where prompts come from."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import PositiveInt, model_validator

from firm.config.data_path import DataPath
from firm.config.section import NamedFile, Section, Share


class PromptsConfig(Section):
    """Where prompts come from. Prompts of the test split never enter curation's training data or RL.

    A critic can do without: then `test_share` alone says which prompts of its examples are held out.
    """

    path: DataPath | None = None  # a user's file: text, JSONL or a JSON list of {"input_prompt": ...}
    function: str | None = None  # dotted name "module:function" of function(split) -> list of texts or Prompts
    test_share: Share = 0.1  # held out by the hash of the prompt, unless `function` decides
    limit: PositiveInt | None = None

    @model_validator(mode="after")
    def _at_most_one_source(self) -> PromptsConfig:
        if self.path is not None and self.function is not None:
            raise ValueError("give either path or function, not both")
        return self

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.path is not None or self.function is not None

    def named_files(self) -> Iterator[NamedFile]:
        """The prompts."""
        if self.path is not None:
            yield NamedFile("path", self.path, follow=("source_image",))
        if self.function is not None:
            yield NamedFile("function", self.function, is_code=True)
