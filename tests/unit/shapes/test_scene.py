"""Scenes and their renderer."""

from dataclasses import fields
from itertools import combinations

import numpy as np

from firm.shapes import scene

PAIR = scene.Scene(
    (
        scene.Drawn(scene.Thing("red", "circle"), 8, 16, 6.5),
        scene.Drawn(scene.Thing("blue", "square"), 24, 16, 6.5, towards="triangle", blend=0.3, wobble=0.5),
    ),
    stain=0.1,
    blur=0.6,
)


def test_render_is_a_small_rgb_picture_and_repeats() -> None:
    def draw() -> np.ndarray:
        return scene.render(PAIR, np.random.default_rng(0))

    image = draw()
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    np.testing.assert_array_equal(image, draw())


def test_random_places_are_apart_and_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = scene.random_places(3, rng)
        assert all(7 < position < scene.SIZE - 7 for place in places for position in place)
        assert all(np.hypot(a[0] - b[0], a[1] - b[1]) >= 15 for a, b in combinations(places, 2))


def test_degrading_adds_one_flaw_and_keeps_the_shapes() -> None:
    rng = np.random.default_rng(0)
    flaws = set()
    for _ in range(30):
        worse = scene.degrade(PAIR, rng)
        changed = [f.name for f in fields(worse) if getattr(worse, f.name) != getattr(PAIR, f.name)]
        assert len(changed) == 1
        flaws.update(changed)
    assert flaws == {"noise", "stain", "blur"}
