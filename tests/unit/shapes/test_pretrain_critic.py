"""What the shipped critic was trained on, and that the command which makes it works."""

import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from firm.images import encode_image
from firm.shapes import pretrain_critic
from firm.shapes.generation import candidate
from firm.shapes.models import critic_tokenizer
from firm.shapes.pretrain_critic import Picture, describe, flaws
from firm.shapes.vision import Observation, caption, observe

IMAGES = [candidate(i, 0, "train")[1] for i in range(40)]
PICTURES = [Picture(encode_image(image), observe(image)) for image in IMAGES]


def said(pictures: list[Picture], seed: int) -> tuple[str, str]:
    row = describe(pictures, np.random.default_rng(seed))
    assert [image["bytes"] for image in row["images"]] == [p.png for p in pictures]
    question, answer = (message["content"] for message in row["messages"])
    return question, answer


def test_every_question_has_the_true_answer_in_words_that_the_tokenizer_knows() -> None:
    tokenizer, kinds = critic_tokenizer(), set()
    for seed, picture in enumerate(PICTURES * 5):
        question, answer = said([picture], seed)
        words = question.split()
        kinds.add(words[0])
        assert question.endswith("<image>") and answer.endswith(caption(picture.observation))
        assert "<unk>" not in tokenizer.tokenize(f"{question.removesuffix('<image>')} {answer}")
        if words[0] == "a":
            shown = any((s.colour, s.shape) == (words[1], words[2]) for s in picture.observation.seen)
            assert answer.startswith("yes ;" if shown else "no ;")
        if words[0] == "texture":
            assert answer.startswith(flaws(picture.observation))
    assert kinds == {"a", "picture", "texture"}


def test_two_pictures_are_described_in_order() -> None:
    one, two = PICTURES[:2]
    captions = caption(one.observation), caption(two.observation)
    assert said([one, two], 0) == (
        "before : <image> after : <image>",
        f"before : {captions[0]} after : {captions[1]}",
    )


def test_no_question_is_about_a_score() -> None:
    texts = [text for seed, picture in enumerate(PICTURES * 5) for text in said([picture], seed)]
    assert not any(character.isdigit() for text in texts for character in text)


def test_flaws_are_said_in_four_words() -> None:
    clean = Observation((), noise=0, stain=0, murk=0, impurity=0)
    assert flaws(clean) == "no noise no stain no blur no tint"
    spoilt = Observation((), noise=0.04, stain=0.06, murk=0.5, impurity=0.01)
    assert flaws(spoilt) == "little noise some stain much blur no tint"


def test_the_command_writes_a_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_RENDERED": 40, "NUM_GENERATED": 2, "STEPS": 5, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(pretrain_critic, name, value)
    monkeypatch.setattr(sys, "argv", ["pretrain_critic", str(tmp_path / "critic")])
    pretrain_critic.main()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "critic")
    assert model.dtype.is_floating_point and model.dtype.itemsize == 4
    assert sum(path.stat().st_size for path in (tmp_path / "critic").iterdir()) < 2.5e6
