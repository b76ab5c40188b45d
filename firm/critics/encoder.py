"""How a critic is asked: training and judging share one way of encoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from firm.chat.messages import IMAGE_MARK
from firm.critics.answers import SCORE_PREFIX
from firm.images import decode_image
from firm.records import SCORES, UserError

Batch = dict[str, Tensor]


class Encoder:
    """Turns questions with images into left-padded model inputs, and appends answers to them."""

    def __init__(self, processor: Any) -> None:
        """``processor``: from :func:`firm.critics.local.load_processor`."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.pad = self.tokenizer.pad_token_id
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        self._control = [token for token in added if len(token) > 1]
        self.text_of: Callable[[int], str] = cache(lambda token: self.read([token]))

    def questions(
        self, texts: Sequence[str], images: Sequence[Sequence[bytes]], numbers: Sequence[int] | None = None
    ) -> Batch:
        """Encode user messages; each ``<image>`` in a text stands for the next of its PNG images.

        Raises:
            UserError: An image cannot be decoded; names the number of its item, by default its place.
        """
        numbers = range(len(images)) if numbers is None else numbers
        prompts = [self._chat(text) for text in texts]
        pictures = [decode_image(png, f"item {i}") for i, pngs in zip(numbers, images, strict=True) for png in pngs]
        inputs = self.processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt",
            return_mm_token_type_ids=True,
        )  # fmt: skip
        return dict(inputs)

    @property
    def max_tokens(self) -> int:
        """Most tokens that the model is made for."""
        return int(self.tokenizer.model_max_length)

    def wordings(
        self, texts: Sequence[Sequence[str]], images: Sequence[Sequence[bytes]], numbers: Sequence[int] | None = None
    ) -> list[Batch]:
        """Encode several rows of questions about the same images, each as `questions` does; images are read once."""
        batch = self.questions(texts[0], images, numbers)
        return [batch, *(self._reworded(batch, row) for row in texts[1:])]

    def _reworded(self, batch: Batch, texts: Sequence[str]) -> Batch:
        mark = self.processor.image_token
        sizes = batch["image_grid_thw"].prod(1) // self.processor.image_processor.merge_size**2
        marks = iter([mark * size for size in sizes.tolist()])  # what the processor makes of the mark of each image
        prompts = [re.sub(re.escape(mark), lambda _: next(marks), self._chat(text)) for text in texts]
        inputs = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        kinds = (inputs["input_ids"] == self.processor.image_token_id).to(batch["mm_token_type_ids"].dtype)
        return {**batch, **inputs, "mm_token_type_ids": kinds}

    def _chat(self, text: str) -> str:
        parts = text.split(IMAGE_MARK)
        content: list[dict[str, str]] = []
        for i, part in enumerate(parts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": self._plain(part)}] if part else []
        chat: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return chat

    def _plain(self, text: str) -> str:
        """Escape special tokens: a prompt that spells one must not act as one."""
        for token in self._control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of assistant answers, with the end-of-turn token."""
        ids: list[list[int]] = self.tokenizer([t.strip() for t in texts], add_special_tokens=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in ids]

    def read(self, tokens: Sequence[int]) -> str:
        """Text of an answer."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text of an answer; a character of several tokens is added by its last."""
        pieces = []
        start = end = 0  # of the tokens last added: what follows is read behind them, as spaces depend on it
        for position in range(1, len(tokens) + 1):
            before, after = self.read(tokens[start:end]), self.read(tokens[start:position])
            incomplete = after.endswith("\ufffd")
            pieces.append("" if incomplete else after[len(before) :])
            if not incomplete:
                start, end = end, position
        return pieces

    def append(self, batch: Batch, rows: Sequence[Sequence[int]]) -> Batch:
        """Append token rows (padded on the right) to encoded questions; sets ``labels`` on the appended part only."""
        width = max(map(len, rows))
        tail = torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        ignored = torch.full_like(batch["input_ids"], -100)
        return {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], tail], 1),
            "attention_mask": torch.cat([batch["attention_mask"], mask], 1),
            "mm_token_type_ids": torch.cat([batch["mm_token_type_ids"], torch.zeros_like(tail)], 1),
            "labels": torch.cat([ignored, tail.masked_fill(mask == 0, -100)], 1),
        }

    def score_tokens(self) -> tuple[list[int], list[int]]:
        """Forced prefix of a score-first answer and the five token ids, one per score, that may follow it.

        Raises:
            UserError: The tokenizer does not give each score a token of its own.
        """
        rows = self.tokenizer([f"{SCORE_PREFIX} {s}" for s in SCORES], add_special_tokens=False)["input_ids"]
        length = next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), 0)
        ids = [row[length] for row in rows if len(row) == length + 1]
        if len(set(ids)) != len(SCORES):
            raise UserError("the tokenizer has no separate token for each score 1..5", "critic.model", "", usage=True)
        return rows[0][:length], ids
