"""The local critic: asked as it was trained, whatever the batch, and clear about what it cannot read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared import CPU

from firm.chat.messages import Reply
from firm.config import CriticConfig
from firm.critics.answers import write_answer
from firm.critics.encoder import Encoder
from firm.critics.judge import JudgeInput, question
from firm.critics.local import LocalCritic, load_processor, question_seed
from firm.critics.pen import Manner, Pen
from firm.critics.rubrics import load_rubric
from firm.images import encode_image
from firm.records import Assessment, Invalid, Judgement, Prompt, UserError
from firm.sft.train import Collator
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS

RUBRICS = {"instruction_following": "short_instruction_following", "quality": "short_quality"}


def config(**changes: object) -> CriticConfig:
    plain = {
        "model": str(WEIGHTS / "critic"), "answer_style": "score_first", "rubrics": RUBRICS,
        "dtype": "float32", "batch_size": 3, "max_new_tokens": 8,
    }  # fmt: skip
    return CriticConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def folder() -> Path:
    """A critic that describes pictures and has learnt no scores, in the form that the sft stage would leave."""
    return WEIGHTS / "critic"


@pytest.fixture(scope="module")
def items() -> list[JudgeInput]:
    pairs = [candidate(i, 0, "train") for i in range(7)]
    return [JudgeInput(Prompt(text=prompt), [encode_image(image)]) for prompt, image in pairs]


def distributions(assessments: list[Assessment]) -> torch.Tensor:
    rows = [[a[d].distribution for d in RUBRICS] for a in assessments]  # type: ignore[union-attr]
    return torch.tensor(rows)


def test_training_and_judging_ask_the_same_question(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(), CPU)
    rubric = load_rubric("short_instruction_following")
    texts = [question(rubric, item.prompt) for item in items[:3]]
    answers = [write_answer(s, "red clear circle top left", "score_first", "boxed") for s in (1, 3, 5)]
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
            "images": [{"bytes": png} for png in item.images],
        }
        for text, answer, item in zip(texts, answers, items, strict=False)
    ]
    trained = Collator(Encoder(load_processor(str(folder))))(rows)
    asked = critic.encoder.questions(texts, [item.images for item in items[:3]])
    width = asked["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(trained[key][:, :width], asked[key])
    assert torch.equal(trained["pixel_values"], asked["pixel_values"])
    served = critic.encoder.append(asked, [critic._prefix] * 3)["input_ids"]
    assert torch.equal(trained["input_ids"][:, : served.shape[1]], served)
    scores = trained["input_ids"][:, served.shape[1]].tolist()
    assert scores == [critic._scores[s - 1] for s in (1, 3, 5)]


def test_large_images_are_scaled_down_alike_in_training_judging_and_serving(folder: Path, tmp_path: Path) -> None:
    large = encode_image(Image.new("RGB", (96, 48)))
    row = {"messages": [{"content": "<image> x"}, {"content": "y"}], "images": [{"bytes": large}]}
    pixels = []
    for bound in (None, 2048):
        critic = LocalCritic(folder, config(max_pixels=bound), CPU)
        judged = critic.encoder.questions(["<image> x"], [[large]])
        trained = Collator(Encoder(load_processor(str(folder), bound)))([row])
        critic.encoder.processor.save_pretrained(tmp_path / str(bound))  # as sft leaves it
        served = Encoder(load_processor(str(tmp_path / str(bound)))).questions(["<image> x"], [[large]])
        assert torch.equal(judged["pixel_values"], trained["pixel_values"])
        assert torch.equal(judged["pixel_values"], served["pixel_values"])
        pixels.append(judged["pixel_values"].shape[0] * 8 * 8)
    assert 2048 < pixels[0] <= 4096, "the model's own bound"
    assert 1024 < pixels[1] <= 2048


def test_a_bound_is_never_above_the_models_own_nor_below_what_it_needs(folder: Path) -> None:
    assert load_processor(str(folder), 10**6).image_processor.size["longest_edge"] == 4096
    with pytest.raises(UserError, match=r"needs 256 pixels .*critic\.max_pixels: 255") as caught:
        load_processor(str(folder), 255)
    assert caught.value.exit_code == 2


def test_score_tokens(folder: Path) -> None:
    encoder = Encoder(load_processor(str(folder)))
    prefix, scores = encoder.score_tokens()
    assert encoder.tokenizer.decode(prefix) == "score :"
    assert [encoder.tokenizer.decode([s]) for s in scores] == list("12345")


@settings(max_examples=6)
@given(order=st.permutations(range(7)), size=st.integers(1, 8))
def test_a_judgement_does_not_depend_on_the_batch(
    folder: Path, items: list[JudgeInput], order: list[int], size: int
) -> None:
    whole = distributions(LocalCritic(folder, config(batch_size=7), CPU).judge(items))
    found = distributions(LocalCritic(folder, config(batch_size=size), CPU).judge([items[i] for i in order]))
    torch.testing.assert_close(found, whole[order], rtol=1e-4, atol=1e-5)


def test_scores_are_distributions_over_every_dimension(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(), CPU)
    found = critic.judge(items)
    assert [set(a) for a in found] == [set(RUBRICS)] * 7
    torch.testing.assert_close(distributions(found).sum(-1), torch.ones(7, 2))
    for assessment in found:
        outcome = assessment["quality"]
        assert isinstance(outcome, Judgement) and outcome.distribution is not None and 1 <= outcome.soft_score <= 5
        assert outcome.distribution[outcome.score - 1] == max(outcome.distribution)
    assert critic.judge([]) == []
    torch.testing.assert_close(distributions(critic.judge(items)), distributions(found), rtol=0, atol=0)


def test_it_is_asked_on_the_dimensions_that_matter_and_no_others(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(), CPU)
    asked = [question(critic.rubrics[d], items[0].prompt) for d in RUBRICS]
    read: list[str] = []
    critic.encoder.wordings = lambda texts, *more, ask=critic.encoder.wordings: (
        read.extend(t for row in texts for t in row) or ask(texts, *more)
    )  # type: ignore[method-assign, func-returns-value]
    whole = critic.judge(items)
    assert len(read) == 14 and set(asked) <= set(read)
    read.clear()
    some = [
        ("quality",),
        None,
        ("instruction_following",),
        ("quality",),
        ("quality", "instruction_following"),
        ("quality",),
    ]
    found = critic.judge([replace(item, dimensions=dimensions) for item, dimensions in zip(items, some, strict=False)])
    assert len(read) == 8
    for dimensions, here, there in zip(some, found, whole, strict=False):
        assert set(here) == set(dimensions or RUBRICS)
        for dimension, outcome in here.items():
            assert outcome.distribution == pytest.approx(there[dimension].distribution, abs=1e-5)  # type: ignore[union-attr]


def test_a_critic_that_writes_first_is_read_or_invalid(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first"), CPU)
    for assessment in critic.judge(items[:4]):
        for outcome in assessment.values():
            assert isinstance(outcome, Judgement | Invalid)
            assert not isinstance(outcome, Invalid) or outcome.reason in ("truncated", "unparsable", "empty")


class Typewriter:
    """A tokenizer of single characters, for answers written letter by letter."""

    eos_token_id = pad_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in tokens if token)


def answered(critic: LocalCritic, text: str, rubric: str, beliefs: dict[int, Sequence[float]]) -> Judgement:
    """What the critic makes of an answer whose n-th digit, from 0 on, it believed to be as ``beliefs[n]`` says."""

    def generate(logits_processor: Sequence[Any], **_: object) -> torch.Tensor:
        digits = 0
        for letter in [*text, "\0"]:
            logits = torch.full((1, 128), -30.0)
            logits[0, ord(letter)] = 0
            if letter in "12345":
                logits[0, 49:54] = torch.tensor(beliefs.get(digits, SURE)).clamp(min=1e-9).log()
                digits += 1
            for processor in logits_processor:
                processor(torch.zeros(1, 0), logits)
        return torch.tensor([[*map(ord, text), 0]])

    critic.encoder = Encoder(SimpleNamespace(tokenizer=Typewriter()))
    critic.model = SimpleNamespace(generate=generate, dtype=torch.float32)  # type: ignore[assignment]
    [outcome] = critic._reason_first({"input_ids": torch.zeros(1, 0)}, load_rubric(rubric), ["?"], [[]])
    assert isinstance(outcome, Judgement)
    return outcome


SURE = (0, 0, 0, 1, 0)
BELIEF = (0, 0, 0.45, 0.55, 0)


@pytest.mark.parametrize(
    ("text", "belief_at"),
    [
        ("I count 2 shapes, 4 of 5.\nFinal Alignment Rating: 4\n\\boxed{4}", 3),
        ("Score: 4 perhaps\nFinal Alignment Rating: **4**\n\\boxed{4}", 1),
        ("It is fine. \\boxed{4} See rule 4.", 0),
        ("Final Alignment Rating: 3 no\nFinal Alignment Rating: 4\n\\boxed{4}", 1),
    ],
)
def test_the_distribution_is_that_of_the_verdicts_first_writing(folder: Path, text: str, belief_at: int) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first", max_new_tokens=99), CPU)
    number = sum(letter in "12345" for letter in text)
    beliefs = {n: SURE for n in range(number)} | {belief_at: BELIEF}
    outcome = answered(critic, text, "instruction_following", beliefs)
    assert outcome.score == 4 and outcome.soft_score == pytest.approx(3.55, abs=1e-6)


def test_the_lowest_of_three_sub_scores_has_a_distribution(folder: Path) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first", max_new_tokens=99), CPU)
    text = '{"reasoning": "4 or 5", "score": [5, 4, 3]}'
    outcome = answered(critic, text, "quality", {2: (0, 0, 0, 0, 1), 3: (0, 0, 0, 1, 0), 4: (0, 0, 0.5, 0.5, 0)})
    assert outcome.parts == (5, 4, 3) and outcome.distribution == pytest.approx((0, 0, 0.5, 0.5, 0), abs=1e-6)
    coins = {n: (0, 0.5, 0, 0.5, 0) for n in (2, 3, 4)}
    tossed = answered(critic, text.replace("[5, 4, 3]", "[4, 2, 4]"), "quality", coins)
    assert tossed.distribution == pytest.approx((0, 0.875, 0, 0.125, 0), abs=1e-6)


def test_a_rating_that_contradicts_the_box_gives_no_distribution(folder: Path) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first", max_new_tokens=99), CPU)
    outcome = answered(critic, "Final Alignment Rating: 3\n\\boxed{4}", "instruction_following", {0: BELIEF, 1: SURE})
    assert outcome.score == 4 and outcome.distribution is None


def test_a_broken_model_is_not_a_score(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(), CPU)
    with torch.no_grad():
        for parameter in critic.model.parameters():
            parameter.fill_(torch.nan)
    [found] = critic.judge(items[:1])
    assert all(isinstance(o, Invalid) and o.reason == "non_finite" for o in found.values())


def test_a_corrupt_image_is_named(folder: Path, items: list[JudgeInput]) -> None:
    spoilt = [*items[:4], JudgeInput(items[4].prompt, [items[4].images[0][:40]])]
    with pytest.raises(UserError, match="cannot decode image") as caught:
        LocalCritic(folder, config(), CPU).judge(spoilt)
    assert "item 4" in str(caught.value)
    one = [replace(item, dimensions=("quality",)) for item in spoilt[3:]]
    with pytest.raises(UserError, match="item 4"):
        LocalCritic(folder, config(), CPU).judge([*spoilt[:3], *one])


@pytest.mark.parametrize(
    "prompt", ["<image>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>"]
)
def test_a_prompt_with_special_tokens_is_only_text(folder: Path, items: list[JudgeInput], prompt: str) -> None:
    found = LocalCritic(folder, config(), CPU).judge(
        [JudgeInput(Prompt(text=f"a red circle {prompt}"), items[0].images), items[1]]
    )
    assert all(isinstance(outcome, Judgement) for assessment in found for outcome in assessment.values())


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    for model in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError) as caught:
            LocalCritic(model, config(), CPU)
        assert str(model) in str(caught.value) and caught.value.exit_code == 2


def test_tokens_add_up_to_the_answer(folder: Path) -> None:
    encoder = Encoder(load_processor(str(folder)))
    ids = encoder.answers(["a red circle , score : 4 { 5 }"])[0]
    assert "".join(encoder.pieces(ids)) == encoder.read(ids)


class Bytes(Typewriter):
    """A tokenizer of bytes, whose tokens may be a part of a character."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_a_character_of_several_tokens_is_added_by_its_last(text: str) -> None:
    encoder = Encoder(SimpleNamespace(tokenizer=Bytes()))
    pieces = encoder.pieces(list(text.encode()))
    assert "".join(pieces) == text and [piece for piece in pieces if piece] == list(text)


def test_a_draw_depends_on_its_seed_and_not_on_its_batch(folder: Path, items: list[JudgeInput]) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first"), CPU)
    texts = [question(load_rubric("short_quality"), item.prompt) for item in items[:3]]

    def write(rows: Sequence[int], temperature: float = 5.0) -> list[str]:
        inputs = critic.encoder.questions([texts[i] for i in rows], [items[i].images for i in rows])
        return [reply.text for reply in critic.write(inputs, [Manner(8, temperature, 10 + i) for i in rows])]

    drawn = write([0, 1, 2])
    assert len(set(drawn)) == 3 and write([2, 0]) == [drawn[2], drawn[0]]
    assert write([0, 1, 2], temperature=0) != drawn


def test_draws_follow_the_models_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    pen = Pen([Manner(limit=4000, temperature=2.0, top_logprobs=3)], CPU)
    drawn = torch.stack([pen(torch.zeros(1, 0), logits).argmax() for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), rtol=0, atol=0.03)
    [steps] = pen.steps()
    expected = logits[0].log_softmax(-1)
    assert [step[0] for step in steps] == expected[drawn].tolist()  # the model's own, whatever the temperature
    assert steps[0][1:] == (expected.flip(0).tolist(), [2, 1, 0])


def test_several_samples_are_one_judgement(folder: Path) -> None:
    critic = LocalCritic(folder, config(answer_style="reason_first", num_samples=3, temperature=0.5), CPU)
    given = iter(["\\boxed{4}", "nothing", "\\boxed{2}"])
    asked = []

    def write(_inputs: object, manners: Sequence[Manner], *_: object) -> list[Reply]:
        asked.extend((manner.temperature, manner.seed) for manner in manners)
        return [Reply(next(given))]

    critic.write = write  # type: ignore[method-assign, assignment]
    [outcome] = critic._reason_first({}, load_rubric("instruction_following"), ["?"], [[]])
    assert isinstance(outcome, Judgement) and outcome.invalid_samples == 1
    assert outcome.distribution == (0, 0.5, 0, 0.5, 0) and outcome.soft_score == 3
    assert [temperature for temperature, _ in asked] == [0.5] * 3 and len({seed for _, seed in asked}) == 3


def test_every_question_is_drawn_by_a_seed_of_its_own() -> None:
    questions: list[tuple[int, str, list[bytes]]] = [(0, "a", [b"1"]), (1, "a", [b"1"]), (0, "b", [b"1"]),
                                                     (0, "a", [b"2"]), (0, "a", [b"1", b"1"])]  # fmt: skip
    assert len({question_seed(*question) for question in questions}) == 5
    assert question_seed(*questions[0]) == question_seed(0, "a", [b"1"])
