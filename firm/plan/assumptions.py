"""What a plan takes for granted, as no configuration says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GB = 10**9
SIDE = 1024
CARDS = (24, 80, 141)
"""Memory of common GPUs, in GB."""


@dataclass(frozen=True)
class Assumptions:
    """Speeds are those of an H100 or H200 (SXM); of the utilisations none was measured here.

    Attributes:
        tflops: What a GPU can compute, in 10^12 FLOPs a second, dense, in bfloat16.
        mfu: Share of it that is reached, recomputation included.
        bandwidth: What a GPU can read of its memory, in GB a second.
        mbu: Share of it that is reached where a model writes token after token.
        prompt_tokens: Of a prompt or instruction.
        answer_tokens: Of an answer, whoever gives it; no more than its limit.
        image_side: Pixels of a side of curated images; 0: those of the policy's, or `SIDE` where there is none.
        candidates: Rows of a file of candidates that is not there.
    """

    tflops: float = 989
    mfu: float = 0.35
    bandwidth: float = 3350
    mbu: float = 0.15
    prompt_tokens: int = 64
    answer_tokens: int = 256
    image_side: int = 0
    candidates: int = 100_000


@dataclass(frozen=True)
class Cost:
    """Work of one GPU.

    Attributes:
        flops: Floating-point operations.
        read: Bytes that are read to write token after token.
    """

    flops: float = 0.0
    read: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.read * times)

    def hours(self, given: Assumptions) -> float:
        """How long it takes."""
        computing = self.flops / (given.tflops * 1e12 * given.mfu)
        return (computing + self.read / (given.bandwidth * GB * given.mbu)) / 3600


@dataclass(frozen=True)
class Phase:
    """A part of a stage, one after another.

    Attributes:
        name: What is done.
        memory: Bytes on a GPU at the moment when they are most, by part.
        cost: Of a GPU that takes part.
        gpus: How many take part; the stage's others wait.
    """

    name: str
    memory: Mapping[str, int]
    cost: Cost
    gpus: int = 1


@dataclass(frozen=True)
class Calls:
    """Questions to a model that somebody serves, or that is asked in this process.

    Attributes:
        role: As what it is asked.
        who: Its name.
        number: How often, without further tries.
        tokens_in: Of all questions.
        tokens_out: Of all answers.
    """

    role: str
    who: str
    number: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class StagePlan:
    """What a stage will cost.

    Attributes:
        stage: Its name.
        gpus: How many it holds.
        phases: Parts of its work.
        calls: What it asks of others.
        checkpoint: Bytes of a checkpoint on disk; two are kept.
        note: How much of it there is, in words.
    """

    stage: str
    gpus: int = 0
    phases: tuple[Phase, ...] = ()
    calls: tuple[Calls, ...] = ()
    checkpoint: int = 0
    note: str = ""

    @property
    def fullest(self) -> Phase | None:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: sum(phase.memory.values()), default=None)

    @property
    def bytes_a_gpu(self) -> int:
        """Memory of a GPU at the fullest moment, without what CUDA itself takes."""
        return sum(self.fullest.memory.values()) if self.fullest else 0

    @property
    def flops(self) -> float:
        """Of all GPUs."""
        return sum(phase.cost.flops * phase.gpus for phase in self.phases)

    def hours(self, given: Assumptions) -> float:
        """How long it takes; calls to others come on top."""
        return sum(phase.cost.hours(given) for phase in self.phases)

    def gpu_hours(self, given: Assumptions) -> float:
        """Of all GPUs that it holds."""
        return self.hours(given) * self.gpus

    def fits(self, card: int) -> bool:
        """Whether a GPU with so many GB is enough."""
        return self.bytes_a_gpu <= card * GB
