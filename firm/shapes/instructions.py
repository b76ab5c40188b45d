"""The language of the editing task: what an instruction may ask for, its parser, and the splits."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, product
from typing import Literal, get_args

import numpy as np

from firm.records import Split
from firm.shapes.scene import COLOURS, SHAPES, THINGS, Thing
from firm.shapes.texts import digest, normalised, of_split

Kind = Literal["recolor", "replace", "remove", "add", "move", "resize", "swap"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CORNERS = {
    "top left": (8.25, 8.25),
    "top right": (23.75, 8.25),
    "bottom left": (8.25, 23.75),
    "bottom right": (23.75, 23.75),
}
"""Where things are added and moved to: centres (x, y) in pixels."""

_FORMS: dict[Kind, str] = {
    "recolor": "make the {thing} {word}",
    "replace": "replace the {thing} with a {other}",
    "remove": "remove the {thing}",
    "add": "add a {thing} at the {word}",
    "move": "move the {thing} to the {word}",
    "resize": "make the {thing} {word}",
    "swap": "swap the {thing} and the {other}",
}
_WORDS: dict[Kind, tuple[str, ...]] = {
    "recolor": tuple(COLOURS),
    "add": tuple(CORNERS),
    "move": tuple(CORNERS),
    "resize": ("bigger", "smaller"),
}
_THEN = " and then "
_COMPOUNDS = 6  # listed instructions of every two kinds: a sample, as there are tens of thousands


@dataclass(frozen=True)
class Step:
    """One change that an instruction asks for.

    Attributes:
        kind: What to do.
        thing: What to do it to, or what to add.
        other: What to replace it with, or to swap it with.
        word: Its new colour, its corner, "bigger" or "smaller".
    """

    kind: Kind
    thing: Thing
    other: Thing | None = None
    word: str = ""

    @property
    def named(self) -> tuple[Thing, ...]:
        """The things that the source picture must show."""
        if self.kind == "swap" and self.other is not None:
            return (self.thing, self.other)
        return () if self.kind == "add" else (self.thing,)

    @property
    def becomes(self) -> Thing:
        """The thing that is there when the step is done; of no meaning where it is removed."""
        if self.kind == "recolor":
            return Thing(self.word, self.thing.shape)
        return self.other if self.kind == "replace" and self.other is not None else self.thing

    @property
    def colours(self) -> set[str]:
        """Every colour that it names."""
        return {t.colour for t in (self.thing, self.other, self.becomes) if t is not None}

    def __str__(self) -> str:
        return _FORMS[self.kind].format(thing=self.thing, other=self.other, word=self.word)


@cache
def parse(instruction: str) -> tuple[Step, ...]:
    """Reads an instruction such as "make the red circle blue and then remove the green square".

    Raises:
        ValueError: if it is not one of the shapes world, asks for no change, or names an object in two steps.
    """
    parts = normalised(instruction).split(_THEN)
    steps = tuple(step for part in parts if (step := _step(part)) is not None)
    named = [thing for step in steps for thing in step.named]
    if len(parts) > 2 or len(steps) < len(parts) or len(set(named)) < len(named):
        known = "', '".join(form.format(thing="THING", other="OTHER", word="WORD") for form in _FORMS.values())
        raise ValueError(
            f"the shapes world does not know the instruction {instruction[:200]!r}: it knows '{known}', and two of "
            f"them about different things joined by '{_THEN.strip()}'; a thing has a colour ({', '.join(COLOURS)}) and "
            f"a shape ({', '.join(SHAPES)}), a word is a colour, a corner ({', '.join(CORNERS)}), bigger or smaller"
        )
    return steps


def instructions(split: Split) -> list[str]:
    """Returns the instructions of a split in a fixed order: every single one, and a sample of the compound ones."""
    return list(of_split(_texts(), split))


@cache
def by_kind(split: Split) -> dict[str, list[str]]:
    """Returns the instructions of a split by their kind; those of two steps are "compound"."""
    kinds: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "compound")}
    for text in instructions(split):
        steps = parse(text)
        kinds[steps[0].kind if len(steps) == 1 else "compound"].append(text)
    return kinds


def draw_instruction(split: Split, rng: np.random.Generator) -> str:
    """Returns a random instruction of a split; all kinds are equally common, a quarter is compound."""
    kinds = by_kind(split)
    kind = "compound" if rng.random() < 1 / 4 else str(rng.choice(KINDS))
    return str(rng.choice(kinds[kind]))


@cache
def singles(kind: Kind) -> tuple[Step, ...]:
    """Returns every step of a kind; a swap in one order only, so that no test swap is a train swap reworded."""
    others = THINGS if "{other}" in _FORMS[kind] else (None,)
    steps = (Step(kind, *parts) for parts in product(THINGS, others, _WORDS.get(kind, ("",))))
    changing = (s for s in steps if s.thing not in (s.other, s.becomes if s.kind == "recolor" else None))
    if kind != "swap":
        return tuple(changing)
    apart = [s for s in changing if s.other is not None and s.thing.colour != s.other.colour]
    return tuple(s for s in apart if digest(str(s)) < digest(str(Step("swap", s.other or s.thing, s.thing))))


def _step(text: str) -> Step | None:
    return _every_step().get(text)


@cache
def _every_step() -> dict[str, Step]:
    steps = {str(step): step for kind in KINDS for step in singles(kind)}
    swaps = (Step("swap", s.other, s.thing) for s in singles("swap") if s.other is not None)
    return steps | {str(step): step for step in swaps}


@cache
def _texts() -> tuple[str, ...]:
    compounds = [text for pair in product(KINDS, KINDS) for text in islice(_pairs(*pair), _COMPOUNDS)]
    return (*(str(step) for kind in KINDS for step in singles(kind)), *compounds)


def _pairs(first: Kind, second: Kind) -> Iterator[str]:
    """Yields compound instructions of two kinds; they always leave at least one thing and at most two."""
    if "swap" in (first, second) or (first == second and first in ("add", "remove")):
        return
    a, b = (sorted(singles(kind), key=lambda step: digest(str(step))) for kind in (first, second))
    for shift in range(len(b)):
        for x, y in zip(a, islice(cycle(b), shift, None), strict=False):
            if not (x.colours & y.colours or (x.word == y.word and x.word in CORNERS)):
                yield f"{x}{_THEN}{y}"
