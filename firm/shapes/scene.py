"""Scenes of coloured shapes and the renderer that draws them; knows no task."""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import ndimage

SIZE = 32  # pixels a side
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.15, 0.68, 0.20),
    "blue": (0.17, 0.28, 0.86),
    "yellow": (0.93, 0.84, 0.15),
}
SHAPES = ("circle", "square", "triangle")

_MARGIN = 7.5  # pixels from a centre to the border: every outline fits into the picture
_GAP = 15.0  # pixels between two centres: outlines never touch
_GRID = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # [2, 32, 32] pixel centres, y then x


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Drawn:
    """A shape in a scene; centre and radius in pixels.

    `blend` in [0, 1] moves the outline towards the shape `towards`; `wobble` is the amplitude in pixels of a
    low-frequency wave along the outline.
    """

    thing: Thing
    x: float
    y: float
    radius: float
    towards: str = "circle"
    blend: float = 0.0
    wobble: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture to draw: shapes on gray.

    `noise`, `stain` and `tint` (of each shape's colour) are standard deviations in [0, 1], `blur` is in pixels.
    """

    drawn: tuple[Drawn, ...]
    background: float = 0.5
    noise: float = 0.02
    stain: float = 0.0
    blur: float = 0.0
    tint: float = 0.02


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene; returns uint8 [32, 32, 3]. The noise comes from `rng`."""
    image: np.ndarray = np.full((SIZE, SIZE, 3), scene.background)
    if scene.stain:
        coarse = rng.normal(0, 1, (4, 4, 3)) * 0.6 + rng.normal(0, 1, (4, 4, 1))
        image += scene.stain * ndimage.zoom(coarse, (SIZE / 4, SIZE / 4, 1), order=1)
    for drawn in scene.drawn:
        coverage = np.clip(0.5 - _distance(drawn, rng), 0, 1)[..., None]
        colour = np.array(COLOURS[drawn.thing.colour]) + rng.normal(0, scene.tint, 3)
        image = image * (1 - coverage) + colour * coverage
    if scene.blur:
        image = ndimage.gaussian_filter(image, (scene.blur, scene.blur, 0))
    image = image + rng.normal(0, scene.noise, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def random_places(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Returns random centres (x, y) in pixels at which shapes neither touch nor leave the picture."""
    while True:
        xy = rng.uniform(_MARGIN, SIZE - _MARGIN, (count, 2))
        if all(np.hypot(*(a - b)) >= _GAP for a, b in combinations(xy, 2)):
            return [(float(x), float(y)) for x, y in xy]


def deform(drawn: Drawn, rng: np.random.Generator, strength: float = 1.0) -> Drawn:
    """Returns the shape with an outline between two shapes and a wobble; `strength` in [0, 1]."""
    towards = str(rng.choice([shape for shape in SHAPES if shape != drawn.thing.shape]))
    blend = strength * rng.uniform(0, 0.6)
    wobble = strength * rng.uniform(0, 1.3)
    return replace(drawn, towards=towards, blend=blend, wobble=wobble)


def degrade(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with the same shapes and one technical flaw: noise, a stained background, or blur."""
    match rng.choice(["noise", "stain", "blur"]):
        case "noise":
            return replace(scene, noise=rng.uniform(0.03, 0.16))
        case "stain":
            return replace(scene, stain=rng.uniform(0.02, 0.2))
        case _:
            return replace(scene, blur=rng.uniform(0.6, 2.2))


def _distance(drawn: Drawn, rng: np.random.Generator) -> np.ndarray:
    """Signed distance [32, 32] in pixels to the outline, negative inside."""
    dy = _GRID[0] - drawn.y
    dx = _GRID[1] - drawn.x
    distance = (1 - drawn.blend) * _outline(drawn.thing.shape, dx, dy, drawn.radius)
    if drawn.blend:
        distance += drawn.blend * _outline(drawn.towards, dx, dy, drawn.radius)
    if drawn.wobble:
        angle = np.arctan2(dy, dx)
        waves = [w * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k, w in ((2, 0.5), (3, 0.5), (5, 0.3))]
        distance = distance + drawn.wobble * sum(waves)
    return distance


def _outline(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    return np.maximum(dy - 0.95 * radius, (2 * abs(dx) - dy - 0.95 * radius) / 5**0.5)
