"""The common start of several questions about the same images: a model reads it once and goes on from there."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firm.chat.messages import IMAGE_MARK
from firm.critics.encoder import Batch


@dataclass(frozen=True)
class Past:
    """What a model has read.

    Attributes:
        cache: Keys and values of P tokens of N rows.
        deltas: Positions by which the text after the images lies before its place in the row, as images take fewer
            positions than tokens; [N, 1].
    """

    cache: Any
    deltas: Tensor

    def go_on(self, rest: Batch, last: bool) -> dict[str, Any]:
        """Arguments, besides ``rest``, of a model that goes on from here; see `split` for the shapes.

        ``last``: nothing is read after the rest, so that nothing is kept of it.
        """
        cache = _Read(self.cache) if last else _grown_apart(self.cache)
        positions = rest["attention_mask"].cumsum(1) - 1 + self.deltas
        positions = positions[:, -rest["input_ids"].shape[1] :].expand(3, -1, -1)
        return {"position_ids": positions, "past_key_values": cache}


class _Read:
    """A cache that does not grow: a layer sees keys and values of what is read after it, and drops them."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        past = self._cache.layers[layer]
        return torch.cat([past.keys, keys], -2), torch.cat([past.values, values], -2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _grown_apart(cache: Any) -> Any:
    """A cache that starts with the tensors of another and leaves them as they are: layers put new ones in place."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def groups(texts: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Names of questions that are the same up to the last image, together; ``texts`` has a question for each item."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, questions in texts.items():
        found[tuple(text.rpartition(IMAGE_MARK)[0] for text in questions)].append(name)
    return list(found.values())


def split(batches: Sequence[Batch], pad: int) -> tuple[Batch, list[Batch]]:
    """Split questions into the start that all batches have in common, row by row, and what each has after it.

    Args:
        batches: Encoded questions about the same images, padded on the left; token tensors are [N, L], each with an L
            of its own.
        pad: Token to pad with.

    Returns:
        The start, with the images and P tokens, and for each batch a rest of T tokens. Both are padded on the left;
        the mask of a rest is that of start and rest, [N, P + T].
    """
    rows = [_rows(batch, "input_ids") for batch in batches]
    lengths = [_in_common(row) for row in zip(*rows, strict=True)]
    kinds = _rows(batches[0], "mm_token_type_ids")
    heads = [row[:length] for row, length in zip(rows[0], lengths, strict=True)]
    start = {
        **batches[0],
        "input_ids": _padded(heads, pad),
        "attention_mask": _padded([torch.ones_like(head) for head in heads]),
        "mm_token_type_ids": _padded([row[:length] for row, length in zip(kinds, lengths, strict=True)]),
    }
    rests = []
    for batch in rows:
        tails = [row[length:] for row, length in zip(batch, lengths, strict=True)]
        mask = _padded([torch.ones_like(tail) for tail in tails])
        ids = _padded(tails, pad)
        rests.append({
            "input_ids": ids,
            "attention_mask": torch.cat([start["attention_mask"], mask], 1),
            "mm_token_type_ids": torch.zeros_like(ids),
        })  # fmt: skip
    return start, rests


def _rows(batch: Batch, name: str) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def _in_common(rows: Sequence[Tensor]) -> int:
    """Number of equal tokens at the start of all rows; less one if that is all of a row, for a rest is never empty."""
    columns = zip(*(row.tolist()[:-1] for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _padded(rows: list[Tensor], pad: int = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
