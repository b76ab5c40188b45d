"""Editing: instructions read and written, and the teacher's scores of edits of any kind."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from firm.records import SPLITS
from firm.shapes import editing, instructions, models
from firm.shapes.comparison import Picture
from firm.shapes.edit_teacher import Edit, consistency, execution
from firm.shapes.instructions import KINDS, parse, singles
from firm.shapes.scene import COLOURS, SIZE, Scene, render
from firm.shapes.vision import observe

STEPS = st.sampled_from(KINDS).flatmap(lambda kind: st.sampled_from(singles(kind)))
TEXTS = st.sampled_from([text for split in SPLITS for text in instructions.instructions(split)])
SEEDS = st.integers(0, 2**32)
EDGES = st.tuples(*[st.integers(0, SIZE)] * 2).map(sorted) | st.integers(0, 3).map(
    lambda margin: [margin, SIZE - margin]
)
TOKENIZER = models.critic_tokenizer()


@given(STEPS, STEPS)
def test_what_is_written_is_read_again(first: instructions.Step, second: instructions.Step) -> None:
    assert parse(str(first)) == (first,)
    if not set(first.named) & set(second.named):
        assert parse(f"{first} and then {second}") == (first, second)


@settings(max_examples=60, deadline=None)
@given(TEXTS, SEEDS)
def test_a_composed_source_fits_its_instruction_and_its_perfect_edit_gets_full_marks(text: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = editing.perfect(text, rng)
    assert (execution(text, before, after), consistency(text, before, after)) == (5, 5)
    assert (execution(text, before, before), consistency(text, before, before)) == (1, 5)


@settings(max_examples=60, deadline=None)
@given(TEXTS, SEEDS, st.sampled_from(["background", "everything"]))
def test_another_background_costs_consistency(text: str, seed: int, damage: editing.Damage) -> None:
    before = editing.compose(text, np.random.default_rng(seed))
    perfect, damaged = (
        editing.edit(parse(text), before, "none", kind, np.random.default_rng(seed)) for kind in ("none", damage)
    )
    source, good, bad = (
        Image.fromarray(render(scene, np.random.default_rng(seed))) for scene in (before, perfect, damaged)
    )
    assume(legible(source, before) and legible(good, perfect))  # the world leaves out what is not
    assert consistency(text, source, good) == 5
    clearly = abs(damaged.background - before.background) >= 0.2  # a stain makes up for a part of less
    assert consistency(text, source, bad) <= (3 if clearly else 4)


def legible(picture: Image.Image, scene: Scene) -> bool:
    """Whether the teacher sees what was drawn: some small circles are square by the pixel."""
    return {seen.thing for seen in observe(picture).seen} == {drawn.thing for drawn in scene.drawn}


def blocks(seed: int) -> np.ndarray:
    """A picture of blocks in four colours: more objects than arrays of hypothesis have, as it likes constant ones."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (4, 3), np.uint8)[rng.integers(0, 4, (8, 8))].repeat(4, 0).repeat(4, 1)


@st.composite
def painted(draw: st.DrawFn) -> np.ndarray:
    """A source with rectangles in palette colours on it, of which one may leave but strips of the background."""
    rng = np.random.default_rng(draw(SEEDS))
    pixels = render(editing.compose(draw(TEXTS), rng), rng)
    for colour in draw(st.lists(st.sampled_from([*COLOURS.values()]), max_size=3)):
        (top, bottom), (left, right) = draw(EDGES), draw(EDGES)
        pixels[top:bottom, left:right] = np.array(colour) * 255
    return pixels


any_picture = pytest.mark.parametrize(
    "pictures", [painted(), SEEDS.map(blocks), arrays(np.uint8, (SIZE, SIZE, 3))], ids=["painted", "blocks", "array"]
)


@any_picture
@settings(max_examples=100, deadline=None)
@given(st.data(), TEXTS, SEEDS)
def test_any_picture_gets_scores_in_range_and_evidence_of_known_words(
    pictures: st.SearchStrategy[np.ndarray], data: st.DataObject, text: str, seed: int
) -> None:
    source = Picture.of(editing.perfect(text, np.random.default_rng(seed))[0])
    edit = Edit.of(text, source, Picture.of(Image.fromarray(data.draw(pictures))))
    assert edit.execution in range(1, 6)
    assert edit.consistency in range(1, 6)
    assert TOKENIZER.tokenize(edit.evidence()) == edit.evidence().split()


@any_picture
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_picture_left_untouched_is_consistent_and_not_executed_where_the_instruction_makes_sense(
    pictures: st.SearchStrategy[np.ndarray], data: st.DataObject
) -> None:
    source = Picture.of(Image.fromarray(data.draw(pictures)))
    things = {drawn.thing for drawn in source.drawn}
    fitting = [step for kind in KINDS for step in singles(kind) if things.issuperset(step.named)]
    steps = data.draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=2))
    named = [thing for step in steps for thing in step.named]
    assume(len(set(named)) == len(named))
    untouched = Edit.of(" and then ".join(map(str, steps)), source, source)
    assert untouched.consistency == 5
    if editing.possible(steps, source.drawn):
        assert untouched.execution == 1
