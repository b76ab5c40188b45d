"""The shapes world: prompts, what they ask for, pictures of it, and deliberately flawed pictures for curation."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 32  # pixels a side
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.15, 0.68, 0.20),
    "blue": (0.17, 0.28, 0.86),
    "yellow": (0.93, 0.84, 0.15),
}
SHAPES = ("circle", "square", "triangle")
Split = Literal["train", "test"]

_OBJECT = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PROMPT = re.compile(rf"{_OBJECT}(?: (and|left of) {_OBJECT})?")
_MARGIN = 7.5  # pixels from a centre to the border: every outline fits into the picture
_GAP = 15.0  # pixels between two centres: outlines never touch
_GRID = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # [2, 32, 32] pixel centres, y then x


@dataclass(frozen=True)
class Thing:
    """A coloured shape, as asked for."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: one or two objects; `relation` is "" for one, else "and" or "left of"."""

    objects: tuple[Thing, ...]
    relation: str = ""


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
    """A picture to draw: shapes on gray; `noise` and `stain` are standard deviations in [0, 1], `blur` in pixels."""

    drawn: tuple[Drawn, ...]
    background: float = 0.5
    noise: float = 0.02
    stain: float = 0.0
    blur: float = 0.0


def prompts(split: Split) -> list[str]:
    """Returns every prompt of a split in a fixed order; about one in five is "test", by the SHA-256 of its text."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: the shapes world has 'train' and 'test'")
    return list(_split()[split])


def draw_prompt(split: Split, rng: np.random.Generator) -> str:
    """Returns a random prompt of a split; a third of them have one object, though there are many more pairs."""
    single = rng.random() < 1 / 3
    return str(rng.choice([text for text in prompts(split) if (len(parse(text).objects) == 1) == single]))


def parse(prompt: str) -> Wanted:
    """Reads a prompt such as "a red circle left of a blue square".

    Raises:
        ValueError: if the world does not know the prompt.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if not match:
        raise ValueError(
            f"the shapes world does not know the prompt {prompt[:200]!r}: it knows 'a COLOUR SHAPE', "
            f"'... and a COLOUR SHAPE' and '... left of a COLOUR SHAPE' with the colours {', '.join(COLOURS)} "
            f"and the shapes {', '.join(SHAPES)}"
        )
    first, second, relation = Thing(*match.group(1, 2)), match.group(4, 5), match.group(3) or ""
    return Wanted((first, Thing(*second)), relation) if relation else Wanted((first,))


def compose(prompt: str, rng: np.random.Generator) -> Scene:
    """Returns a clean scene that shows exactly what the prompt asks for, at random places."""
    wanted = parse(prompt)
    places = _places(len(wanted.objects), rng)
    if wanted.relation == "left of":
        while abs(places[0][0] - places[1][0]) < 5:
            places = _places(2, rng)
        places.sort()
    drawn = tuple(Drawn(o, x, y, rng.uniform(5.8, 6.8)) for o, (x, y) in zip(wanted.objects, places, strict=True))
    return Scene(drawn, background=rng.uniform(0.42, 0.58), noise=rng.uniform(0.01, 0.03))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene; returns uint8 [32, 32, 3]. The noise comes from `rng`."""
    image: np.ndarray = np.full((SIZE, SIZE, 3), scene.background)
    if scene.stain:
        coarse = rng.normal(0, 1, (4, 4, 3)) * 0.6 + rng.normal(0, 1, (4, 4, 1))
        image += scene.stain * ndimage.zoom(coarse, (SIZE / 4, SIZE / 4, 1), order=1)
    for drawn in scene.drawn:
        coverage = np.clip(0.5 - _distance(drawn, rng), 0, 1)[..., None]
        colour = np.array(COLOURS[drawn.thing.colour]) + rng.normal(0, 0.02, 3)
        image = image * (1 - coverage) + colour * coverage
    if scene.blur:
        image = ndimage.gaussian_filter(image, (scene.blur, scene.blur, 0))
    image = image + rng.normal(0, scene.noise, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def deform(drawn: Drawn, rng: np.random.Generator, strength: float = 1.0) -> Drawn:
    """Returns the shape with an outline between two shapes and a wobble; `strength` in [0, 1]."""
    towards = str(rng.choice([shape for shape in SHAPES if shape != drawn.thing.shape]))
    blend, wobble = strength * rng.uniform(0, 0.6), strength * rng.uniform(0, 1.3)
    return replace(drawn, towards=towards, blend=blend, wobble=wobble)


def candidate(index: int, seed: int, split: Split) -> tuple[str, Image.Image]:
    """Returns item `index` of the endless stream of pairs for curation; depends on the three arguments only.

    The number of faults is drawn first, so that every score from 1 to 5 is common; flaws that only a quality rubric
    notices are drawn apart from it.
    """
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    prompt = draw_prompt(split, rng)
    num_faults = int(rng.choice(6, p=(0.27, 0.20, 0.20, 0.16, 0.08, 0.09)))
    scene = compose(prompt, rng)
    if num_faults == 5:
        scene = _unrelated(parse(prompt), split, rng)
    else:
        for _ in range(num_faults):
            scene = _spoil(scene, rng)
    if rng.random() < (0.35 if num_faults == 0 else 0.6):
        scene = replace(scene, drawn=tuple(deform(d, rng) for d in scene.drawn))
    if rng.random() < 0.5:
        scene = _degrade(scene, rng)
    return prompt, Image.fromarray(render(scene, rng))


def candidates(count: int, seed: int, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """Yields the first `count` pairs of (prompt, picture) for curation, see `candidate`."""
    return (candidate(index, seed, split) for index in range(count))


@cache
def _split() -> dict[str, list[str]]:
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    texts = [f"a {thing}" for thing in things]
    # "and" is symmetric: one of its two orders only, lest a test prompt be a train prompt in other words.
    pairs = [(a, b) for a, b in combinations(things, 2) if a.colour != b.colour]
    texts += [min(f"a {a} and a {b}", f"a {b} and a {a}", key=_digest) for a, b in pairs]
    texts += [f"a {a} left of a {b}" for a, b in permutations(things, 2) if a.colour != b.colour]
    split: dict[str, list[str]] = {"train": [], "test": []}
    for text in texts:
        split["test" if _digest(text) % 5 == 0 else "train"].append(text)
    return split


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _places(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    while True:
        xy = rng.uniform(_MARGIN, SIZE - _MARGIN, (count, 2))
        if all(np.hypot(*(a - b)) >= _GAP for a, b in combinations(xy, 2)):
            return [(float(x), float(y)) for x, y in xy]


def _distance(drawn: Drawn, rng: np.random.Generator) -> np.ndarray:
    """Signed distance [32, 32] in pixels to the outline, negative inside."""
    dy, dx = _GRID[0] - drawn.y, _GRID[1] - drawn.x
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


def _spoil(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with one more fault against its prompt."""
    drawn = list(scene.drawn)
    if not drawn:
        return scene
    pick = int(rng.integers(len(drawn)))
    thing, used = drawn[pick].thing, {d.thing.colour for d in drawn}
    match rng.choice(["colour", "shape", "missing", "extra", "swap", "deform"], p=(0.2, 0.2, 0.22, 0.12, 0.1, 0.16)):
        case "colour":
            colour = str(rng.choice([c for c in COLOURS if c not in used]))
            drawn[pick] = replace(drawn[pick], thing=Thing(colour, thing.shape))
        case "shape":
            shape = str(rng.choice([s for s in SHAPES if s != thing.shape]))
            drawn[pick] = replace(drawn[pick], thing=Thing(thing.colour, shape))
        case "missing":
            del drawn[pick]
        case "extra" if len(drawn) < 3:
            colour = str(rng.choice([c for c in COLOURS if c not in used]))
            things = [*(d.thing for d in drawn), Thing(colour, str(rng.choice(SHAPES)))]
            places = _places(len(things), rng)
            drawn = [Drawn(t, x, y, rng.uniform(5.6, 6.4)) for t, (x, y) in zip(things, places, strict=True)]
        case "swap" if len(drawn) == 2:
            a, b = drawn
            drawn = [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
        case _:
            drawn = [deform(d, rng) for d in drawn]
    return replace(scene, drawn=tuple(drawn))


def _unrelated(wanted: Wanted, split: Split, rng: np.random.Generator) -> Scene:
    """Returns a scene with nothing of what is wanted: other things, nothing at all, or noise."""
    kind = rng.random()
    if kind < 0.12:
        return Scene((), background=rng.uniform(0.3, 0.7), noise=rng.uniform(0.01, 0.05))
    if kind < 0.24:
        return Scene((), background=rng.uniform(0.3, 0.7), noise=rng.uniform(0.1, 0.3), stain=rng.uniform(0, 0.3))
    other = compose(draw_prompt(split, rng), rng)
    wrong = [(c, s) for c in COLOURS for s in SHAPES if all(c != o.colour and s != o.shape for o in wanted.objects)]
    things = [Thing(*wrong[int(rng.integers(len(wrong)))]) for _ in other.drawn]
    return replace(other, drawn=tuple(replace(d, thing=t) for d, t in zip(other.drawn, things, strict=True)))


def _degrade(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with a flaw that is not against the prompt: noise, a stained background, or blur."""
    match rng.choice(["noise", "stain", "blur"]):
        case "noise":
            return replace(scene, noise=rng.uniform(0.03, 0.16))
        case "stain":
            return replace(scene, stain=rng.uniform(0.02, 0.2))
        case _:
            return replace(scene, blur=rng.uniform(0.6, 2.2))
