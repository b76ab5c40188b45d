"""Critics in this process: a Qwen3-VL-class model judges batches; training and judging share one way of encoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from firm.chat.messages import IMAGE_MARK
from firm.config import CriticConfig
from firm.critics.answers import SCORE_PREFIX, parse_answer, verdict_positions
from firm.critics.judge import JudgeInput, question
from firm.critics.rubrics import Rubric, load_rubric
from firm.images import decode_image
from firm.locate import model_path
from firm.records import SCORES, Assessment, Invalid, Judgement, UserError
from firm.seeds import seed_for

Batch = dict[str, Tensor]


def load_processor(model: str) -> Any:
    """Load the processor (tokenizer, image processor, chat template) of a critic folder or hub id.

    Raises:
        UserError: It cannot be loaded.
    """
    path = model_path(model, "critic.model")
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error


def load_model(config: CriticConfig, model: str, seed: int | None = None) -> PreTrainedModel:
    """Load the critic's model; with ``seed``, random weights from its configuration (``critic.from_scratch``).

    Raises:
        UserError: It cannot be loaded.
    """
    path = model_path(model, "critic.model")
    dtype = getattr(torch, config.dtype)
    logging.disable_progress_bar()  # progress bars clutter a log
    try:
        if seed is None:
            return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        with torch.random.fork_rng():  # initialisation draws from the global generator
            torch.manual_seed(seed_for(seed, "critic"))
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error


def _cannot_load(model: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    fix = "give the folder of an image-text-to-text model, or a hub id that this machine can reach"
    return UserError(f"cannot load a critic: {reason}", model, fix, usage=True)


class Encoder:
    """Turns questions with images into left-padded model inputs, and appends answers to them."""

    def __init__(self, processor: Any) -> None:
        """``processor``: from :func:`load_processor`."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.pad = self.tokenizer.pad_token_id
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        self._control = [token for token in added if len(token) > 1]

    def questions(self, texts: Sequence[str], images: Sequence[Sequence[bytes]], first: int = 0) -> Batch:
        """Encode user messages; each ``<image>`` in a text stands for the next of its PNG images.

        Raises:
            UserError: An image cannot be decoded; names its item, counted from ``first``.
        """
        prompts = [self._chat(text) for text in texts]
        pictures = [decode_image(png, f"item {i}") for i, pngs in enumerate(images, first) for png in pngs]
        inputs = self.processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt",
            return_mm_token_type_ids=True,
        )  # fmt: skip
        return dict(inputs)

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

    def read(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Text of an answer, and whether it was cut off before its end."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True), self.tokenizer.eos_token_id not in tokens

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


class LocalCritic:
    """A critic in this process; implements :class:`firm.critics.judge.Judge`."""

    def __init__(self, folder: Path, config: CriticConfig, device: torch.device) -> None:
        """Load a trained critic from ``folder``."""
        self.config = config
        self.device = device
        self.encoder = Encoder(load_processor(str(folder)))
        self.model = load_model(config, str(folder)).to(device).eval()
        self.rubrics: Mapping[str, Rubric] = {d: load_rubric(name) for d, name in config.rubrics.items()}
        self._prefix, self._scores = self.encoder.score_tokens()

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        """One outcome per dimension for each item, in order."""
        outcomes: list[Assessment] = [{} for _ in items]
        answer = self._score_first if self.config.answer_style == "score_first" else self._reason_first
        for dimension, rubric in self.rubrics.items():
            for start in range(0, len(items), self.config.batch_size):
                batch = items[start : start + self.config.batch_size]
                texts = [question(rubric, item.prompt) for item in batch]
                inputs = self.encoder.questions(texts, [item.images for item in batch], start)
                for i, outcome in enumerate(answer(inputs, rubric), start):
                    outcomes[i][dimension] = outcome
        return outcomes

    def _score_first(self, inputs: Batch, rubric: Rubric) -> Iterator[Judgement | Invalid]:
        for row in self.score(inputs):
            yield _judgement(row, "")

    def _reason_first(self, inputs: Batch, rubric: Rubric) -> Iterator[Judgement | Invalid]:
        tokens, logits = self.write(inputs, self.config.max_new_tokens, output_logits=True)
        for i, row in enumerate(tokens):
            text, truncated = self.encoder.read(row)
            form: Literal["boxed", "json"] = "json" if rubric.answer == "json" else "boxed"
            outcome = parse_answer(text, form, truncated)
            if isinstance(outcome, Judgement):
                outcome = self._with_distribution(outcome, row, [step[i] for step in logits], form)
            yield outcome

    @torch.inference_mode()
    def score(self, inputs: Batch) -> list[list[float]]:
        """Probabilities of the five scores after the forced prefix of a score-first answer, one row per question."""
        inputs = self.encoder.append(inputs, [self._prefix] * len(inputs["input_ids"]))
        del inputs["labels"]
        logits = self.model(**self._to_device(inputs), logits_to_keep=1).logits[:, -1, self._scores]
        rows: list[list[float]] = logits.double().softmax(-1).tolist()
        return rows

    @torch.inference_mode()
    def write(self, inputs: Batch, limit: int, **options: Any) -> tuple[list[list[int]], Sequence[Tensor]]:
        """Tokens of an answer to each question, at most ``limit``, greedy unless ``options`` of generate say otherwise.

        The second value holds the logits of every step, if ``output_logits`` is set.
        """
        output = self.model.generate(
            **self._to_device(inputs), **{"do_sample": False, **options}, max_new_tokens=limit,
            return_dict_in_generate=True, pad_token_id=self.encoder.pad,
        )  # fmt: skip
        return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.logits or ()

    def _with_distribution(
        self, outcome: Judgement, row: Sequence[int], logits: Sequence[Tensor], answer: Literal["boxed", "json"]
    ) -> Judgement:
        """Attach the probabilities where the verdict was first written; none where that is not what the text says."""
        digits = [i for i, token in enumerate(row[: len(logits)]) if token in self._scores]
        at = verdict_positions(digits, lambda i: self.encoder.read(row[:i])[0], answer)
        if [row[i] for i in at] != [self._scores[s - 1] for s in (outcome.parts or (outcome.score,))]:
            return outcome
        probabilities = torch.stack([logits[i][self._scores].double().softmax(-1) for i in at])
        return outcome.model_copy(update={"distribution": tuple(_of_the_lowest(probabilities).tolist())})

    def _to_device(self, inputs: Batch) -> Batch:
        dtype = self.model.dtype
        return {
            k: (t.to(self.device, dtype) if t.is_floating_point() else t.to(self.device)) for k, t in inputs.items()
        }


def _of_the_lowest(probabilities: Tensor) -> Tensor:
    """Distribution [5] of the lowest of independent scores with distributions [n, 5]."""
    at_least = probabilities.flip(-1).cumsum(-1).flip(-1).prod(0)  # P(all >= s)
    return at_least - torch.cat([at_least[1:], at_least.new_zeros(1)])


def _judgement(probabilities: Sequence[float], rationale: str) -> Judgement | Invalid:
    if not all(math.isfinite(p) for p in probabilities):
        return Invalid(reason="non_finite", detail="the score tokens have no finite probability")
    best = max(SCORES, key=lambda s: probabilities[s - 1])
    return Judgement(score=best, distribution=tuple(probabilities), rationale=rationale)
