"""The loss of answers, without the logits of anything else, and of few answers' tokens at a time.

All logits of a batch of 5 with 12,000 tokens and a vocabulary of 150,000 take 18 GB in bfloat16, and again as much for
their gradient; answers are a hundredth of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

TOKENS = 512
"""Whose logits are there at once."""


def only_answers(model: Any) -> None:
    """Let a language model compute the loss as `AnswerLoss` does. It no longer returns logits."""
    head = model.get_output_embeddings()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a LoRA
    inner.loss_function = loss = AnswerLoss(head)
    head.forward = loss.take


@contextmanager
def with_logits(model: Any) -> Iterator[None]:
    """Let a model that `only_answers` has changed return logits meanwhile."""
    head = model.get_output_embeddings()
    take = head.__dict__.pop("forward")
    try:
        yield
    finally:
        head.forward = take


class AnswerLoss:
    """Cross-entropy of the tokens that have a label, summed.

    Computed inside of the model's forward pass, where a sharded head is whole.
    """

    def __init__(self, head: nn.Linear) -> None:
        """``head`` makes logits of hidden states."""
        self._head = head
        self._hidden = torch.empty(0)

    def take(self, hidden: Tensor) -> Tensor:
        """Take the place of the head: keep the hidden states, [B, T, D], and make no logits of them."""
        self._hidden = hidden
        return hidden.new_empty(0)

    def __call__(self, labels: Tensor, **_: Any) -> Tensor:
        """The sum, float32. ``labels``, [B, T], have each token at its own place, -100 where it does not count."""
        targets = labels[:, 1:]
        there = targets != -100
        hidden, targets = self._hidden[:, :-1][there], targets[there]  # [N, D], [N]
        self._hidden = self._hidden.new_empty(0)
        total = hidden.new_zeros((), dtype=torch.float32)
        for some, wanted in zip(hidden.split(TOKENS), targets.split(TOKENS), strict=True):
            total = total + checkpoint(_sum, some, self._head.weight, wanted, use_reentrant=False)
        return total


def _sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")
