"""The text-to-image task: prompts, scenes that show what they ask for, and deliberately flawed pictures to curate."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations

import numpy as np
from PIL import Image

from firm.records import SPLITS, Split
from firm.shapes.scene import COLOURS, SHAPES, THINGS, Drawn, Scene, Thing, deform, degrade, random_places, render
from firm.shapes.texts import digest, normalised, of_split

_OBJECT = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PROMPT = re.compile(rf"{_OBJECT}(?: (and|left of) {_OBJECT})?")


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: one or two objects; `relation` is "" for one, else "and" or "left of"."""

    objects: tuple[Thing, ...]
    relation: str = ""


def prompts(split: Split) -> list[str]:
    """Returns every prompt of a split in a fixed order; about one in five is "test", by the SHA-256 of its text."""
    return list(of_split(_texts(), split))


def draw_prompt(split: Split, rng: np.random.Generator) -> str:
    """Returns a random prompt of a split; one object in a third of the draws, although most prompts have two."""
    single = rng.random() < 1 / 3
    return str(rng.choice([text for text in prompts(split) if (len(parse(text).objects) == 1) == single]))


def parse(prompt: str) -> Wanted:
    """Reads a prompt such as "a red circle left of a blue square".

    Raises:
        ValueError: if the prompt is not one of the shapes world.
    """
    match = _PROMPT.fullmatch(normalised(prompt))
    if not match:
        raise ValueError(
            f"the shapes world does not know the prompt {prompt[:200]!r}: it knows 'a COLOUR SHAPE', "
            f"'... and a COLOUR SHAPE' and '... left of a COLOUR SHAPE' with the colours {', '.join(COLOURS)} "
            f"and the shapes {', '.join(SHAPES)}"
        )
    first = Thing(*match.group(1, 2))
    relation = match.group(3)
    return Wanted((first, Thing(*match.group(4, 5))), relation) if relation else Wanted((first,))


def compose(prompt: str, rng: np.random.Generator) -> Scene:
    """Returns a clean scene that shows exactly what the prompt asks for, at random places."""
    wanted = parse(prompt)
    places = random_places(len(wanted.objects), rng)
    if wanted.relation == "left of":
        while abs(places[0][0] - places[1][0]) < 5:
            places = random_places(2, rng)
        places.sort()
    drawn = tuple(Drawn(o, x, y, rng.uniform(5.8, 6.8)) for o, (x, y) in zip(wanted.objects, places, strict=True))
    return Scene(drawn, background=rng.uniform(0.42, 0.58), noise=rng.uniform(0.01, 0.03))


def candidate(index: int, seed: int, split: Split) -> tuple[str, Image.Image]:
    """Returns item `index` of the endless stream of pairs for curation; depends on the three arguments only.

    The number of faults is drawn first, so that every score from 1 to 5 is common; flaws that only a quality rubric
    notices are drawn separately.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
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
        scene = degrade(scene, rng)
    return prompt, Image.fromarray(render(scene, rng))


def candidates(count: int, seed: int, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """Yields the first `count` pairs of (prompt, picture) for curation, see `candidate`."""
    return (candidate(index, seed, split) for index in range(count))


@cache
def _texts() -> tuple[str, ...]:
    texts = [f"a {thing}" for thing in THINGS]
    # "and" is symmetric: only one of its two orders is used, so that no test prompt is a train prompt reworded.
    pairs = [(a, b) for a, b in combinations(THINGS, 2) if a.colour != b.colour]
    texts += [min(f"a {a} and a {b}", f"a {b} and a {a}", key=digest) for a, b in pairs]
    texts += [f"a {a} left of a {b}" for a, b in permutations(THINGS, 2) if a.colour != b.colour]
    return tuple(texts)


def _spoil(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with one more fault against its prompt."""
    drawn = list(scene.drawn)
    if not drawn:
        return scene
    pick = int(rng.integers(len(drawn)))
    thing = drawn[pick].thing
    used = {d.thing.colour for d in drawn}
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
            places = random_places(len(things), rng)
            drawn = [Drawn(t, x, y, rng.uniform(5.6, 6.4)) for t, (x, y) in zip(things, places, strict=True)]
        case "swap" if len(drawn) == 2:
            a, b = drawn
            drawn = [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
        case _:
            drawn = [deform(d, rng) for d in drawn]
    return replace(scene, drawn=tuple(drawn))


def _unrelated(wanted: Wanted, split: Split, rng: np.random.Generator) -> Scene:
    """Returns a scene without anything that is wanted: other things, nothing at all, or noise."""
    kind = rng.random()
    if kind < 0.12:
        return Scene((), background=rng.uniform(0.3, 0.7), noise=rng.uniform(0.01, 0.05))
    if kind < 0.24:
        return Scene((), background=rng.uniform(0.3, 0.7), noise=rng.uniform(0.1, 0.3), stain=rng.uniform(0, 0.3))
    other = compose(draw_prompt(split, rng), rng)
    wrong = [t for t in THINGS if all(t.colour != o.colour and t.shape != o.shape for o in wanted.objects)]
    things = [wrong[int(rng.integers(len(wrong)))] for _ in other.drawn]
    return replace(other, drawn=tuple(replace(d, thing=t) for d, t in zip(other.drawn, things, strict=True)))
