"""The editing task: what an instruction does to a scene, prompts for RL, and edits of every quality to curate."""

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from firm.images import encode_image
from firm.records import SPLITS, Prompt, Split
from firm.shapes.instructions import CORNERS, KINDS, Kind, Step, by_kind, draw_instruction, parse, singles
from firm.shapes.scene import THINGS, Drawn, Scene, deform, random_places, render
from firm.shapes.vision import observe

Fault = Literal["none", "sloppy", "half", "wrong object", "contrary", "untouched", "erased", "blank"]
"""How an edit misses its instruction: "erased" lacks what was to be edited, "blank" has no objects at all."""
Damage = Literal["none", "collateral", "background", "everything"]
"""What an edit changes besides: one more thing, the background, or the background and all other objects."""

T = TypeVar("T")
_GROWTH = 1.35  # what "bigger" multiplies a radius with
_SIZES = (3.6, 7.4)  # pixels; a smaller shape would not be clear, a larger one would leave the picture
_RADII = {"bigger": (4.9, 5.4), "smaller": (6.3, 6.8), "": (5.6, 6.8)}  # pixels, of what is to become so
_ROOM = 14.0  # pixels between the centres of what was moved or added and everything else
_FAR = 10.0  # pixels that a move goes at least
# Untouched pictures and right edits on a redrawn background are the two ways to hack the reward: both are common.
_FAULTS: dict[Fault, float] = {
    "none": 0.27, "sloppy": 0.12, "half": 0.24, "wrong object": 0.08, "contrary": 0.1, "untouched": 0.09,
    "erased": 0.05, "blank": 0.05,
}  # fmt: skip
_DAMAGES: dict[Damage, float] = {"none": 0.34, "collateral": 0.28, "background": 0.25, "everything": 0.13}


def apply(steps: Sequence[Step], drawn: Sequence[Drawn]) -> list[Drawn | None]:
    """Returns what becomes of each object in order, None for a removed one, and then what is added.

    Raises:
        ValueError: if an object that the instruction names is not there.
    """
    places = {d.thing: i for i, d in enumerate(drawn)}
    result: list[Drawn | None] = list(drawn)
    for step in steps:
        if step.kind == "add":
            result.append(Drawn(step.thing, *CORNERS[step.word], sum(_RADII[""]) / 2))
            continue
        for thing in step.named:
            if thing not in places:
                shown = " and ".join(f"a {d.thing}" for d in drawn) or "nothing"
                raise ValueError(f"{str(step)!r} is about a {thing}, but the source image shows {shown}")
        at = [places[thing] for thing in step.named]
        old = drawn[at[0]]
        match step.kind:
            case "remove":
                result[at[0]] = None
            case "move":
                result[at[0]] = replace(old, x=CORNERS[step.word][0], y=CORNERS[step.word][1])
            case "resize":
                factor = _GROWTH if step.word == "bigger" else 1 / _GROWTH
                result[at[0]] = replace(old, radius=old.radius * factor)
            case "swap":
                other = drawn[at[1]]
                result[at[0]] = replace(old, x=other.x, y=other.y)
                result[at[1]] = replace(other, x=old.x, y=old.y)
            case _:
                result[at[0]] = replace(old, thing=step.becomes, blend=0.0)
    return result


def possible(steps: Sequence[Step], drawn: Sequence[Drawn]) -> bool:
    """Whether an instruction makes sense for a picture: all it names is there, and what it asks for has room."""
    if not {thing for step in steps for thing in step.named} <= {d.thing for d in drawn}:
        return False
    after = apply(steps, drawn)
    pairs = [(d, drawn[i] if i < len(drawn) else None) for i, d in enumerate(after) if d is not None]
    shifts = [np.inf if old is None else np.hypot(new.x - old.x, new.y - old.y) for new, old in pairs]
    return (
        len({new.thing.colour for new, _ in pairs}) == len(pairs)  # equal colours would run into one another
        and all(_SIZES[0] <= new.radius <= _SIZES[1] for new, old in pairs if old and new.radius != old.radius)
        and all(shift == 0 or shift >= _FAR for shift in shifts)
        and all(
            np.hypot(a.x - b.x, a.y - b.y) >= _ROOM
            for ((a, _), shift), ((b, _), other) in combinations(zip(pairs, shifts, strict=True), 2)
            if shift or other
        )
    )


def compose(instruction: str, rng: np.random.Generator) -> Scene:
    """Returns a clean scene of one or two objects for which an instruction makes sense; raises where `parse` does."""
    steps = parse(instruction)
    radii = {step.thing: _RADII[step.word if step.kind == "resize" else ""] for step in steps}
    things = [thing for step in steps for thing in step.named]
    # A second object shows whether it is kept; after a removal it is all that tells the edit from an erased picture.
    if not things or (len(steps) == len(things) == 1 and (steps[0].kind == "remove" or rng.random() < 2 / 3)):
        named = {colour for step in steps for colour in step.colours}
        things.append(_choice([t for t in THINGS if t.colour not in named], rng))
    while True:
        places = random_places(len(things), rng)
        drawn = tuple(
            Drawn(t, x, y, rng.uniform(*radii.get(t, _RADII[""]))) for t, (x, y) in zip(things, places, strict=True)
        )
        if possible(steps, drawn):
            return Scene(drawn, background=rng.uniform(0.42, 0.58), noise=0.0, tint=0.0)


def perfect(instruction: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Returns a clean source picture and its perfect edit; raises ValueError where `parse` does."""
    while True:
        before, source = _source(instruction, rng)
        after = edit(parse(instruction), before, "none", "none", rng)
        picture = _picture(after, rng)
        if _legible(picture, after):
            return source, picture


def perfect_edits(split: Split, count: int, seed: int) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """Yields triples of a random instruction, a clean source and its perfect edit, from which an editor learns."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for _ in range(count):
        instruction = draw_instruction(split, rng)
        yield instruction, *perfect(instruction, rng)


def prompts(split: Split) -> list[Prompt]:
    """Returns instructions with source pictures: every one of a split at least once, all kinds equally often.

    A source picture is a data URL (about 600 characters), not a file: so a prompt is the same on every machine.
    """
    return list(_prompts(split))


def candidate(index: int, seed: int, split: Split) -> tuple[str, Image.Image, Image.Image]:
    """Returns item `index` of the endless stream of (instruction, source, edit) for curation.

    It depends on the three arguments only. Fault and damage are drawn separately, so that every score from 1 to 5 is
    common on both dimensions, and in combination.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    instruction = draw_instruction(split, rng)
    noise = rng.uniform(0, 0.02)
    before, source = _source(instruction, rng, noise * rng.integers(2), bent=0.2)
    fault, damage = _draw(_FAULTS, rng), _draw(_DAMAGES, rng)
    after = edit(parse(instruction), before, fault, "none" if fault == "untouched" else damage, rng)
    # Slight differences, as editors make them, do not count: of place, and of quality. Unclear outlines may.
    if fault != "untouched":
        after = replace(after, drawn=tuple(_shift(d, rng) for d in after.drawn))
        if rng.random() < 0.2:
            after = replace(after, drawn=tuple(deform(d, rng, 0.4) for d in after.drawn))
    blur = rng.uniform(0.3, 0.6) if rng.random() < 0.3 else 0.0
    return instruction, source, _picture(replace(after, noise=noise, blur=blur, tint=0.02), rng)


def candidates(count: int, seed: int, split: Split) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """Yields the first `count` triples for curation, see `candidate`."""
    return (candidate(index, seed, split) for index in range(count))


def edit(steps: Sequence[Step], before: Scene, fault: Fault, damage: Damage, rng: np.random.Generator) -> Scene:
    """Returns an edit of a scene with a fault and damage; raises ValueError where `apply` does."""
    touched = [thing for step in steps for thing in step.named]
    drawn = _botch(steps, before.drawn, fault, rng)
    untouched = [d.thing for d in drawn if d in before.drawn and d.thing not in touched]
    if damage == "collateral":
        extra = _pick(KINDS, drawn, lambda step: set(step.named) <= set(untouched), rng) or _pick(
            ["resize", "move"], drawn, lambda step: True, rng
        )
        drawn = _there(apply([extra], drawn)) if extra else drawn
    elif damage == "everything":
        drawn = [_another(d, [*drawn, *before.drawn], rng) if d.thing in untouched else d for d in drawn]
    if damage in ("background", "everything"):
        level = before.background + rng.choice([-1, 1]) * rng.uniform(0.16, 0.32)
        return replace(before, drawn=tuple(drawn), background=level, stain=rng.uniform(0, 0.15))
    return replace(before, drawn=tuple(drawn))


def _botch(steps: Sequence[Step], drawn: Sequence[Drawn], fault: Fault, rng: np.random.Generator) -> list[Drawn]:
    """Returns the objects of an edit with a fault."""
    right = apply(steps, drawn)
    aims = {thing for step in steps for thing in (*step.named, step.thing, step.becomes)}
    match fault:
        case "untouched":
            return list(drawn)
        case "blank":
            return []
        case "erased":
            return [d for d in _there(right) if d.thing not in aims]
        case "sloppy":
            return [deform(d, rng) if d.thing in aims else d for d in _there(right)]
        case "half":
            if len(steps) == 2:
                return _there(apply([steps[int(rng.integers(2))]], drawn))
            return _there(_half(steps[0], drawn, right, rng))
        case "wrong object" | "contrary":
            same = fault == "contrary"
            step = steps[int(rng.integers(len(steps)))]
            wrong = (
                _pick([step.kind], drawn, lambda s: s not in steps and (s.thing == step.thing) is same, rng)
                or _pick([step.kind], drawn, lambda s: s not in steps, rng)
                or _pick([kind for kind in KINDS if kind != step.kind], drawn, lambda s: True, rng)
            )
            return _there(apply([wrong], drawn)) if wrong else list(drawn)
    return _there(right)


def _half(
    step: Step, drawn: Sequence[Drawn], right: Sequence[Drawn | None], rng: np.random.Generator
) -> list[Drawn | None]:
    """Returns what becomes of each object if a single step is done by half."""
    result = list(right)
    if step.kind == "add":
        (added,) = [d for d in right[len(drawn) :] if d is not None]
        result[-1] = _another(added, _there(right), rng)
        return result
    at = next(i for i, d in enumerate(drawn) if d.thing == step.thing)
    old, new = drawn[at], right[at]
    if new is None:
        result[at] = replace(old, radius=old.radius * rng.uniform(0.55, 0.85))
    elif step.kind == "swap":
        result[at] = None
    elif step.kind in ("move", "resize"):
        part = rng.uniform(0.3, 0.6)
        x, y, radius = (a + part * (b - a) for a, b in ((old.x, new.x), (old.y, new.y), (old.radius, new.radius)))
        result[at] = replace(old, x=x, y=y, radius=radius)
    else:
        result[at] = _another(new, [*_there(right), old], rng)
    return result


def _another(drawn: Drawn, others: Sequence[Drawn], rng: np.random.Generator) -> Drawn:
    """Returns an object like this one, but of another colour, another shape, or both; none of the others' colours."""
    thing = drawn.thing
    used = {d.thing.colour for d in others} - {thing.colour}
    pool = [t for t in THINGS if t.colour not in used and t not in (thing, *(d.thing for d in others))]
    near = [t for t in pool if (t.colour == thing.colour) != (t.shape == thing.shape)]
    return replace(drawn, thing=_choice(near if rng.random() < 0.7 else pool, rng))


def _pick(
    kinds: Sequence[Kind], drawn: Sequence[Drawn], allowed: Callable[[Step], bool], rng: np.random.Generator
) -> Step | None:
    """Returns a random step of these kinds that is allowed and makes sense for a picture, None if there is none."""
    for index in rng.permutation(len(kinds)):
        pool = [step for step in singles(kinds[index]) if allowed(step) and possible([step], drawn)]
        if pool:
            return _choice(pool, rng)
    return None


def _choice(pool: Sequence[T], rng: np.random.Generator) -> T:
    return pool[int(rng.integers(len(pool)))]


def _draw(weights: dict[T, float], rng: np.random.Generator) -> T:
    return list(weights)[int(rng.choice(len(weights), p=list(weights.values())))]


def _there(drawn: Sequence[Drawn | None]) -> list[Drawn]:
    return [d for d in drawn if d is not None]


def _source(
    instruction: str, rng: np.random.Generator, noise: float = 0.0, bent: float = 0.0
) -> tuple[Scene, Image.Image]:
    """Returns a source with noise and its picture; a share of sources is `bent`: of not quite regular shapes."""
    while True:
        scene = replace(compose(instruction, rng), noise=noise)
        if rng.random() < bent:
            # Without a wobble, as its waves differ in every drawing.
            scene = replace(scene, drawn=tuple(replace(deform(d, rng, 0.35), wobble=0.0) for d in scene.drawn))
        picture = _picture(scene, rng)
        if _legible(picture, scene):
            return scene, picture


def _legible(picture: Image.Image, scene: Scene) -> bool:
    """Whether the teacher sees what was drawn: some small circles are square by the pixel."""
    return {seen.thing for seen in observe(picture).seen} == {drawn.thing for drawn in scene.drawn}


def _shift(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    return replace(drawn, x=drawn.x + rng.normal(0, 0.4), y=drawn.y + rng.normal(0, 0.4))


def _picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(render(scene, rng))


@cache
def _prompts(split: Split) -> tuple[Prompt, ...]:
    kinds = by_kind(split)
    rng = np.random.default_rng(SPLITS.index(split))
    rounds = range(max(map(len, kinds.values())))
    texts = [listed[n % len(listed)] for n in rounds for listed in kinds.values()]
    return tuple(Prompt(text=text, image=_data_url(_source(text, rng)[1])) for text in texts)


def _data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_image(image)).decode()
