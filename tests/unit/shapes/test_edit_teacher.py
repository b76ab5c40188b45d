"""How the teacher judges edits, and what it answers about two images."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from firm.chat.messages import user_message
from firm.images import encode_image
from firm.records import SPLITS
from firm.shapes import editing, instructions, models
from firm.shapes.comparison import Picture
from firm.shapes.edit_teacher import Edit, consistency, execution
from firm.shapes.instructions import KINDS, parse
from firm.shapes.scene import COLOURS, SIZE, Drawn, Scene, Thing, render
from firm.shapes.teacher import PixelTeacher

RED = Drawn(Thing("red", "circle"), 8, 8, 6.2)
BLUE = Drawn(Thing("blue", "square"), 23.5, 23.5, 6.2)
GRAY = Scene((RED, BLUE), noise=0.01)


def draw(*drawn: Drawn, **scene: float) -> Image.Image:
    return Image.fromarray(render(replace(GRAY, drawn=drawn, **scene), np.random.default_rng(len(drawn))))


SOURCE = draw(RED, BLUE)


def as_(drawn: Drawn, thing: str, **changes: float) -> Drawn:
    return replace(drawn, thing=Thing(*thing.split()), **changes)


def planted(fault: editing.Fault, damage: editing.Damage, kinds: tuple[str, ...], count: int = 40) -> list[Edit]:
    """Edits with this flaw, clean otherwise, of instructions of these kinds."""
    rng = np.random.default_rng(7)
    texts = [text for split in SPLITS for kind in kinds for text in instructions.by_kind(split)[kind]]
    found = []
    for text in rng.choice(texts, count):
        before = editing.compose(str(text), rng)
        after = editing.edit(parse(str(text)), before, fault, damage, rng)
        pictures = [Picture.of(Image.fromarray(render(scene, rng))) for scene in (before, after)]
        found.append(Edit.of(str(text), *pictures))
    return found


def share(edits: list[Edit], execution: tuple[int, ...], consistency: tuple[int, ...] = (1, 2, 3, 4, 5)) -> float:
    return sum(e.execution in execution and e.consistency in consistency for e in edits) / len(edits)


def test_perfect_edits_of_every_instruction_score_five_and_untouched_ones_one_and_five() -> None:
    rng = np.random.default_rng(5)
    for text in (text for split in SPLITS for text in instructions.instructions(split)):
        before, after = (Picture.of(image) for image in editing.perfect(text, rng))
        done = Edit.of(text, before, after)
        assert (done.execution, done.consistency) == (5, 5), (text, done.evidence())
        untouched = Edit.of(text, before, before)
        assert (untouched.execution, untouched.consistency) == (1, 5), (text, untouched.evidence())


ALL = (*KINDS, "compound")
CHANGING = tuple(kind for kind in ALL if kind != "remove")


@pytest.mark.parametrize(
    ("fault", "kinds", "scores", "least"),
    [
        ("none", ALL, (5,), 1.0),
        ("sloppy", ALL, (3, 4, 5), 0.9),
        ("half", ("compound",), (2, 3, 4), 0.95),
        ("half", ALL, (2, 3, 4), 0.85),
        ("wrong object", ("recolor", "replace", "move", "resize"), (1, 2), 0.85),
        ("contrary", ("recolor", "move", "resize", "remove"), (1, 2), 0.9),
        ("contrary", ("add",), (1, 2, 3), 1.0),  # the right thing in another corner
        ("untouched", ALL, (1,), 1.0),
        ("erased", CHANGING, (1,), 0.95),
        ("blank", ALL, (1,), 1.0),
    ],
)
def test_execution_of_planted_faults(
    fault: editing.Fault, kinds: tuple[str, ...], scores: tuple[int, ...], least: float
) -> None:
    edits = planted(fault, "none", kinds)
    assert share(edits, scores) >= least, [(e.evidence(), e.execution) for e in edits if e.execution not in scores]


@pytest.mark.parametrize(
    ("damage", "scores"), [("none", (5,)), ("collateral", (3, 4)), ("background", (2, 3)), ("everything", (1, 2, 3))]
)
def test_consistency_of_planted_damage_to_right_edits(damage: editing.Damage, scores: tuple[int, ...]) -> None:
    kinds = ("recolor", "replace", "resize", "add")  # whose collateral damage leaves the edit as it was
    edits = [e for e in planted("none", damage, kinds) if len(e.seen.before.observation.seen) == 2 or damage == "none"]
    assert share(edits, (5,), scores) >= 0.9, [(e.evidence(), e.execution, e.consistency) for e in edits]


@pytest.mark.parametrize(
    ("text", "after", "scores"),
    [
        ("make the red circle yellow", [as_(RED, "yellow circle"), BLUE], (5, 5)),
        ("make the red circle yellow", [as_(RED, "green circle"), BLUE], (2, 5)),
        ("make the red circle yellow", [as_(RED, "yellow triangle"), BLUE], (3, 4)),
        ("make the red circle yellow", [RED, as_(BLUE, "yellow square")], (1, 4)),
        ("make the red circle yellow", [as_(RED, "yellow circle"), as_(BLUE, "green triangle")], (5, 3)),
        ("make the red circle yellow", [as_(RED, "yellow circle")], (5, 3)),
        ("replace the red circle with a green triangle", [as_(RED, "green triangle", radius=5), BLUE], (5, 5)),
        ("replace the red circle with a green triangle", [as_(RED, "green circle"), BLUE], (3, 5)),
        ("replace the red circle with a green triangle", [BLUE], (1, 5)),
        ("remove the red circle", [BLUE], (5, 5)),
        ("remove the red circle", [RED], (1, 3)),
        ("remove the red circle", [], (1, 3)),  # erased: not executed
        ("remove the red circle", [as_(BLUE, "green triangle")], (5, 3)),
        ("remove the red circle", [replace(RED, radius=4.5), BLUE], (3, 5)),
        ("move the red circle to the top right", [replace(RED, x=23.75), BLUE], (5, 5)),
        ("move the red circle to the top right", [replace(RED, x=15), BLUE], (3, 5)),
        ("move the red circle to the top right", [RED, replace(RED, x=23.75), BLUE], (3, 4)),  # copied
        ("make the blue square smaller", [RED, replace(BLUE, radius=4.5)], (5, 5)),
        ("make the blue square smaller", [replace(RED, radius=4.5), BLUE], (1, 4)),
        ("add a green triangle at the top right", [RED, BLUE, as_(RED, "green triangle", x=23.75)], (5, 5)),
        ("add a green triangle at the top right", [RED, BLUE, as_(RED, "green triangle", y=23.75)], (3, 5)),
        ("swap the red circle and the blue square", [replace(RED, x=23.5, y=23.5), replace(BLUE, x=8, y=8)], (5, 5)),
        ("swap the red circle and the blue square", [as_(RED, "blue circle"), as_(BLUE, "red square")], (3, 3)),
        ("remove the red circle and then make the blue square green", [RED, as_(BLUE, "green square")], (3, 5)),
    ],
)
def test_what_is_done_and_what_is_kept_is_scored_apart(text: str, after: list[Drawn], scores: tuple[int, int]) -> None:
    image = draw(*after)
    assert (execution(text, SOURCE, image), consistency(text, SOURCE, image)) == scores


ADDED = as_(BLUE, "green triangle", x=23.75, y=23.75)
NEAR = replace(BLUE, x=20, y=20)  # what is added covers a part of it
BEHIND = replace(BLUE, radius=4)  # and all of this


@pytest.mark.parametrize(
    ("text", "other", "after", "scores"),
    [
        ("add a green triangle at the bottom right", BLUE, [RED, BLUE, ADDED], (5, 5)),
        ("add a green triangle at the bottom right", BLUE, [RED, BLUE, replace(ADDED, radius=4)], (5, 5)),
        ("add a green triangle at the bottom right", NEAR, [RED, NEAR, ADDED], (5, 5)),
        ("add a green triangle at the bottom right", BEHIND, [RED, replace(ADDED, radius=7.5)], (5, 5)),
        ("add a green triangle at the bottom right", NEAR, [RED, ADDED], (5, 3)),
        ("add a green triangle at the bottom right", NEAR, [RED, replace(NEAR, radius=4.5), ADDED], (5, 4)),
        ("add a green triangle at the bottom right", NEAR, [RED, as_(NEAR, "yellow square"), ADDED], (5, 4)),
        ("make the red circle yellow", NEAR, [as_(RED, "yellow circle"), NEAR, ADDED], (5, 4)),  # nobody asked for it
        ("add a green triangle at the bottom left", BLUE, [RED, BLUE, replace(ADDED, radius=4)], (3, 4)),  # nor there
        ("make the red circle yellow", BLUE, [as_(RED, "yellow circle"), BLUE, ADDED], (5, 2)),
        ("make the red circle yellow", BLUE, [as_(RED, "yellow circle"), replace(BLUE, radius=5)], (5, 4)),
        ("move the red circle to the bottom right", NEAR, [NEAR, replace(RED, x=24, y=24)], (5, 5)),
        ("swap the red circle and the blue square", BLUE, [replace(RED, x=23.5, y=23.5)], (3, 3)),
    ],
)
def test_what_is_missing_behind_what_was_asked_for_does_not_count(
    text: str, other: Drawn, after: list[Drawn], scores: tuple[int, int]
) -> None:
    source, image = draw(RED, other), draw(*after)
    assert (execution(text, source, image), consistency(text, source, image)) == scores


@pytest.mark.parametrize("background", [0.2, 0.75])
def test_the_perfect_edit_on_a_redrawn_background_is_executed_and_not_consistent(background: float) -> None:
    image = draw(as_(RED, "yellow circle"), BLUE, background=background)
    assert execution("make the red circle yellow", SOURCE, image) == 5
    assert consistency("make the red circle yellow", SOURCE, image) == 2


def test_slight_variations_of_quality_do_not_count() -> None:
    image = draw(as_(RED, "yellow circle"), BLUE, background=0.515, noise=0.03, blur=0.5)
    assert (execution("make the red circle yellow", SOURCE, image)) == 5
    assert (consistency("make the red circle yellow", SOURCE, image)) == 5


def test_consistency_falls_by_degrees_with_the_background() -> None:
    scores = [consistency("remove the red circle", SOURCE, draw(BLUE, background=0.5 + d)) for d in np.linspace(0, 0.3)]
    assert scores == sorted(scores, reverse=True)
    assert set(scores) == {5, 4, 3, 2}


def test_backgrounds_that_have_no_place_in_common_are_compared() -> None:
    """Every corner is an object's, in the one picture or in the other."""
    left, right = (
        (replace(RED, x=x, y=8.25, radius=6.8), replace(BLUE, x=x, y=23.75, radius=6.8)) for x in (8.25, 23.75)
    )
    text = "move the red circle to the top right and then move the blue square to the bottom right"
    for changed, score in ((0.0, 5), (0.1, 4), (0.25, 2)):
        edit = Edit.of(text, Picture.of(draw(*left)), Picture.of(draw(*right, background=0.5 + changed)))
        assert edit.execution == 5
        assert edit.consistency == score, (changed, edit.evidence())


def test_strips_of_background_are_enough_to_compare() -> None:
    """Two columns are left of it, at the edges of the picture."""
    pixels = np.asarray(draw(replace(RED, x=16, y=16))).copy()
    source = Image.fromarray(pixels)
    pixels[:, 3:29] = np.array(COLOURS["yellow"]) * 255
    assert consistency("make the red circle yellow", source, Image.fromarray(pixels)) == 4  # it is no circle


def test_a_source_without_a_background_has_none_to_lose() -> None:
    full = draw(replace(RED, x=16, y=16, radius=15.5))
    assert (
        execution("make the red circle yellow", full, full),
        consistency("make the red circle yellow", full, full),
    ) == (1, 5)


@pytest.mark.parametrize("text", ["remove the red circle", "make the red circle yellow", "make the red circle bigger"])
@pytest.mark.parametrize("picture", ["gray", "black", "yellow", "noise"])
def test_a_picture_of_nothing_is_not_an_edit(text: str, picture: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    if picture != "noise":
        pixels[:] = {"gray": 128, "black": 0, "yellow": (237, 214, 38)}[picture]
    image = Image.fromarray(pixels.astype(np.uint8))
    assert execution(text, SOURCE, image) == 1
    assert consistency(text, SOURCE, image) <= 3


@pytest.mark.parametrize("text", ["replace the red circle with a yellow square", "make the red circle yellow"])
def test_a_picture_painted_over_with_the_right_colour_is_not_an_edit(text: str) -> None:
    painted = Image.new("RGB", (SIZE, SIZE), (237, 214, 38))
    assert execution(text, draw(RED), painted) == 1
    assert consistency(text, draw(RED), painted) <= 2


def test_what_is_left_in_its_place_counts_against_a_removal() -> None:
    pixels = np.asarray(draw(BLUE)).copy()
    pixels[4:12, 4:12] = 200  # a gray smear, which is no object
    assert execution("remove the red circle", SOURCE, Image.fromarray(pixels)) <= 3


def test_bad_input_is_said_clearly() -> None:
    with pytest.raises(ValueError, match=r"is about a green circle, but the source image shows a red circle and"):
        execution("remove the green circle", SOURCE, SOURCE)
    with pytest.raises(ValueError, match=r"the same size, not 32 x 32 and 64 x 32 pixels"):
        consistency("remove the red circle", SOURCE, SOURCE.resize((64, 32)))
    with pytest.raises(ValueError, match="does not know the instruction"):
        execution("remove the cat", SOURCE, SOURCE)


def test_large_pictures_are_judged_alike() -> None:
    pair = [image.resize((256, 256), Image.Resampling.NEAREST).convert("RGBA") for image in (SOURCE, draw(BLUE))]
    assert (execution("remove the red circle", *pair), consistency("remove the red circle", *pair)) == (5, 5)


def test_the_evidence_says_what_became_of_everything_in_words_of_the_tokenizer() -> None:
    edited = [as_(RED, "yellow circle"), replace(BLUE, x=8.5), as_(RED, "green triangle", x=23.5)]
    edit = Edit.of("make the red circle yellow", Picture.of(SOURCE), Picture.of(draw(*edited, background=0.8)))
    assert edit.evidence() == (
        "red circle recolored yellow ; blue square moved bottom left ; green triangle added top right ; "
        "background redrawn"
    )
    tokenizer = models.critic_tokenizer()
    for text, before, after in editing.candidates(200, 2, "train"):
        evidence = Edit.of(text, Picture.of(before), Picture.of(after)).evidence()
        assert tokenizer.tokenize(evidence) == evidence.split()
        assert "<unk>" not in evidence


# ---- the chat


def ask(text: str, *images: Image.Image, instruction: str | None = "make the red circle yellow", seed: int = 0) -> str:
    if instruction is not None:
        text += f"\n<START OF INSTRUCTION>\n{instruction}\n<END OF INSTRUCTION>\n"
    message = user_message(text, [encode_image(image) for image in images])
    return PixelTeacher().complete([message], seed=seed)


EDITED = draw(as_(RED, "yellow circle"), as_(BLUE, "blue square", x=8.5))


@pytest.mark.parametrize(("question", "score"), [("Give the Execution Score.", 5), ("Give the consistency score.", 4)])
def test_scores_are_json_with_the_evidence(question: str, score: int) -> None:
    report = "\n<START OF DIFFERENCE REPORT>\nobvious differences, detailed differences\n<END OF DIFFERENCE REPORT>"
    answer = json.loads(ask(question + report, SOURCE, EDITED))
    evidence = "red circle recolored yellow ; blue square moved bottom left ; background unchanged"
    assert answer == {"reasoning": evidence, "score": [score]}


def test_the_obvious_differences_describe_what_changed_without_comparing() -> None:
    question = "Report the obvious differences."
    assert ask(question, SOURCE, draw(as_(RED, "yellow circle"), BLUE), instruction=None) == (
        "- image 1 : red clear circle top left ; image 2 : yellow clear circle top left"
    )
    assert ask(question, SOURCE, draw(BLUE), instruction=None) == (
        "- image 1 : red clear circle top left ; image 2 : nothing"
    )
    assert ask(question, SOURCE, SOURCE, instruction=None) == "- Nothing has changed."


def test_the_detailed_differences_compare_everything() -> None:
    green = as_(RED, "green triangle", x=23.5)
    answer = ask("Report the detailed differences.", SOURCE, draw(as_(RED, "yellow circle"), green), instruction=None)
    assert answer.splitlines() == [
        "- objects : 2 in image 1 , 2 in image 2",
        "- red circle : colour red to yellow , shape same , position same , size same",
        "- blue square : only in image 1 , bottom right",
        "- green triangle : only in image 2 , top right",
        "- background unchanged",
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_a_rewritten_instruction_is_possible_and_missed_and_of_the_same_split(split: str) -> None:
    for seed, (text, before, after) in enumerate(editing.candidates(25, 4, split)):  # type: ignore[arg-type]
        answer = ask("Rewrite the instruction so that it is missed.", before, after, instruction=text, seed=seed)
        rewritten = json.loads(answer)["instruction"]
        assert rewritten != text or execution(text, before, after) <= 2
        assert rewritten in instructions.instructions(split)  # type: ignore[arg-type]
        assert editing.possible(parse(rewritten), Picture.of(before).drawn)
        assert execution(rewritten, before, after) <= 2


def test_another_seed_rewrites_differently() -> None:
    answers = {ask("Rewrite the instruction.", SOURCE, EDITED, seed=seed) for seed in range(5)}
    assert len(answers) > 2
    assert ask("Rewrite the instruction.", SOURCE, EDITED, seed=3) in answers


@pytest.mark.parametrize(
    ("text", "images", "instruction", "complaint"),
    [
        ("Give the execution score.", 1, "remove the red circle", "not 1 image"),
        ("Give the execution score.", 0, "remove the red circle", "not 0 image"),
        ("Give the execution score.", 3, "remove the red circle", "not 3"),
        ("Give the execution score.", 2, None, "START OF INSTRUCTION"),
        ("Give the execution score.", 2, "remove the cat", "does not know the instruction"),
        ("Give the execution score.", 2, "remove the green circle", "is about a green circle"),
        ("Rate it.", 2, "remove the red circle", "of two it must be asked for obvious differences"),
    ],
)
def test_what_cannot_be_answered_is_said_clearly(
    text: str, images: int, instruction: str | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ask(text, *[SOURCE] * images, instruction=instruction)
