"""How the teacher judges edits: two scores with its evidence, and instructions rewritten so that an edit misses them.

The rubrics are those of the paper (section 3.1), graded, as a small critic cannot learn sharp thresholds.

*Execution* is the mean of what was reached of each step: an untouched picture and a lost object reach nothing, whatever
else was changed does not count. One thing is asked besides, because nothing else tells a removal from an erased
picture: where something should be left, something must be.

*Consistency* starts from 5 and loses a point for each significant change that nobody asked for, less for a smaller one.
A picture of the world has two objects and a background, so a lost object counts as two changes, and a redrawn
background as up to three. Not counted, as in the paper: what is behind moved things, what a thing that was asked for
hides of another, slight variations of quality, all attributes of what is to be replaced. Of what is to be edited
otherwise, only the attribute in question may change. This world has no shadows or other physical consequences.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from PIL import Image

from firm.records import SPLITS
from firm.shapes.comparison import SAME_GROUND, SAME_PLACE, SAME_SIZE, Comparison, Picture, distance, lies_in
from firm.shapes.editing import apply, possible
from firm.shapes.instructions import Step, instructions, parse
from firm.shapes.scene import Drawn
from firm.shapes.vision import Seen

_MISSED = 2  # a rewritten instruction has this execution at most
_FREE = {"recolor": "colour", "move": "place", "resize": "size", "swap": "place"}  # what an edit may change


def execution(instruction: str, before: Image.Image, after: Image.Image) -> int:
    """Scores from 1 to 5 how completely an edit does what the instruction asks for.

    Raises:
        ValueError: where `parse` does, for an object that the source does not show, for images of different sizes.
    """
    return Edit.of(instruction, Picture.of(before), Picture.of(after)).execution


def consistency(instruction: str, before: Image.Image, after: Image.Image) -> int:
    """Scores from 1 to 5 how well everything else was kept; raises ValueError where `execution` does."""
    return Edit.of(instruction, Picture.of(before), Picture.of(after)).consistency


@dataclass(frozen=True)
class Edit:
    """An edit that is judged: the steps, what they make of each object, and what the pictures show.

    Attributes:
        steps: What the instruction asks for.
        wished: What should become of each object of the source, and what should be added.
        seen: The two pictures.
    """

    steps: tuple[Step, ...]
    wished: Sequence[Drawn | None]
    seen: Comparison

    @classmethod
    def of(cls, instruction: str, before: Picture, after: Picture) -> "Edit":
        """Compares two pictures in the light of an instruction; raises ValueError where `execution` does."""
        steps = parse(instruction)
        wished = apply(steps, before.drawn)
        return cls(steps, wished, Comparison.of(before, after, wished))

    @property
    def execution(self) -> int:
        """The score from 1 to 5."""
        return round(1 + 4 * float(np.mean([self._reached(step) for step in self.steps])))

    @property
    def consistency(self) -> int:
        """The score from 1 to 5."""
        return max(1, round(5 - self._damage()))

    def _reached(self, step: Step) -> float:
        """Share in [0, 1] of a step that was done."""
        source = self.seen.before.observation.seen
        if step.kind == "add":
            adds = [s for s in self.steps if s.kind == "add"]
            at = len(source) + adds.index(step)
            found, wish = self.seen.found[at], self.wished[at]
            return _looks(found, wish) * _nearness(found, wish) if found and wish else 0.0
        named = [i for i, d in enumerate(self.seen.before.drawn) if d.thing in step.named]
        return float(np.mean([self._done(step, i) for i in named]))

    def _done(self, step: Step, i: int) -> float:
        """Share in [0, 1] of a step that was done to object `i` of the source."""
        source, found, wish = self.seen.before.observation.seen[i], self.seen.found[i], self.wished[i]
        if wish is None:
            left = self.seen.remains(source) if found is None else min(1.0, (found.size / source.size) ** 2)
            return (1 - left) * self._something_left()
        if found is None:
            return 0.0
        match step.kind:
            case "move" | "swap":
                way = distance((wish.x, wish.y), source.middle) - SAME_PLACE
                rest = max(0.0, distance((wish.x, wish.y), found.middle) - SAME_PLACE)
                copied = any(s.thing == source.thing for s in self.seen.extra)
                return _looks(found, wish) * max(0.0, 1 - rest / max(way, 1)) * (0.5 if copied else 1)
            case "resize":
                grown = np.log(found.size / source.size) * (1 if step.word == "bigger" else -1)
                return _looks(found, wish) * degree(float(grown), SAME_SIZE, 0.24)
            case _:
                return _changed(source, found, wish) * (0.5 + 0.5 * _nearness(found, wish))

    def _something_left(self) -> float:
        """In [0, 1]: whether the edit still is a picture of something, or of the same empty background."""
        if clear := [_clear(s) for s in self.seen.after.observation.seen]:
            return min(1.0, 1.5 * max(clear))
        emptied = all(wish is None for wish in self.wished)
        return 1 - degree(self.seen.ground, 0.06, 0.16) if emptied else 0.0

    def _damage(self) -> float:
        """Number of significant changes that the instruction does not ask for."""
        kinds = {thing: step.kind for step in self.steps for thing in step.named}
        damage = 3 * degree(self.seen.ground, SAME_GROUND, 0.2) + 2 * degree(self.seen.noise, 0.04, 0.16)
        source = self.seen.before
        asked = self._asked()
        extra = self.seen.extra
        for drawn, seen, found in zip(source.drawn, source.observation.seen, self.seen.found, strict=False):
            kind = kinds.get(drawn.thing, "")
            if kind in ("replace", "remove"):
                continue
            now, free = found, {_FREE.get(kind, "")}
            if not kind and self.seen.hidden(seen, found, asked):
                now, free = found or seen, {"shape", "place", "size"}
                extra = tuple(s for s in extra if s.colour != now.colour or not lies_in(s, seen))  # pieces of it
            damage += _lost(seen, now, free)
        return damage + min(3, sum(0.5 + 0.5 * _clear(s) for s in extra))

    def _asked(self) -> list[Seen]:
        """What the instruction changes or adds and the edit shows, about where it should be."""
        return [
            found
            for old, wish, found in zip_longest(self.seen.before.drawn, self.wished, self.seen.found)
            if wish and found and wish != old and found.thing == wish.thing
            if distance(found.middle, (wish.x, wish.y)) < 2 * SAME_PLACE
        ]

    def evidence(self) -> str:
        """Says what became of each object and of the background: "red circle recolored blue ; background unchanged"."""
        return " ; ".join(self.seen.clauses())

    def rewritten(self, rng: np.random.Generator) -> str:
        """Returns another instruction that the source allows and that this edit does not fulfil.

        It is of the split of this one; of "train" if this one is not listed, see `instructions`.

        Raises:
            ValueError: if there is none.
        """
        before, after = self.seen.before, self.seen.after
        own = " and then ".join(map(str, self.steps))
        split = next((s for s in SPLITS if own in instructions(s)), SPLITS[0])
        listed = instructions(split)
        for index in rng.permutation(len(listed)):
            text = listed[index]
            if possible(parse(text), before.drawn) and Edit.of(text, before, after).execution <= _MISSED:
                return text
        raise ValueError("this edit fulfils every instruction that the source allows")


def degree(measure: float, none: float, all_: float) -> float:
    """Maps a measure to 0 at `none` or below, to 1 at `all_` or above, and linearly between."""
    return float(np.clip((measure - none) / (all_ - none), 0, 1))


def _single(seen: Seen) -> float:
    """In [0, 1]: whether something is one object of the world, and not a picture painted over."""
    return 1 - degree(seen.size, 8.5, 11)


def _clear(seen: Seen) -> float:
    """In [0, 1]: how clear the shape of an object is."""
    return min(1.0, seen.clearness / 0.85) * _single(seen)


def _looks(seen: Seen, wish: Drawn) -> float:
    """Credit in [0, 1] for the right colour and the right shape."""
    thing = wish.thing
    return 0.4 * (seen.colour == thing.colour) * _single(seen) + 0.6 * _clear(seen) * (seen.shape == thing.shape)


def _nearness(seen: Seen, wish: Drawn) -> float:
    return 1 - 0.6 * degree(distance(seen.middle, (wish.x, wish.y)), SAME_PLACE, 14)


def _changed(source: Seen, found: Seen, wish: Drawn) -> float:
    """Share in [0, 1] of a change of colour or shape or both; half of it if what should stay was changed."""
    credits = []
    kept = 1.0
    for old, new, wanted, full in (
        (source.colour, found.colour, wish.thing.colour, 1.0),
        (source.shape, found.shape, wish.thing.shape, _clear(found)),
    ):
        if old != wanted:
            credits.append(full if new == wanted else 0.25 * (new != old))
        else:
            kept = 0.5 + 0.5 * full * (new == wanted)
    return float(np.mean(credits)) * kept * _single(found)


def _lost(source: Seen, found: Seen | None, free: Collection[str]) -> float:
    """Number in [0, 2] of significant changes of an object, without the attributes that may change."""
    if found is None:
        return 2.0
    same = source.shape == found.shape
    rougher = 0.5 * degree(source.clearness - found.clearness, 0.15, 0.6)
    lost = {
        "colour": float(source.colour != found.colour),
        "shape": rougher if same else 1.0,
        "place": degree(distance(source.middle, found.middle), SAME_PLACE, 8),
        "size": degree(abs(float(np.log(found.size / source.size))), SAME_SIZE, 0.26) if same else 0.0,
    }
    return min(2.0, sum(value for name, value in lost.items() if name not in free))
