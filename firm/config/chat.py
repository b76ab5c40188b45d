"""Judges that are asked in the OpenAI chat format: in this process or at an endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from firm.config.section import NonNegative, Positive, Section


class PythonChat(Section):
    """A judge in this process: ``target`` is the dotted name of a class with ``complete(messages, ...)``."""

    kind: Literal["python"] = "python"
    target: str

    @property
    def who(self) -> str:
        """Whose judgements these are, wherever and however it is asked."""
        return self.target


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
    concurrency: PositiveInt = 8
    logprobs: bool = False  # ask for the likeliest tokens: a judge's scores have distributions then

    @property
    def who(self) -> str:
        """Whose judgements these are, wherever and however it is asked."""
        return self.model


ChatConfig = Annotated[PythonChat | EndpointChat, Field(discriminator="kind")]
