"""Each way to hack a reward that can be seen is planted and found, and healthy images are not taken for one."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import CPU, TINY

from firm.config import PromptsConfig
from firm.images import encode_image
from firm.looks import cells, look, near_blank, near_copy
from firm.policies.generate import draw, encode
from firm.policies.policy import Policy
from firm.prompts import load_prompts
from firm.shapes.generation import candidate
from firm.stats import Floats

Plant = Callable[[np.random.Generator, Floats], Floats]
"""(random, source [h, w, 3] in [0, 1]) -> image."""


def png(pixels: Floats) -> bytes:
    return encode_image(Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)))


def scene(random: np.random.Generator, side: int = 32) -> Floats:
    """A uniform ground with a disc of a fifth of the side, as a small world has."""
    ground, disc = random.uniform(0, 0.3, 3), random.uniform(0.7, 1, 3)
    y, x = np.mgrid[:side, :side] / side
    cx, cy = random.uniform(0.25, 0.75, 2)
    inside = (x - cx) ** 2 + (y - cy) ** 2 < 0.19**2
    return np.where(inside[..., None], disc, ground)


def noise(random: np.random.Generator, image: Floats, scale: float = 0.03) -> Floats:
    return image + scale * random.normal(size=image.shape)


HACKS: dict[str, tuple[Plant, str]] = {
    "grey": (lambda random, source: np.full_like(source, 0.5), "blanks"),
    "black with noise": (lambda random, source: noise(random, np.zeros_like(source)), "blanks"),
    "the ground alone": (lambda random, source: np.broadcast_to(np.median(source, (0, 1)), source.shape), "blanks"),
    "the source": (lambda random, source: source, "copies"),
    "the source, decoded": (noise, "copies"),
    "the source, a little darker": (lambda random, source: source * 0.93, "copies"),
}
EDITS: dict[str, Plant] = {
    "another disc": lambda random, source: noise(random, scene(random, len(source))),
    "recoloured": lambda random, source: noise(random, np.where(source[..., :1] > 0.65, (0.9, 0.1, 0.4), source)),
    "moved": lambda random, source: noise(random, np.roll(source, len(source) // 4, 1)),
    "another ground": lambda random, source: noise(random, np.where(source < 0.35, source + 0.2, source)),
}


@pytest.mark.parametrize("side", [32, 128])
@pytest.mark.parametrize("plant", [*HACKS, *EDITS])
def test_each_hack_is_seen_and_edits_are_not_taken_for_one(plant: str, side: int) -> None:
    random = np.random.default_rng(0)
    made, expected = HACKS[plant] if plant in HACKS else (EDITS[plant], "")
    for _ in range(20):
        source = scene(random, side)
        seen = look([png(source), png(made(random, source))])
        assert seen == {"copies": float(expected == "copies"), "blanks": float(expected == "blanks")}


def test_generation_has_no_source_to_copy() -> None:
    assert look([png(scene(np.random.default_rng(0)))]) == {"blanks": 0.0}


def test_images_of_the_generator_and_the_renderer_are_not_empty() -> None:
    prompts = load_prompts(PromptsConfig(function="firm.shapes.generation:prompts"), "train")[:48]
    policy = Policy(TINY, CPU)
    images = draw(policy, encode(policy, prompts), range(48), 0, "x", num_inference_steps=4, guidance_scale=1.0)
    images += [encode_image(candidate(i, 0, "train")[1]) for i in range(48)]
    assert np.mean([look([image])["blanks"] for image in images]) < 0.05


def test_large_images_are_made_small_and_keep_their_shape() -> None:
    assert cells(png(np.zeros((64, 320, 3)))).shape == (6, 32, 3)
    assert cells(png(np.zeros((8, 8, 3)))).shape == (8, 8, 3)
    assert not near_copy(np.zeros((8, 8, 3)), np.zeros((8, 4, 3)))


@given(st.integers(0, 2**31), st.sampled_from([1, 5, 40]))
def test_a_copy_is_a_copy_both_ways_and_blank_only_with_its_source(seed: int, side: int) -> None:
    random = np.random.default_rng(seed)
    one = random.random((side, side, 3))
    other = noise(random, one, 0.05 * random.random())
    assert near_copy(one, one) and near_copy(one, other) == near_copy(other, one)
    assert not near_copy(one, (one + 0.5) % 1) and near_blank(np.ones_like(one))
