"""The teacher: how it scores, and how it answers messages."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from firm.shapes import generation, scene, teacher, vision
from firm.shapes.teacher import PixelTeacher

PROMPTS = generation.prompts("train") + generation.prompts("test")
PAIR = "a red circle left of a blue square"


def draw(drawing: scene.Scene, seed: int = 0) -> Image.Image:
    return Image.fromarray(scene.render(drawing, np.random.default_rng(seed)))


def scene_of(prompt: str, seed: int = 0) -> scene.Scene:
    return generation.compose(prompt, np.random.default_rng(seed))


def ask(text: str, *images: Image.Image) -> list[dict]:
    parts: list[dict] = [{"type": "text", "text": text}]
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def about(prompt: str, plan: str = "") -> str:
    text = f"Rate it.\n<START OF PROMPT>\n{prompt}\n<END OF PROMPT>\n"
    return text + (f"<START OF PLAN>\n{plan}\n<END OF PLAN>\n" if plan else "")


def test_clean_renders_of_every_prompt_get_full_marks() -> None:
    scores = [teacher.instruction_following(p, draw(scene_of(p, s), s)) for p in PROMPTS for s in range(3)]
    assert scores.count(5) >= 0.98 * len(scores)
    qualities = [teacher.quality(draw(scene_of(p), 1)) for p in PROMPTS]
    assert qualities.count((5, 5, 5)) >= 0.98 * len(qualities)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PROMPTS), st.integers(0, 2**32), st.sampled_from(["drop", "colour", "deform", "noise", "blur"]))
def test_a_perturbed_scene_never_scores_above_the_clean_one(prompt: str, seed: int, kind: str) -> None:
    clean = scene_of(prompt, seed)
    first, *rest = clean.drawn
    rng = np.random.default_rng(seed)
    other = next(c for c in scene.COLOURS if c not in {d.thing.colour for d in clean.drawn})
    worse = {
        "drop": replace(clean, drawn=tuple(rest)),
        "colour": replace(clean, drawn=(replace(first, thing=replace(first.thing, colour=other)), *rest)),
        "deform": replace(clean, drawn=(scene.deform(first, rng), *rest)),
        "noise": replace(clean, noise=0.15),
        "blur": replace(clean, blur=2.0),
    }[kind]
    good, bad = (teacher.instruction_following(prompt, draw(s, seed)) for s in (clean, worse))
    assert bad <= good
    if kind in ("drop", "colour"):
        assert bad < good
    assert min(teacher.quality(draw(worse, seed))) <= min(teacher.quality(draw(clean, seed)))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 80), st.integers(1, 80), st.just(3))) | st.none(),
    st.integers(0, 2**32),
    st.sampled_from(PROMPTS),
)
def test_any_image_gets_scores_in_range_and_a_caption_of_known_words(
    pixels: np.ndarray | None, seed: int, prompt: str
) -> None:
    if pixels is None:  # hypothesis likes constant arrays; noise in palette colours makes most objects
        palette = (np.array(list(scene.COLOURS.values())) * 255).astype(np.uint8)
        coarse = np.random.default_rng(seed).integers(0, 4, (8, 8))
        pixels = palette[coarse].repeat(4, 0).repeat(4, 1)
    image = Image.fromarray(pixels)
    assert teacher.instruction_following(prompt, image) in range(1, 6)
    assert all(score in range(1, 6) for score in teacher.quality(image))
    assert set(vision.caption(vision.observe(image)).split()) <= set(vision.VOCABULARY)


@pytest.mark.parametrize("pixels", [np.full((32, 32, 3), 128), np.random.default_rng(0).integers(0, 256, (32, 32, 3))])
def test_empty_and_noisy_pictures_are_of_low_quality(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels.astype(np.uint8))
    assert max(teacher.quality(image)) <= 2
    assert vision.caption(vision.observe(image)) == "nothing"
    assert teacher.instruction_following("a red circle", image) == 1


def test_a_wrong_relation_and_an_extra_object_cost_a_mark() -> None:
    red = scene.Thing("red", "circle")
    blue = scene.Thing("blue", "square")
    swapped = draw(scene.Scene((scene.Drawn(blue, 8, 16, 6.5), scene.Drawn(red, 24, 16, 6.5))))
    assert teacher.instruction_following("a red circle and a blue square", swapped) == 5
    assert teacher.instruction_following("a blue square and a red circle", swapped) == 5
    assert teacher.instruction_following(PAIR, swapped) == 4
    assert teacher.instruction_following("a red circle", swapped) == 4
    assert teacher.instruction_following("a green triangle", swapped) == 1


def test_a_request_without_an_image_gets_a_markdown_plan() -> None:
    answer = PixelTeacher().complete(ask(about(PAIR)))
    assert [line for line in answer.splitlines() if line.startswith("#")] == [
        "## Main subject",
        "## Attribute",
        "## Composition",
    ]
    assert [line[2:] for line in answer.splitlines() if line.startswith("- ")] == teacher.plan(PAIR)


@pytest.mark.parametrize("with_plan", [True, False])
def test_an_evaluation_answers_every_question_and_ends_in_a_boxed_score(with_plan: bool) -> None:
    image = draw(scene_of(PAIR))
    plan = PixelTeacher().complete([{"role": "user", "content": about(PAIR)}]) if with_plan else ""
    answer = PixelTeacher().complete(ask(about(PAIR, plan), image), temperature=0.7, seed=1)
    *analysis, final, _, rating, boxed = (line for line in answer.splitlines())
    assert analysis[0].startswith("1. Is there a red circle? Yes, red clear circle ")
    assert len([line for line in analysis if line]) == len(teacher.plan(PAIR))
    assert final == f"Final Analysis: {vision.caption(vision.observe(image))}"
    assert (rating, boxed) == ("Final Alignment Rating: 5", "\\boxed{5}")


def test_a_missing_object_is_answered_with_no() -> None:
    answer = PixelTeacher().complete(ask(about(PAIR), draw(scene_of("a blue square"))))
    assert "1. Is there a red circle? No, there is none." in answer
    assert "Is there a blue square? Yes" in answer
    assert f"\\boxed{{{teacher.instruction_following(PAIR, draw(scene_of('a blue square')))}}}" in answer


def test_a_quality_request_is_answered_in_json_without_the_prompt() -> None:
    image = draw(replace(scene_of(PAIR), noise=0.1))
    answer = json.loads(PixelTeacher().complete(ask("Judge aesthetics, Technical Quality and structure.", image)))
    assert answer == {
        "reasoning": vision.caption(vision.observe(image)),
        "score": list(teacher.quality(image)),
    }


IMAGE = draw(scene_of(PAIR))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (ask("no markers", IMAGE), "START OF PROMPT"),
        (ask(about("a cat on a mat"), IMAGE), "does not know the prompt"),
        (ask(about(PAIR), IMAGE, IMAGE), "one image"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "content part"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}], "data URL"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
            "cannot be decoded",
        ),
        ("hello", "messages must be"),
    ],
)
def test_what_cannot_be_answered_is_said_clearly(messages: list[dict], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PixelTeacher().complete(messages)
