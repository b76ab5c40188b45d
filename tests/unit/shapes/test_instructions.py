"""The language of the editing task: every instruction, its split, and what is refused."""

import pytest

from firm.records import SPLITS
from firm.shapes import instructions, models
from firm.shapes.instructions import KINDS, Step, parse
from firm.shapes.scene import COLOURS, SHAPES, Thing

RED = Thing("red", "circle")
BLUE = Thing("blue", "square")


def test_the_splits_are_disjoint_and_each_has_every_kind() -> None:
    train, test = (instructions.instructions(split) for split in SPLITS)
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    for split in SPLITS:
        kinds = instructions.by_kind(split)
        assert set(kinds) == {*KINDS, "compound"}
        assert all(len(texts) >= 3 for texts in kinds.values())
        steps = [step for text in instructions.instructions(split) for step in parse(text)]
        assert {step.thing.colour for step in steps} == set(COLOURS)
        assert {step.thing.shape for step in steps} == set(SHAPES)


def test_the_split_never_changes() -> None:
    assert [texts[0] for texts in instructions.by_kind("test").values()] == [
        "make the red circle yellow",
        "replace the red circle with a red triangle",
        "remove the green square",
        "add a red circle at the bottom right",
        "move the red circle to the top right",
        "make the green circle bigger",
        "swap the red triangle and the yellow circle",
        "make the blue circle yellow and then make the green circle red",
    ]


def test_no_test_swap_is_a_train_swap_in_other_words() -> None:
    swaps = [
        {step.thing, step.other} for split in SPLITS for (step,) in map(parse, instructions.by_kind(split)["swap"])
    ]
    assert all(swaps.count(swap) == 1 for swap in swaps)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("make the red circle blue", [Step("recolor", RED, word="blue")]),
        (" Make the red  circle BIGGER. ", [Step("resize", RED, word="bigger")]),
        ("replace the red circle with a blue square", [Step("replace", RED, BLUE)]),
        ("swap the blue square and the red circle", [Step("swap", BLUE, RED)]),
        ("add a red circle at the top left", [Step("add", RED, word="top left")]),
        (
            "remove the red circle and then move the blue square to the bottom right",
            [Step("remove", RED), Step("move", BLUE, word="bottom right")],
        ),
    ],
)
def test_parse_reads_what_to_do_and_to_what(text: str, steps: list[Step]) -> None:
    assert parse(text) == tuple(steps)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "make the red circle red",  # no change
        "replace the red circle with a red circle",
        "swap the red circle and the red circle",
        "make the red circle purple",
        "move the red circle to the left",
        "remove the red circle and then make the red circle blue",  # one thing in two steps
        "remove the red circle and then remove the blue square and then remove the green square",
        "remove the red circle and then",
        "remove the cat",
    ],
)
def test_parse_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="does not know the instruction"):
        parse(text)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        instructions.instructions("validation")  # type: ignore[arg-type]


def test_the_critics_tokenizer_knows_every_word() -> None:
    tokenizer = models.critic_tokenizer()
    words = {word for split in SPLITS for text in instructions.instructions(split) for word in text.split()}
    assert {token for word in words for token in tokenizer.tokenize(word)} == words
    assert "<unk>" not in words
