"""What a critic costs: one step of its training, and one batch of judgements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from PIL import Image
from torch import Tensor

from firm.chat.messages import IMAGE_MARK
from firm.config import CriticConfig, SFTConfig
from firm.critics.encoder import Batch, Encoder
from firm.critics.judge import question
from firm.critics.local import load_model, load_processor
from firm.critics.prefix import Past, groups, split
from firm.critics.rubrics import load_rubric
from firm.images import encode_image
from firm.model_folder import json_object
from firm.plan.assumptions import Assumptions, Cost
from firm.plan.meter import Meter, bytes_of
from firm.plan.origins import going_through
from firm.records import Prompt, UserError
from firm.sft.loss import only_answers
from firm.sft.optimizer import Muon
from firm.sft.sharding import blocks_of
from firm.sft.train import load, prepare

CHARACTERS = 4
"""Of an English text, to a token of Qwen's."""
CHAT, MARKS = 8, 2
"""Tokens of a chat around what the user says, and around an image."""
FLOAT = 4
"""Bytes of a float32, which all that trains is."""
PREFIX = 3
"""Tokens of "Score: ", which a score-first critic's answer is made to begin with."""


@dataclass(frozen=True)
class Questions:
    """What a critic is asked about one item.

    Attributes:
        texts: Tokens of all but the images, by dimension.
        together: Dimensions whose questions begin alike, up to the images.
        images: Number of images.
        patches: Of a side of an image.
    """

    texts: Mapping[str, int]
    together: Sequence[Sequence[str]]
    images: int
    patches: int

    @classmethod
    def of(cls, critic: CriticConfig, folder: Path, side: int, given: Assumptions) -> Questions:
        """Questions about images of ``side`` pixels; tokens are counted where the tokenizer is there."""
        rubrics = {d: load_rubric(name) for d, name in critic.rubrics.items()}
        texts = {d: question(rubric, Prompt(text="")) for d, rubric in rubrics.items()}
        images = next(iter(rubrics.values())).images
        if (folder / "tokenizer.json").is_file():
            encoder = Encoder(load_processor(str(folder), critic.max_pixels))
            pictures = [[encode_image(Image.new("RGB", (side, side)))] * images] * len(texts)
            batch = encoder.questions(list(texts.values()), pictures)
            pads = int(batch["mm_token_type_ids"][0].sum())
            lengths = [length - pads - MARKS * images for length in batch["attention_mask"].sum(1).tolist()]
        else:
            lengths = [CHAT + math.ceil(len(text.replace(IMAGE_MARK, "")) / CHARACTERS) for text in texts.values()]
        return cls(
            texts={
                d: length + given.prompt_tokens * ("prompt" in rubrics[d].placeholders)
                for d, length in zip(texts, lengths, strict=True)
            },
            together=groups({d: [text] for d, text in texts.items()}),
            images=images,
            patches=_patches(folder, side, critic.max_pixels or math.inf),
        )

    def batch(self, config: Any, dimension: str, size: int) -> Batch:
        """A batch of questions as a processor encodes them, the first a token shorter than the others."""
        vision = config.vision_config
        image = [config.image_token_id] * (self.patches // vision.spatial_merge_size) ** 2
        word = config.text_config.vocab_size - 1 - list(self.texts).index(dimension)  # a text of its own
        marked = [config.vision_start_token_id, *image, config.vision_end_token_id]
        row = marked * self.images + [word] * self.texts[dimension]
        ids = torch.tensor([row] * size)
        mask = torch.ones_like(ids)
        mask[0, 0] = size == 1
        pictures = size * self.images
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == config.image_token_id).long(),
            "pixel_values": torch.empty(pictures * self.patches**2, values),
            "image_grid_thw": torch.tensor([[1, self.patches, self.patches]] * pictures),
        }


def _patches(folder: Path, side: int, max_pixels: float) -> int:
    """Patches of a side of a square image, as the processor of Qwen's models resizes it."""
    settings = json_object(folder / "preprocessor_config.json")
    settings = settings or json_object(folder / "processor_config.json").get("image_processor", {})
    settings = {**settings, **settings.get("size", {})}
    if not {"patch_size", "merge_size", "shortest_edge", "longest_edge"} <= settings.keys():
        fix = "plan with a critic of Qwen-VL's kind, whose folder has preprocessor_config.json or processor_config.json"
        raise UserError(f"{folder} has no image processor like Qwen-VL's", "critic.model", fix, usage=True)
    unit = settings["patch_size"] * settings["merge_size"]
    bounds = settings["shortest_edge"], min(settings["longest_edge"], max_pixels)
    least, most = (math.sqrt(pixels) / unit for pixels in bounds)
    return int(max(min(round(side / unit), math.floor(most)), math.ceil(least), 1) * settings["merge_size"])


@dataclass(frozen=True)
class Training:
    """Training of a critic on one GPU.

    Attributes:
        memory: Bytes by part, at the moment when they are most.
        batch: Cost of one forward and backward pass.
        step: Cost of an optimizer's step.
        checkpoint: Bytes of a checkpoint.
    """

    memory: Counter[str]
    batch: Cost
    step: Cost
    checkpoint: int


def training(critic: CriticConfig, sft: SFTConfig, questions: Questions, answer_tokens: int, workers: int) -> Training:
    """What it takes to train a critic, whose ``model`` is a folder, as `firm.sft.train` does."""
    shared = sft.sharding == "full" and workers > 1
    meter = Meter()
    with going_through(critic.model, "critic.model"), meter:
        model = (load if shared else prepare)(critic, sft, seed=0)
        only_answers(model)
        meter.watch(model)
        meter.vocabulary = model.config.text_config.vocab_size
        trained = [p for p in model.parameters() if p.requires_grad]
        if sft.gradient_checkpointing:
            model.activation_checkpointing_enable()  # as the Trainer calls it
        optimizer = Muon(model, sft) if sft.optimizer == "muon" else torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        meter.mark((p.grad for p in trained if p.grad is not None), "gradients")
        meter.reset()
        optimizer.step()
        step = Cost(meter.flops)
        states = meter.mark((t for state in optimizer.state.values() for t in state.values()), "states")
        if sft.gradient_accumulation == 1 and not shared:
            optimizer.zero_grad(set_to_none=True)
        meter.reset()
        _pass(model.train(), critic, example(questions, model.config, sft.batch_size, answer_tokens))
        batch, memory = Cost(meter.flops), meter.peak
    if shared:
        memory = Counter({**memory, **_shares(model, workers)})
        step, states = step * (1 / workers), 2 * FLOAT * _number(trained)
    elif workers > 1:
        memory["buckets"] = bytes_of(trained)  # DDP's copies of gradients
    return Training(memory, batch, step, FLOAT * _number(trained) + states)


def _shares(model: Any, workers: int) -> Counter[str]:
    """What a GPU holds of a sharded model.

    Buckets are what is gathered: all outside of blocks during a step, and two blocks, one of them ahead of time; and
    gradients of the same, again in float32 to be summed.
    """
    blocks = [list(block.parameters()) for block in blocks_of(model)]
    inner = {p for block in blocks for p in block}
    outer = [p for p in model.parameters() if p not in inner]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    largest = max(blocks, key=bytes_of)
    gradients = [p for p in (*outer, *largest) if p.requires_grad]
    share = FLOAT * _number(trained) // workers
    return Counter(
        weights=share + bytes_of(frozen) // workers,
        gradients=share,
        states=2 * share,
        buckets=bytes_of(outer) + 2 * bytes_of(largest) + bytes_of(gradients) + FLOAT * _number(gradients),
    )


def example(questions: Questions, config: Any, size: int, answer_tokens: int) -> Batch:
    """A batch of the longest question with answers of so many tokens; images have no content."""
    longest = max(questions.texts, key=lambda dimension: questions.texts[dimension])
    batch = questions.batch(config, longest, size)
    labels = torch.full_like(batch["input_ids"], -100)
    return _continued(batch, answer_tokens) | {"labels": torch.cat([labels, torch.full((size, answer_tokens), 3)], 1)}


def _pass(model: Any, critic: CriticConfig, batch: Batch) -> None:
    """Forward and backward, under what accelerate puts around a model that trains in bfloat16."""
    forward = model.forward
    if critic.dtype == "bfloat16":
        forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
    loss = forward(**batch, use_cache=False)["loss"]
    loss.backward()


@dataclass(frozen=True)
class Judging:
    """Judgements on one GPU.

    Attributes:
        weights: Bytes of the model.
        memory: Bytes by part without the weights, at the moment when they are most.
        item: Cost of one item on all dimensions.
    """

    weights: int
    memory: Counter[str]
    item: Cost


def judging(critic: CriticConfig, questions: Questions, answer_tokens: int) -> Judging:
    """What it takes to judge with a critic, whose ``model`` is a folder, as `firm.critics.local` does."""
    meter = Meter()
    with going_through(critic.model, "critic.model"), meter, torch.no_grad():
        model = load_model(critic, critic.model).eval()
        weights = meter.watch(model)
        meter.vocabulary = model.config.text_config.vocab_size
        cost = Cost()
        moments: list[Counter[str]] = []
        for together in questions.together:
            batches = [questions.batch(model.config, dimension, critic.batch_size) for dimension in together]
            past = None
            if len(batches) > 1:
                start, batches = split(batches, pad=0)
                past, read = _read(model, start, meter)
                cost += read
                moments.append(meter.peak)
            for batch in batches:
                for measured, times in _answer(model, batch, past, meter, critic):
                    cost += measured * (times or answer_tokens * critic.num_samples)
                    moments.append(meter.peak)
    memory = max(moments, key=Counter.total)
    del memory["weights"]
    return Judging(weights, memory, cost * (1 / critic.batch_size))


def _read(model: Any, start: Batch, meter: Meter) -> tuple[Past, Cost]:
    """What several questions have in common is read once."""
    meter.reset()
    given = _arguments(model, start)
    positions, deltas = model.model.get_rope_index(**given)
    cache = model.model(**given, position_ids=positions, use_cache=True).past_key_values
    meter.mark(_cached(cache), "kv")
    return Past(cache, deltas), Cost(meter.flops)


def _answer(
    model: Any, batch: Batch, past: Past | None, meter: Meter, critic: CriticConfig
) -> Iterator[tuple[Cost, int]]:
    """The question is read, then an answer is written: the cost of each, and how often (0: for each token)."""
    meter.reset()
    first = critic.answer_style == "score_first"
    if first:
        batch = _continued(batch, PREFIX)
    given = _arguments(model, batch) | (past.go_on(batch, last=first) if past else {})
    cache = model(**given, use_cache=not first, logits_to_keep=1).past_key_values
    yield Cost(meter.flops), critic.num_samples
    if first:
        return
    held = meter.mark(_cached(cache), "kv")
    meter.reset()
    size, length = batch["attention_mask"].shape
    ids, mask = torch.full((size, 1), 3), torch.ones(size, length + 1, dtype=torch.long)
    positions = torch.full((3, size, 1), length)
    _ = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    grown = held * critic.max_new_tokens // length
    meter.peak["kv"] += grown
    read = bytes_of([*model.model.language_model.layers.parameters(), model.lm_head.weight])
    yield Cost(meter.flops, read + held), 0


def _arguments(model: Any, batch: Batch) -> Batch:
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in batch.items()}


def _continued(batch: Batch, tokens: int) -> Batch:
    """A batch with an answer of so many tokens."""
    answers = torch.full((len(batch["input_ids"]), tokens), 3)
    more = {"input_ids": answers, "attention_mask": torch.ones_like(answers), "mm_token_type_ids": answers * 0}
    return batch | {name: torch.cat([batch[name], tail], 1) for name, tail in more.items()}


def _cached(cache: Any) -> list[Tensor]:
    """Keys and values."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _number(tensors: Iterable[Tensor]) -> int:
    """How many numbers there are in tensors."""
    return sum(t.numel() for t in tensors)
