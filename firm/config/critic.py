"""The critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from firm.config.chat import MAX_TEMPERATURE, MIN_TEMPERATURE, EndpointChat
from firm.config.section import NamedFile, NamedRubric, Positive, Section


class CriticEndpoint(EndpointChat):
    """A served critic: unlike other judges it is asked for logprobs, as its scores become rewards."""

    logprobs: bool = True


class CriticServer(Section):
    """A server of the run's own critic: a process beside each stage that asks it, on every machine of a job.

    It is started with the stage and ends with it.
    """

    program: Literal["firm", "vllm"] = "firm"
    arguments: list[str] = []  # further ones of the program, such as --tensor-parallel-size=2
    env: dict[str, str] = {}  # of its environment, such as CUDA_VISIBLE_DEVICES; no secrets, as reports show it
    concurrency: PositiveInt | None = None  # requests in flight of a machine; null: firm has two batches, vLLM 64
    timeout_s: Positive = 600.0  # of a request, which waits for others too; a judgement has four times as long
    start_s: Positive = 900.0  # until it answers


class CriticConfig(Section):
    """The critic: which model it starts from, how it is asked and how it answers.

    ``kind: endpoint`` uses a served critic in bench, reward and evaluation, ``kind: existing`` the model as it is; both
    train none.
    """

    kind: Literal["trained", "existing", "endpoint"] = "trained"
    model: str = ""
    endpoint: CriticEndpoint | None = None
    serve: CriticServer | None = None  # null: a critic that is no endpoint judges in the process that asks it
    answer_style: Literal["score_first", "reason_first"] = "reason_first"
    rubrics: dict[str, str]  # template names in firm/critics/templates
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_pixels: PositiveInt | None = None  # of an image, in training and judging: larger ones are scaled down
    max_new_tokens: PositiveInt = 1024
    batch_size: PositiveInt = 8
    num_samples: PositiveInt = 1  # answers to each question; several give a distribution by themselves
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0  # of several samples

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> CriticConfig:
        if self.kind != "endpoint" and not self.model:
            raise ValueError(f"a critic that is {self.kind} needs `model`")
        if self.kind == "endpoint" and self.endpoint is None:
            raise ValueError("an endpoint critic needs `endpoint`")
        if self.kind == "endpoint" and self.serve is not None:
            raise ValueError("a critic at an endpoint is served already: remove `serve`")
        if self.kind == "existing" and self.max_pixels and self.serve and self.serve.program == "vllm":
            raise ValueError("vLLM takes the bound of images from the model: remove `max_pixels`, or let firm serve it")
        if self.num_samples > 1 and self.answer_style == "score_first":
            raise ValueError("a score_first critic gives its whole distribution at once: set num_samples to 1")
        return self

    @property
    def gives_distributions(self) -> bool:
        """Whether its judgements can be more than whole scores."""
        logprobs = self.endpoint is not None and self.endpoint.logprobs
        return self.kind != "endpoint" or logprobs or self.num_samples > 1

    def named_files(self) -> Iterator[NamedFile]:
        """The model, or that which training starts from."""
        if self.kind != "endpoint":
            yield NamedFile("model", self.model, is_model=True)

    def named_rubrics(self) -> Iterator[NamedRubric]:
        """One for each dimension."""
        for dimension, name in self.rubrics.items():
            yield NamedRubric(f"rubrics.{dimension}", name, dimension)
