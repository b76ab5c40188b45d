"""How a critic writes answers: token by token, each answer of a batch in a manner of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

Step = tuple[float, list[float], list[int]]
"""Logprob of a token, then logprobs and ids of the likeliest tokens in its place."""


@dataclass(frozen=True)
class Manner:
    """How one answer is written.

    Attributes:
        limit: Most tokens.
        temperature: 0 writes what is likeliest; above, the answer is drawn.
        seed: To draw by.
        top_logprobs: Tokens to name in the place of each token, likeliest first; None: the reply has no tokens.
        unwanted: Whether nobody waits for it any more; it is then left as it is.
    """

    limit: int
    temperature: float = 0.0
    seed: int = 0
    top_logprobs: int | None = None
    unwanted: Callable[[], bool] = lambda: False


class Pen(LogitsProcessor):
    """Chooses the tokens of answers and notes how likely each was.

    Every row is drawn with a generator of its own (by the Gumbel-max trick: the largest of logits plus Gumbel noise is
    a draw from their softmax), so an answer depends on its seed and not on the rest of its batch.
    """

    def __init__(self, manners: Sequence[Manner], device: torch.device) -> None:
        self._manners = manners
        self._generators = [torch.Generator(device).manual_seed(m.seed) if m.temperature else None for m in manners]
        self._top = max((m.top_logprobs for m in manners if m.top_logprobs is not None), default=None)
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [N, vocabulary] whose largest is the token to write, in place of the model's ``scores``."""
        chosen = scores.clone()
        for i, (manner, generator) in enumerate(zip(self._manners, self._generators, strict=True)):
            if generator:
                wait = torch.empty_like(scores[i]).exponential_(generator=generator)
                chosen[i] = scores[i] / manner.temperature - wait.log()
        if self._top is not None:
            logprobs = scores.log_softmax(-1)
            here = logprobs.gather(1, chosen.argmax(-1, keepdim=True))[:, 0]
            self._noted.append((here, *logprobs.topk(min(self._top, logprobs.shape[1]))))
        return chosen

    def steps(self) -> list[list[Step]]:
        """The notes of each row, a step for each of its tokens; nothing where none were to be made."""
        noted = [(here.tolist(), top.tolist(), ids.tolist()) for here, top, ids in self._noted]
        tops = [manner.top_logprobs for manner in self._manners]
        return [
            [] if n is None else [(here[i], top[i][:n], ids[i][:n]) for here, top, ids in noted]
            for i, n in enumerate(tops)
        ]


class End(StoppingCriteria):
    """Which answers of a batch are at their limit, or unwanted.

    Args:
        manners: How each is written.
        start: Number of tokens in front of the answers.
        stop: Called before each further token; whether all end here.
    """

    def __init__(self, manners: Sequence[Manner], start: int, stop: Callable[[], bool]) -> None:
        self._manners = manners
        self._start = start
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Whether each row has ended, [N]; ``input_ids`` are [N, tokens]."""
        stop = self._stop()
        written = input_ids.shape[1] - self._start
        ended = [stop or written >= manner.limit or manner.unwanted() for manner in self._manners]
        return torch.tensor(ended, device=input_ids.device)
