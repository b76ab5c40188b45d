"""Editing: instructions read and written, and the teacher's scores of edits of any kind."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from firm.records import SPLITS
from firm.shapes import editing, instructions, models
from firm.shapes.comparison import Picture
from firm.shapes.edit_teacher import Edit, consistency, execution
from firm.shapes.instructions import KINDS, parse, singles
from firm.shapes.scene import render

STEPS = st.sampled_from(KINDS).flatmap(lambda kind: st.sampled_from(singles(kind)))
TEXTS = st.sampled_from([text for split in SPLITS for text in instructions.instructions(split)])
SEEDS = st.integers(0, 2**32)
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
@given(TEXTS, SEEDS, st.sampled_from(["collateral", "background", "everything"]))
def test_damage_never_raises_consistency(text: str, seed: int, damage: editing.Damage) -> None:
    before = editing.compose(text, np.random.default_rng(seed))
    scores = []
    for kind in ("none", damage):
        rng = np.random.default_rng(seed)
        after = editing.edit(parse(text), before, "none", kind, rng)
        scores.append(consistency(text, *(Image.fromarray(render(scene, rng)) for scene in (before, after))))
    assert scores[0] == 5
    assert scores[1] <= scores[0]
    if damage != "collateral":
        assert scores[1] <= 3


@settings(max_examples=60, deadline=None)
@given(TEXTS, SEEDS, arrays(np.uint8, (32, 32, 3)) | st.none())
def test_any_picture_gets_scores_in_range_and_evidence_of_known_words(
    text: str, seed: int, pixels: np.ndarray | None
) -> None:
    rng = np.random.default_rng(seed)
    if pixels is None:  # hypothesis likes constant arrays; noise in palette colours makes most objects
        pixels = rng.integers(0, 256, (4, 3), np.uint8)[rng.integers(0, 4, (8, 8))].repeat(4, 0).repeat(4, 1)
    edit = Edit.of(text, Picture.of(editing.perfect(text, rng)[0]), Picture.of(Image.fromarray(pixels)))
    assert edit.execution in range(1, 6)
    assert edit.consistency in range(1, 6)
    assert TOKENIZER.tokenize(edit.evidence()) == edit.evidence().split()
