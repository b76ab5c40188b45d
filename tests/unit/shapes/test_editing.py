"""The editing task: what instructions do to scenes, prompts for RL, and the stream of candidates."""

import base64
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from firm.images import decode_image
from firm.records import SPLITS, Split
from firm.shapes import editing, instructions
from firm.shapes.comparison import Picture
from firm.shapes.edit_teacher import Edit
from firm.shapes.instructions import parse
from firm.shapes.scene import Drawn, Thing
from firm.shapes.vision import observe

RED = Drawn(Thing("red", "circle"), 8, 8, 5.2)
BLUE = Drawn(Thing("blue", "square"), 24, 23, 6.5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("make the red circle yellow", {"yellow circle": (8, 8), "blue square": (24, 23)}),
        ("replace the blue square with a green triangle", {"red circle": (8, 8), "green triangle": (24, 23)}),
        ("remove the blue square", {"red circle": (8, 8)}),
        ("move the red circle to the top right", {"red circle": (23.75, 8.25), "blue square": (24, 23)}),
        ("swap the red circle and the blue square", {"red circle": (24, 23), "blue square": (8, 8)}),
        (
            "remove the red circle and then add a green circle at the top left",
            {"blue square": (24, 23), "green circle": (8.25, 8.25)},
        ),
    ],
)
def test_an_instruction_changes_what_it_names(text: str, shown: dict[str, tuple[float, float]]) -> None:
    after = editing.apply(parse(text), [RED, BLUE])
    assert {str(d.thing): (d.x, d.y) for d in after if d is not None} == shown


def test_bigger_and_smaller_are_inverse() -> None:
    (bigger, kept) = editing.apply(parse("make the red circle bigger"), [RED, BLUE])
    assert bigger is not None
    assert bigger.radius > 1.3 * RED.radius
    assert kept == BLUE
    assert editing.apply(parse("make the red circle smaller"), [bigger])[0] == RED


@pytest.mark.parametrize("text", ["remove the green circle", "swap the red circle and the green square"])
def test_an_instruction_about_an_object_that_is_not_there_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"is about a green .*but the source image shows a red circle and a blue sq"):
        editing.apply(parse(text), [RED, BLUE])
    assert not editing.possible(parse(text), [RED, BLUE])


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("move the red circle to the top right", True),
        ("move the red circle to the top left", False),  # it is there
        ("move the red circle to the bottom right", False),  # occupied
        ("swap the red circle and the blue square", True),
        ("make the red circle blue", False),  # two things of one colour
        ("make the blue square bigger", False),  # no room
        ("add a green circle at the bottom left", True),
        ("add a green circle at the bottom right", False),
        ("remove the blue square and then add a green circle at the bottom right", True),
    ],
)
def test_what_makes_sense_for_a_picture(text: str, possible: bool) -> None:
    assert editing.possible(parse(text), [RED, BLUE]) is possible


@pytest.mark.parametrize("split", SPLITS)
def test_a_source_of_every_instruction_shows_what_it_names_and_something_is_left(split: Split) -> None:
    rng = np.random.default_rng(0)
    for text in instructions.instructions(split):
        drawn = editing.compose(text, rng).drawn
        assert 1 <= len(drawn) <= 2
        assert editing.possible(parse(text), drawn)
        assert any(editing.apply(parse(text), drawn))


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_all_instructions_of_the_split_with_readable_sources(split: Split) -> None:
    prompts = editing.prompts(split)
    assert {prompt.text for prompt in prompts} == set(instructions.instructions(split))
    assert len(set(prompts)) == len(prompts) >= 384
    kinds = {text: kind for kind, texts in instructions.by_kind(split).items() for text in texts}
    counts = Counter(kinds[prompt.text] for prompt in prompts)
    assert set(counts.values()) == {len(prompts) // 8}
    assert editing.prompts(split) == prompts
    for prompt in prompts[:: len(prompts) // 50]:
        assert prompt.image is not None
        head, _, data = prompt.image.partition(",")
        assert head == "data:image/png;base64"
        assert editing.possible(parse(prompt.text), Picture.of(decode_image(base64.b64decode(data), prompt.text)).drawn)


def test_a_perfect_edit_changes_only_what_is_asked() -> None:
    before, after = (np.asarray(i) for i in editing.perfect("make the red circle blue", np.random.default_rng(3)))
    (red,) = [s for s in observe(Image.fromarray(before)).seen if s.colour == "red"]
    changed = (before != after).any(-1)
    rows, columns = red.box
    assert changed[rows, columns].any()
    changed[rows.start - 1 : rows.stop + 1, columns.start - 1 : columns.stop + 1] = False
    assert not changed.any()


def test_perfect_edits_repeat_and_are_of_the_split() -> None:
    edits = list(editing.perfect_edits("test", 5, seed=1))
    assert {text for text, _, _ in edits} <= set(instructions.instructions("test"))
    again = editing.perfect_edits("test", 5, seed=1)
    assert [after.tobytes() for _, _, after in edits] == [after.tobytes() for _, _, after in again]


def test_a_candidate_depends_on_seed_split_and_index_only() -> None:
    stream = list(editing.candidates(6, seed=3, split="train"))
    for index in (5, 0, 3):
        text, *images = editing.candidate(index, 3, "train")
        assert text == stream[index][0]
        assert [i.tobytes() for i in images] == [i.tobytes() for i in stream[index][1:]]
    assert len({after.tobytes() for _, _, after in stream}) == 6
    assert editing.candidate(0, 4, "train")[1].tobytes() != stream[0][1].tobytes()
    assert editing.candidate(0, 3, "test")[1].tobytes() != stream[0][1].tobytes()


@pytest.mark.parametrize("split", SPLITS)
def test_candidates_have_every_score_on_both_dimensions_and_both_ways_to_hack(split: Split) -> None:
    triples = list(editing.candidates(700, seed=1, split=split))
    assert {text for text, _, _ in triples} <= set(instructions.instructions(split))
    edits = [Edit.of(text, Picture.of(before), Picture.of(after)) for text, before, after in triples]
    pairs = Counter((edit.execution, edit.consistency) for edit in edits)
    for dimension in (0, 1):
        counts = Counter({score: 0 for score in range(1, 6)})
        for pair, count in pairs.items():
            counts[pair[dimension]] += count
        assert all(count >= 0.035 * len(edits) for count in counts.values()), counts
    assert sum(pairs[1, c] for c in (4, 5)) >= 0.05 * len(edits)  # untouched among them
    assert sum(pairs[5, c] for c in (1, 2)) >= 0.05 * len(edits)  # right, and everything else redrawn
    untouched = [
        e for e in edits if all(f and "kept" in c for f, c in zip(e.seen.found, e.seen.clauses(), strict=False))
    ]
    assert len([e for e in untouched if not e.seen.extra and e.consistency == 5]) >= 0.05 * len(edits)
    redrawn = [e for e in edits if e.execution == 5 and [*e.seen.clauses()][-1] == "background redrawn"]
    assert len(redrawn) >= 0.05 * len(edits)
    scores = np.array([*pairs.elements()]).T
    assert abs(np.corrcoef(scores)[0, 1]) < 0.3  # a critic cannot answer one question with the other's answer
