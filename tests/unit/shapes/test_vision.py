"""What is seen in a picture, and how it is described."""

import time

import numpy as np
from PIL import Image

from firm.shapes import generation, scene, vision


def draw(drawing: scene.Scene) -> Image.Image:
    return Image.fromarray(scene.render(drawing, np.random.default_rng(0)))


def test_the_caption_says_in_scan_order_what_is_where() -> None:
    things = [scene.Thing("blue", "square"), scene.Thing("red", "circle"), scene.Thing("green", "triangle")]
    places = [(24, 24), (8, 8), (24, 8)]
    drawn = tuple(scene.Drawn(t, x, y, 6.5) for t, (x, y) in zip(things, places, strict=True))
    expected = "red clear circle top left ; green clear triangle top right ; blue clear square bottom right"
    assert vision.caption(vision.observe(draw(scene.Scene(drawn)))) == expected


def test_a_larger_picture_in_another_mode_reads_the_same() -> None:
    image = draw(generation.compose("a red circle left of a blue square", np.random.default_rng(0)))
    large = image.convert("RGBA").resize((256, 256), Image.Resampling.NEAREST)
    assert vision.caption(vision.observe(large)) == vision.caption(vision.observe(image))


def test_looking_at_a_picture_takes_about_a_millisecond() -> None:
    images = [image for _, image in generation.candidates(100, seed=0, split="train")]
    start = time.perf_counter()
    for image in images:
        vision.observe(image)
    assert (time.perf_counter() - start) / len(images) < 0.005  # measured 0.6 ms; a shared machine is slower
