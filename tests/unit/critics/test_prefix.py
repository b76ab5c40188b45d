"""One start for the questions of all dimensions: images are read once, the answers are those to each alone."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import edits
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import CPU

from firm.chat.messages import Reply
from firm.config import CriticConfig
from firm.critics import encoder as encoding
from firm.critics.judge import JudgeInput, question
from firm.critics.local import LocalCritic
from firm.critics.prefix import groups, split
from firm.critics.rubrics import Rubric, load_rubric, parse_rubric
from firm.images import encode_image
from firm.records import Judgement, Prompt, UserError
from firm.shapes.models import WEIGHTS

SHORT = edits.SHORT
LONG = {d: d for d in SHORT}
GENERATION = {"instruction_following": "short_instruction_following", "quality": "short_quality"}
LONG_GENERATION = {d: d for d in GENERATION}
WORDS = "make the red circle small and move it , paint the first patch green".split()
INSTRUCTIONS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def late(dimension: str) -> Rubric:
    """A rubric whose questions differ before the prompt: what comes after the common start has many lengths."""
    head = f"---\ndimension: {dimension}\nanswer: boxed\nimages: 2\n---\n"
    return parse_rubric(f"late_{dimension}", f"{head}before : <image> after : <image> {dimension} of {{prompt}}")


LATE = {d: late(d) for d in SHORT}


def critic(rubrics: Mapping[str, str], **changes: object) -> LocalCritic:
    plain = {"answer_style": "score_first", "dtype": "float32", "batch_size": 3, "max_new_tokens": 6}
    folder = WEIGHTS / "critic"
    config = CriticConfig.model_validate({"model": str(folder), "rubrics": rubrics, **plain, **changes})
    return LocalCritic(folder, config, CPU)


def pairs(instructions: Sequence[str]) -> list[JudgeInput]:
    """Pairs of pictures of two sizes with these instructions."""
    rows = list(product(edits.NAMES, repeat=4))
    items = []
    for i, text in enumerate(instructions):
        before, after = (encode_image(edits.picture(*rows[(37 * i + k) % 256])) for k in (0, 91))
        if i % 2:
            after = encode_image(edits.picture(*rows[i]).resize((40, 24)))
        items.append(JudgeInput(Prompt(text=text), [before, after]))
    return items


def alone(together: LocalCritic, items: list[JudgeInput]) -> Iterator[tuple[str, list[Any]]]:
    """The outcomes of each dimension, asked as the only one."""
    rubrics = together.rubrics
    for dimension, rubric in rubrics.items():
        together.rubrics = {dimension: rubric}
        yield dimension, [assessment[dimension] for assessment in together.judge(items)]
    together.rubrics = rubrics


@pytest.fixture(scope="module")
def scoring() -> LocalCritic:
    """A critic whose scores depend on every word; those of the shipped one, which has learnt none, hardly differ."""
    made = critic(SHORT)
    with torch.no_grad():
        made.model.lm_head.weight[made._scores] = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) / 3
    return made


@pytest.mark.parametrize(
    ("rubrics", "images"),
    [(SHORT, 2), (LONG, 2), (LATE, 2), (LONG_GENERATION, 1), (GENERATION, 1)],
    ids=["short", "long", "late", "generation", "apart"],
)
@settings(max_examples=8)
@given(instructions=st.lists(INSTRUCTIONS, min_size=1, max_size=5), size=st.integers(1, 4))
def test_scores_are_those_of_each_dimension_alone(
    scoring: LocalCritic, rubrics: Mapping[str, str | Rubric], images: int, instructions: list[str], size: int
) -> None:
    scoring.rubrics = {d: load_rubric(r) if isinstance(r, str) else r for d, r in rubrics.items()}
    scoring.config = scoring.config.model_copy(update={"batch_size": size})
    items = [JudgeInput(item.prompt, item.images[:images]) for item in pairs(instructions)]
    found = scoring.judge(items)
    for dimension, outcomes in alone(scoring, items):
        for assessment, expected in zip(found, outcomes, strict=True):
            here = assessment[dimension]
            assert isinstance(here, Judgement) and here.distribution == pytest.approx(expected.distribution, abs=1e-5)


class Noted:
    """Keeps what a critic writes."""

    def __init__(self, writer: LocalCritic) -> None:
        self.replies: list[Reply] = []
        self._write = writer.write
        writer.write = self  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: Any) -> list[Reply]:
        replies = self._write(*arguments)
        self.replies += replies
        return replies


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("rubrics", ["short", "late"])
def test_answers_are_those_to_each_question_alone(rubrics: str, samples: int) -> None:
    writing = critic(SHORT, answer_style="reason_first", num_samples=samples, batch_size=4)
    if rubrics == "late":
        writing.rubrics = LATE
    items = pairs(["paint it red", "make the first patch green and move it , the red circle", "red", "paint the patch"])
    noted = Noted(writing)
    writing.judge(items)
    together, noted.replies = noted.replies, []
    for _ in alone(writing, items):
        pass
    assert len(together) == 8 * samples and len({reply.text for reply in together}) > 1
    for here, there in zip(together, noted.replies, strict=True):
        assert (here.text, here.truncated) == (there.text, there.truncated)
        assert [t.logprob for t in here.tokens] == pytest.approx([t.logprob for t in there.tokens], abs=1e-5)


class Seen:
    """Counts what a critic's model and encoder look at."""

    def __init__(self, looking: LocalCritic, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.images = self.decoded = 0
        looking.model.model.visual.register_forward_pre_hook(self._look, with_kwargs=True)
        decode = encoding.decode_image

        def counted(png: bytes, where: str) -> Any:
            self.decoded += 1
            return decode(png, where)

        monkeypatch.setattr(encoding, "decode_image", counted)

    def _look(self, _module: object, _arguments: object, options: Mapping[str, Any]) -> None:
        self.calls += 1
        self.images += len(options["grid_thw"])


@pytest.mark.parametrize("style", ["score_first", "reason_first"])
@pytest.mark.parametrize(
    ("rubrics", "images", "passes"), [(SHORT, 2, 1), (LONG, 2, 1), (GENERATION, 1, 2)], ids=["short", "long", "apart"]
)
def test_images_are_read_once_where_the_start_is_common(
    monkeypatch: pytest.MonkeyPatch, style: str, rubrics: dict[str, str], images: int, passes: int
) -> None:
    looking = critic(rubrics, answer_style=style, max_new_tokens=2)
    seen = Seen(looking, monkeypatch)
    items = [JudgeInput(item.prompt, item.images[:images]) for item in pairs(["paint it red", "move it", "red", "it"])]
    assert len(looking.judge(items)) == 4
    assert (seen.calls, seen.images) == (2 * passes, 4 * images * passes)  # two batches
    assert seen.decoded == 4 * images


def test_a_second_wording_is_encoded_as_a_first(scoring: LocalCritic) -> None:
    items = pairs(["paint it red <image> <|image_pad|>", "make the first patch green and move it"])
    images = [item.images for item in items]
    rubrics = [load_rubric(name) for name in ("execution", "short_consistency")]
    texts = [[question(rubric, item.prompt) for item in items] for rubric in rubrics]
    [_, found] = scoring.encoder.wordings(texts, images)
    expected = scoring.encoder.questions(texts[1], images)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_dimensions_are_together_whose_questions_are_the_same_up_to_the_last_image() -> None:
    texts = {"a": ["x <image> 1", "y <image> 1"], "b": ["<image>", "<image>"], "c": ["x <image> 2", "y <image> 3"]}
    assert groups(texts) == [["a", "c"], ["b"]]
    assert groups(texts | {"c": ["x <image> 2", "z <image> 3"]}) == [["a"], ["b"], ["c"]]


def test_start_and_rests_make_up_the_questions(scoring: LocalCritic) -> None:
    items = pairs(["paint it red", "make the first patch green and move it"])
    texts = [[question(late(d), item.prompt) for item in items] for d in ("execution", "consistency")]
    batches = scoring.encoder.wordings(texts, [item.images for item in items])
    start, rests = split(batches, scoring.encoder.pad)
    width = start["input_ids"].shape[1]
    for batch, rest in zip(batches, rests, strict=True):
        ids = torch.cat([start["input_ids"], rest["input_ids"]], 1)
        for row in range(2):
            whole = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert torch.equal(ids[row][rest["attention_mask"][row].bool()], whole)
        assert rest["attention_mask"][:, -1].all() and rest["attention_mask"].shape[1] > width


def test_a_rest_is_never_empty(scoring: LocalCritic) -> None:
    items = pairs(["paint it red"])
    texts = [[question(load_rubric("short_execution"), item.prompt) for item in items]] * 2
    batches = scoring.encoder.wordings(texts, [item.images for item in items])
    start, rests = split(batches, scoring.encoder.pad)
    assert start["input_ids"].shape[1] == batches[0]["input_ids"].shape[1] - 1
    assert [rest["input_ids"].shape[1] for rest in rests] == [1, 1]


def test_a_corrupt_image_of_a_pair_is_named() -> None:
    items = pairs(["red"] * 5)
    items[4].images[1] = items[4].images[1][:40]
    with pytest.raises(UserError, match="cannot decode image") as caught:
        critic(SHORT).judge(items)
    assert "item 4" in str(caught.value)
