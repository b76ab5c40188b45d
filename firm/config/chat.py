"""Judges that are asked in the OpenAI chat format: in this process or at an endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator

from firm.config.section import NamedFile, NonNegative, Positive, Section

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 10.0
"""Of answers that are drawn here: below, logits divided by it overflow, and nothing is left to chance anyway."""


class PythonChat(Section):
    """A judge in this process: ``target`` is the dotted name of a class with ``complete(messages, ...)``."""

    kind: Literal["python"] = "python"
    target: str

    @property
    def who(self) -> str:
        """Whose judgements these are, wherever and however it is asked."""
        return self.target

    def named_files(self) -> Iterator[NamedFile]:
        """The module of the judge."""
        yield NamedFile("target", self.target, is_code=True)


class EndpointChat(Section):
    """A judge behind any OpenAI-compatible endpoint. The API key is read from the environment only."""

    kind: Literal["endpoint"] = "endpoint"
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: PositiveInt = 4096
    temperature: NonNegative = 0.0
    timeout_s: Positive = 120.0
    deadline_s: Positive = 600.0  # for one judgement, retries included
    patience_s: Positive | None = None  # for a server that answers nobody; null: as long as one judgement
    concurrency: PositiveInt = 8
    logprobs: bool = False  # ask for the likeliest tokens: a judge's scores have distributions then

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "it must hold no user, password or query, as reports and messages show it: "
                "put the key into the environment variable that api_key_env names"
            )
        return url

    @property
    def who(self) -> str:
        """Whose judgements these are, wherever and however it is asked."""
        return self.model


ChatConfig = Annotated[PythonChat | EndpointChat, Field(discriminator="kind")]
