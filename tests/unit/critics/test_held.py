"""What a critic holds while it judges: no keys and values that nobody reads again, no logits of earlier steps."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from shared import CPU

from firm.config import CriticConfig
from firm.critics.judge import JudgeInput
from firm.critics.local import LocalCritic
from firm.critics.pen import Manner, Pen
from firm.images import encode_image
from firm.records import Prompt
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS

STEPS = 24


def critic(answer_style: str, *rubrics: str) -> LocalCritic:
    plain = {
        "model": str(WEIGHTS / "critic"), "answer_style": answer_style, "dtype": "float32", "batch_size": 3,
        "max_new_tokens": STEPS, "rubrics": {name.removeprefix("short_"): name for name in rubrics},
    }  # fmt: skip
    return LocalCritic(WEIGHTS / "critic", CriticConfig.model_validate(plain), CPU)


@pytest.fixture(scope="module")
def items() -> list[JudgeInput]:
    pairs = [candidate(i, 0, "train") for i in range(3)]
    return [JudgeInput(Prompt(text=prompt), [encode_image(image)]) for prompt, image in pairs]


@contextmanager
def read(judge: LocalCritic) -> Iterator[list[tuple[Any, int, int]]]:
    """The cache of each pass, its tokens after it, and how many tokens were read."""
    passes: list[tuple[Any, int, int]] = []

    def note(_module: object, _arguments: object, options: dict[str, Any], output: Any) -> None:
        cache, width = output.past_key_values, options["inputs_embeds"].shape[1]
        passes.append((cache, 0 if cache is None else cache.get_seq_length(), width))

    hook = judge.model.model.language_model.register_forward_hook(note, with_kwargs=True)
    yield passes
    hook.remove()


def test_a_score_after_one_pass_needs_no_cache(items: list[JudgeInput]) -> None:
    judge = critic("score_first", "short_instruction_following")
    with read(judge) as passes:
        judge.judge(items)
    assert [cache for cache, _, _ in passes] == [None]


def test_of_a_common_start_nothing_is_copied_and_of_what_comes_after_it_nothing_is_kept(
    items: list[JudgeInput],
) -> None:
    """Keys and values are those of the start after each dimension as before, in the same memory."""
    judge = critic("score_first", "instruction_following", "quality")
    with read(judge) as passes:
        judge.judge(items)
    (start, length, read_first), *rests = passes
    assert length == read_first and len(rests) == 2
    for cache, after, width in rests:
        assert after == length and width > 0
        for mine, first in zip(cache.layers, start.layers, strict=True):
            assert mine.keys.data_ptr() == first.keys.data_ptr() and mine.values.data_ptr() == first.values.data_ptr()


def test_dimensions_that_are_written_grow_caches_of_their_own(items: list[JudgeInput]) -> None:
    judge = critic("reason_first", "instruction_following", "quality")
    with read(judge) as passes:
        judge.judge(items)
    start, length, _ = passes[0]
    assert start.get_seq_length() == length < passes[-1][1]


def logits(vocabulary: int) -> int:
    """Elements of all tensors that are alive and as wide as the vocabulary, weights aside."""
    found = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (vocabulary,))
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in found)


def test_writing_holds_the_logits_of_one_step(items: list[JudgeInput]) -> None:
    judge = critic("reason_first", "short_instruction_following")
    vocabulary = judge.model.config.text_config.vocab_size
    before, held = logits(vocabulary), list[int]()
    inputs = judge.encoder.questions(["<image>quality"] * 3, [item.images for item in items])
    eos = judge.encoder.tokenizer.eos_token_id

    def go_on(_module: object, _arguments: object, output: Any) -> None:
        output.logits[..., eos] = -50

    judge.model.register_forward_hook(go_on)  # it writes to the limit

    def look() -> bool:
        held.append(logits(vocabulary))
        return False

    judge.write(inputs, [Manner(STEPS, 2.0, seed, 20) for seed in range(3)], stop=look)
    assert len(held) == STEPS and max(held) - before <= 6 * 3 * vocabulary and held[-1] <= held[1]


def test_notes_are_as_many_numbers_as_were_asked_for() -> None:
    """Whatever memory they lie in: not a part of the logits, which would keep them all."""
    pen = Pen([Manner(STEPS, top_logprobs=5)] * 2, CPU)
    for _ in range(STEPS):
        pen(torch.zeros(2, 0), torch.randn(2, 10_000))
    held = sum(t.untyped_storage().nbytes() for note in pen._noted for t in note)
    assert held <= STEPS * 2 * (5 * (4 + 8) + 8)
    assert all(len(row) == STEPS and len(row[0][1]) == len(row[0][2]) == 5 for row in pen.steps())
