"""Critics in this process: a Qwen3-VL-class model judges batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from firm.chat.messages import MAX_TOP_LOGPROBS, Reply, Token
from firm.config import CriticConfig
from firm.critics.encoder import Batch, Encoder
from firm.critics.judge import JudgeInput, question
from firm.critics.pen import End, Manner, Pen, Step
from firm.critics.prefix import Past, groups, split
from firm.critics.rubrics import Rubric, load_rubric
from firm.critics.soft import pool, read_reply
from firm.locate import model_path
from firm.model_folder import are_weights_read, cannot_load
from firm.records import SCORES, Assessment, Invalid, Judgement, UserError
from firm.seeds import seed_for

_KIND = "an image-text-to-text model"


def load_processor(model: str, max_pixels: int | None = None) -> Any:
    """Load the processor (tokenizer, image processor, chat template) of a critic folder or hub id.

    Args:
        model: The folder or id.
        max_pixels: Larger images are scaled down to at most as many, if the model's own bound is not lower.

    Raises:
        UserError: It cannot be loaded, or images cannot be bounded so.
    """
    path = model_path(model, "critic.model")
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises anything on a damaged folder
        raise cannot_load("a critic", model, _KIND, error) from error
    if max_pixels is not None:
        _bound(processor.image_processor, max_pixels)
    return processor


def _bound(images: Any, max_pixels: int) -> None:
    size = dict(images.size)
    least, most = size.get("shortest_edge"), size.get("longest_edge")  # numbers of pixels, whatever their names say
    if least is None or most is None:
        what, fix = "the critic's processor does not count the pixels of an image", "leave it out"
        raise UserError(what, "critic.max_pixels", fix, usage=True)
    if max_pixels < least:
        what, fix = f"the critic needs {least} pixels of an image", f"set it to {least} or more"
        raise UserError(what, f"critic.max_pixels: {max_pixels}", fix, usage=True)
    images.size = {**size, "longest_edge": min(max_pixels, most)}


def load_model(config: CriticConfig, model: str) -> PreTrainedModel:
    """Load the critic's model from a folder or hub id: safetensors only, and all of its weights.

    Raises:
        UserError: It cannot be loaded.
    """
    path = model_path(model, "critic.model")
    dtype = getattr(torch, config.dtype)
    logging.disable_progress_bar()  # progress bars clutter a log
    try:
        if not are_weights_read():
            made = AutoConfig.from_pretrained(path, trust_remote_code=False)
            return AutoModelForImageTextToText.from_config(made, dtype=dtype, trust_remote_code=False)
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # as above
        raise cannot_load("a critic", model, _KIND, error) from error
    if missing := sorted(info["missing_keys"]):
        what = f"cannot load a critic: {len(missing)} of its weights are missing, such as {missing[0]}"
        raise UserError(what, model, "get the whole model", usage=True)
    return loaded


class LocalCritic:
    """A critic in this process; implements :class:`firm.critics.judge.Judge`."""

    def __init__(
        self,
        folder: Path | str,
        config: CriticConfig,
        device: torch.device,
        model: PreTrainedModel | None = None,
        together: bool = False,
    ) -> None:
        """Load a trained critic.

        Args:
            folder: Of the critic.
            config: Its configuration.
            device: Where it judges.
            model: A model to use, as it is, instead of the folder's.
            together: Whether the model is shared by ranks that judge at the same time, as many batches each.
        """
        self.config = config
        self.device = device
        self.encoder = Encoder(load_processor(str(folder), config.max_pixels))
        self.model = load_model(config, str(folder)).to(device).eval() if model is None else model
        self._together = together
        self.rubrics: Mapping[str, Rubric] = {d: load_rubric(name) for d, name in config.rubrics.items()}
        self._prefix, self._scores = self.encoder.score_tokens()

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        """One outcome for each item and dimension on which it is judged, in order.

        Items of the same dimensions are judged together, ``batch_size`` at a time in their order.
        """
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, item in enumerate(items):
            alike.setdefault(item.among(self.rubrics), []).append(i)
        found: dict[int, Assessment] = {}
        size = self.config.batch_size
        for dimensions, numbers in alike.items():
            for batch in (numbers[start : start + size] for start in range(0, len(numbers), size)):
                found |= zip(batch, self._judge(items, batch, dimensions), strict=True)
        return [found[i] for i in range(len(items))]

    def _judge(
        self, all_items: Sequence[JudgeInput], batch: Sequence[int], dimensions: Sequence[str]
    ) -> list[Assessment]:
        """Judge those items whose numbers are ``batch``."""
        items = [all_items[i] for i in batch]
        images = [item.images for item in items]
        texts = {d: [question(self.rubrics[d], item.prompt) for item in items] for d in dimensions}
        answer = self._score_first if self.config.answer_style == "score_first" else self._reason_first
        outcomes = {}
        for dimension, inputs, past in self._questions(texts, images, batch):
            rubric = self.rubrics[dimension]
            outcomes[dimension] = list(answer(inputs, rubric, texts[dimension], images, past))
        return [{d: outcomes[d][i] for d in dimensions} for i in range(len(items))]

    def _questions(
        self, texts: Mapping[str, Sequence[str]], images: Sequence[Sequence[bytes]], numbers: Sequence[int]
    ) -> Iterator[tuple[str, Batch, Past | None]]:
        """The questions of each dimension, without their start where the model has read it for several dimensions."""
        encoded = dict(zip(texts, self.encoder.wordings(list(texts.values()), images, numbers), strict=True))
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
            manners = [Manner(self.config.max_new_tokens, temperature, seed, MAX_TOP_LOGPROBS) for seed in seeds]
            replies = self.write(inputs, manners, past)
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
        arguments = self._arguments(inputs, past, last=True)
        logits = self.model(**arguments, use_cache=False, logits_to_keep=1).logits[:, -1, self._scores]
        rows: list[list[float]] = logits.double().softmax(-1).tolist()
        return rows

    @torch.inference_mode()
    def write(
        self,
        inputs: Batch,
        manners: Sequence[Manner],
        past: Past | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Reply]:
        """Write an answer to each question.

        Args:
            inputs: The questions, or what they have after ``past``.
            manners: How the answer to each is written.
            past: What the model has read.
            stop: Called after each token; whether to leave all answers as they are. The critic may be used for
                something else meanwhile.
        """
        start = inputs["input_ids"].shape[1]
        pen = Pen(manners, self.device)
        output = self.model.generate(
            **self._arguments(inputs, past), do_sample=False, max_new_tokens=max(m.limit for m in manners),
            pad_token_id=self.encoder.pad, logits_processor=[pen], stopping_criteria=[End(manners, start, stop)],
            synced_gpus=self._together,
        )  # fmt: skip
        rows: list[list[int]] = output[:, start:].tolist()
        return [self._reply(row[: m.limit], steps) for row, m, steps in zip(rows, manners, pen.steps(), strict=True)]

    def _reply(self, row: list[int], steps: Sequence[Step]) -> Reply:
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

    def _arguments(self, inputs: Batch, past: Past | None = None, last: bool = False) -> dict[str, Any]:
        floats = self.model.dtype
        moved = {k: t.to(self.device, floats if t.is_floating_point() else None) for k, t in inputs.items()}
        return moved | past.go_on(moved, last) if past else moved


def question_seed(seed: int, text: str, images: Sequence[bytes]) -> int:
    """Seed of the answer to one question, in [0, 2**63): the same in any batch, and after a restart."""
    digests = (hashlib.sha256(png).hexdigest() for png in images)
    return seed_for(seed, "answer", text, *digests)


def _judgement(probabilities: Sequence[float], rationale: str) -> Judgement | Invalid:
    if not all(math.isfinite(p) for p in probabilities):
        return Invalid(reason="non_finite", detail="the score tokens have no finite probability")
    best = max(SCORES, key=lambda s: probabilities[s - 1])
    return Judgement(score=best, distribution=tuple(probabilities), rationale=rationale)
