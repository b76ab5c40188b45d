"""The text-to-image task: its prompts, their split, and the stream of candidates."""

from collections import Counter
from itertools import islice

import pytest

from firm.shapes import generation, scene, teacher


def test_the_splits_are_disjoint_and_each_shows_every_kind_of_prompt() -> None:
    train = generation.prompts("train")
    test = generation.prompts("test")
    assert not set(train) & set(test)
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    for split in (train, test):
        wanted = [generation.parse(prompt) for prompt in split]
        assert {w.relation for w in wanted} == {"", "and", "left of"}
        assert {o.shape for w in wanted for o in w.objects} == set(scene.SHAPES)
        assert {o.colour for w in wanted for o in w.objects} == set(scene.COLOURS)


def test_the_split_never_changes() -> None:
    assert generation.prompts("test")[:4] == [
        "a green circle",
        "a blue circle",
        "a yellow triangle",
        "a red circle and a yellow circle",
    ]


def test_no_test_prompt_is_a_train_prompt_in_other_words() -> None:
    def meaning(prompt: str) -> tuple[str, tuple[str, ...]]:
        wanted = generation.parse(prompt)
        things = tuple(map(str, wanted.objects))
        return wanted.relation, things if wanted.relation == "left of" else tuple(sorted(things))

    train = {meaning(prompt) for prompt in generation.prompts("train")}
    assert not train & {meaning(prompt) for prompt in generation.prompts("test")}


def test_parse_reads_objects_and_relation() -> None:
    red = scene.Thing("red", "circle")
    blue = scene.Thing("blue", "square")
    assert generation.parse("a red circle") == generation.Wanted((red,))
    assert generation.parse(" A red circle  left of a blue square. ") == generation.Wanted((red, blue), "left of")


@pytest.mark.parametrize("prompt", ["", "a cat", "a red", "red circle", "a red circle and", "a red circle above a cat"])
def test_parse_refuses_any_other_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="does not know the prompt"):
        generation.parse(prompt)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        generation.prompts("validation")  # type: ignore[arg-type]


def test_a_candidate_depends_on_seed_split_and_index_only() -> None:
    stream = list(generation.candidates(8, seed=3, split="train"))
    for index in (7, 0, 5):
        prompt, image = generation.candidate(index, 3, "train")
        assert prompt == stream[index][0]
        assert image.tobytes() == stream[index][1].tobytes()
    assert len({image.tobytes() for _, image in stream}) == 8
    assert generation.candidate(0, 4, "train")[1].tobytes() != stream[0][1].tobytes()
    assert generation.candidate(0, 3, "test")[1].tobytes() != stream[0][1].tobytes()


@pytest.mark.parametrize("split", ["train", "test"])
def test_candidates_have_every_score_and_every_quality(split: generation.Split) -> None:
    pairs = list(generation.candidates(600, seed=1, split=split))
    assert {prompt for prompt, _ in pairs} <= set(generation.prompts(split))
    scores = Counter(teacher.instruction_following(prompt, image) for prompt, image in pairs)
    assert all(scores[score] >= 0.08 * len(pairs) for score in range(1, 6)), scores
    worst = Counter(min(teacher.quality(image)) for _, image in pairs)
    assert all(worst[score] >= 0.02 * len(pairs) for score in range(1, 6)), worst


def test_candidates_is_lazy() -> None:
    assert len(list(islice(generation.candidates(10**9, seed=0, split="train"), 2))) == 2
