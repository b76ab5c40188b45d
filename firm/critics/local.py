"""Critics in this process: a Qwen3-VL-class model judges batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, PreTrainedModel
from transformers.utils import logging

from firm.chat.messages import MAX_TOP_LOGPROBS, Reply, Token
from firm.config import CriticConfig
from firm.critics.encoder import Batch, Encoder
from firm.critics.judge import JudgeInput, question
from firm.critics.prefix import Past, groups, split
from firm.critics.rubrics import Rubric, load_rubric
from firm.critics.soft import pool, read_reply
from firm.locate import model_path
from firm.records import SCORES, Assessment, Invalid, Judgement, UserError
from firm.seeds import seed_for


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


def load_model(config: CriticConfig, model: str) -> PreTrainedModel:
    """Load the critic's model from a folder or hub id.

    Raises:
        UserError: It cannot be loaded.
    """
    path = model_path(model, "critic.model")
    dtype = getattr(torch, config.dtype)
    logging.disable_progress_bar()  # progress bars clutter a log
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error


def _cannot_load(model: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    fix = "give the folder of an image-text-to-text model, or a hub id that this machine can reach"
    return UserError(f"cannot load a critic: {reason}", model, fix, usage=True)


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
        size = self.config.batch_size
        batches = [self._judge(items[start : start + size], start) for start in range(0, len(items), size)]
        return [assessment for batch in batches for assessment in batch]

    def _judge(self, items: Sequence[JudgeInput], first: int) -> list[Assessment]:
        """Judge one batch, whose first item is number ``first``."""
        images = [item.images for item in items]
        texts = {d: [question(rubric, item.prompt) for item in items] for d, rubric in self.rubrics.items()}
        answer = self._score_first if self.config.answer_style == "score_first" else self._reason_first
        outcomes = {}
        for dimension, inputs, past in self._questions(texts, images, first):
            rubric = self.rubrics[dimension]
            outcomes[dimension] = list(answer(inputs, rubric, texts[dimension], images, past))
        return [{d: outcomes[d][i] for d in self.rubrics} for i in range(len(items))]

    def _questions(
        self, texts: Mapping[str, Sequence[str]], images: Sequence[Sequence[bytes]], first: int
    ) -> Iterator[tuple[str, Batch, Past | None]]:
        """The questions of each dimension, without their start where the model has read it for several dimensions."""
        encoded = dict(zip(texts, self.encoder.wordings(list(texts.values()), images, first), strict=True))
        for group in groups(texts):
            batches = [encoded[dimension] for dimension in group]
            past = None
            if len(group) > 1:
                start, batches = split(batches, self.encoder.pad)
                past = self._read(start)
            for dimension, batch in zip(group, batches, strict=True):
                yield dimension, batch, past

    @torch.inference_mode()
    def _read(self, start: Batch) -> Past:
        inputs = self._arguments(start)
        positions, deltas = self.model.model.get_rope_index(**inputs)
        return Past(self.model.model(**inputs, position_ids=positions, use_cache=True).past_key_values, deltas)

    def _score_first(
        self, inputs: Batch, _rubric: Rubric, _texts: object, _images: object, past: Past | None
    ) -> Iterator[Judgement | Invalid]:
        for row in self.score(inputs, past):
            yield _judgement(row, "")

    def _reason_first(
        self,
        inputs: Batch,
        rubric: Rubric,
        texts: Sequence[str],
        images: Sequence[Sequence[bytes]],
        past: Past | None = None,
    ) -> Iterator[Judgement | Invalid]:
        temperature = self.config.temperature if self.config.num_samples > 1 else 0.0
        samples = []
        for sample in range(self.config.num_samples):
            seeds = [question_seed(sample, text, pngs) for text, pngs in zip(texts, images, strict=True)]
            replies = self.write(inputs, self.config.max_new_tokens, MAX_TOP_LOGPROBS, temperature, seeds, past)
            samples.append([read_reply(r, rubric.score_format, "reason_first") for r in replies])
        yield from map(pool, zip(*samples, strict=True))

    @torch.inference_mode()
    def score(self, inputs: Batch, past: Past | None = None) -> list[list[float]]:
        """Probabilities of the five scores after the forced prefix of a score-first answer, one row per question.

        Args:
            inputs: The questions, or what they have after ``past``.
            past: What the model has read.
        """
        inputs = self.encoder.append(inputs, [self._prefix] * len(inputs["input_ids"]))
        del inputs["labels"]
        logits = self.model(**self._arguments(inputs, past), logits_to_keep=1).logits[:, -1, self._scores]
        rows: list[list[float]] = logits.double().softmax(-1).tolist()
        return rows

    @torch.inference_mode()
    def write(
        self,
        inputs: Batch,
        limit: int,
        top_logprobs: int | None = None,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        past: Past | None = None,
    ) -> list[Reply]:
        """Write an answer to each question.

        Args:
            inputs: The questions, or what they have after ``past``.
            limit: Most tokens of an answer.
            top_logprobs: Tokens to name in the place of each token, likeliest first; None: replies have no tokens.
            temperature: 0 writes what is likeliest; above, answers are drawn.
            seeds: One for each question, to draw by.
            past: What the model has read.
        """
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds] if temperature else []
        pen = _Pen(top_logprobs, temperature, generators)
        output = self.model.generate(
            **self._arguments(inputs, past), do_sample=False, max_new_tokens=limit, pad_token_id=self.encoder.pad,
            logits_processor=[pen],
        )  # fmt: skip
        rows: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._reply(row, steps) for row, steps in zip(rows, pen.steps(len(rows)), strict=True)]

    def _reply(self, row: list[int], steps: Sequence[_Step]) -> Reply:
        """The answer of a row of tokens up to its end, with a step for each token or none at all."""
        end = self.encoder.tokenizer.eos_token_id
        truncated = end not in row
        row = row if truncated else row[: row.index(end)]
        text = self.encoder.read(row)
        if not steps:
            return Reply(text, truncated)
        tokens = []
        for token, piece, (logprob, logprobs, ids) in zip(row, self.encoder.pieces(row), steps, strict=False):
            texts = (piece if i == token else self.encoder.text_of(i) for i in ids)
            tokens.append(Token(piece, logprob, tuple(zip(texts, logprobs, strict=True))))
        return Reply(text, truncated, tuple(tokens))

    def _arguments(self, inputs: Batch, past: Past | None = None) -> dict[str, Any]:
        floats = self.model.dtype
        moved = {k: t.to(self.device, floats if t.is_floating_point() else None) for k, t in inputs.items()}
        return moved | past.go_on(moved) if past else moved


_Step = tuple[float, list[float], list[int]]
"""Logprob of a token, then logprobs and ids of the likeliest tokens in its place."""


class _Pen(LogitsProcessor):
    """Chooses the tokens of answers and notes how likely each was.

    Every row is drawn with a generator of its own (by the Gumbel-max trick: the largest of logits plus Gumbel noise is
    a draw from their softmax), so an answer depends on its seed and not on the rest of its batch.
    """

    def __init__(self, top: int | None, temperature: float, generators: Sequence[torch.Generator]) -> None:
        self._top = top
        self._temperature = temperature
        self._generators = generators
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [N, vocabulary] whose largest is the token to write, in place of the model's ``scores``."""
        chosen = scores
        if self._generators:
            waits = [torch.empty_like(scores[0]).exponential_(generator=g) for g in self._generators]
            chosen = scores / self._temperature - torch.stack(waits).log()
        if self._top is not None:
            logprobs = scores.log_softmax(-1)
            here = logprobs.gather(1, chosen.argmax(-1, keepdim=True))[:, 0]
            self._noted.append((here, *logprobs.topk(min(self._top, logprobs.shape[1]))))
        return chosen

    def steps(self, rows: int) -> list[list[_Step]]:
        """The notes of each row, a step for each of its tokens; nothing where none were to be made."""
        noted = [(here.tolist(), top.tolist(), ids.tolist()) for here, top, ids in self._noted]
        return [[(here[i], top[i], ids[i]) for here, top, ids in noted] for i in range(rows)]


def question_seed(seed: int, text: str, images: Sequence[bytes]) -> int:
    """Seed of the answer to one question, in [0, 2**63): the same in any batch, and after a restart."""
    digests = (hashlib.sha256(png).hexdigest() for png in images)
    return seed_for(seed, "answer", text, *digests)


def _judgement(probabilities: Sequence[float], rationale: str) -> Judgement | Invalid:
    if not all(math.isfinite(p) for p in probabilities):
        return Invalid(reason="non_finite", detail="the score tokens have no finite probability")
    best = max(SCORES, key=lambda s: probabilities[s - 1])
    return Judgement(score=best, distribution=tuple(probabilities), rationale=rationale)
