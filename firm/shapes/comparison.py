"""What differs between a source picture and its edit, measured from their pixels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

from firm.shapes.scene import SIZE, Drawn
from firm.shapes.vision import Observation, Seen, blocks, coloured, observe, pixels_of

SAME_PLACE = 2.5
"""Pixels that an object may drift and still be in its place."""
SAME_SIZE = 0.08
"""Logarithm of the ratio of two radii from which sizes differ."""
SAME_GROUND = 0.03
"""Mean change of the background's colour in [0, 1] from which it is another one."""

_ALIKE = 0.35  # resemblance from which two objects may be one and the same
_REACH = 12.0  # pixels over which the resemblance by place fades
_ENOUGH = 0.05  # share of a picture that shows what its background is like
_SLACK = 0.1  # share of an object's pixels that may be unclear


@dataclass(frozen=True)
class Picture:
    """A picture as the teacher sees it: its pixels [32, 32, 3] in [0, 1], their objects, and its true size."""

    pixels: np.ndarray
    observation: Observation
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image) -> "Picture":
        """Looks at an image of any size and mode."""
        return cls(pixels_of(image), observe(image), image.size)

    @property
    def drawn(self) -> list[Drawn]:
        """Its objects, as if they had been drawn so."""
        return [Drawn(s.thing, *s.middle, s.size) for s in self.observation.seen]


@dataclass(frozen=True)
class Comparison:
    """Two pictures, and which objects of the one are which of the other.

    Attributes:
        before: The source.
        after: The edit.
        found: For each object of the source what it is in the edit, None if it is gone; and then for each added one.
        extra: What else is in the edit.
    """

    before: Picture
    after: Picture
    found: tuple[Seen | None, ...]
    extra: tuple[Seen, ...]

    @classmethod
    def of(cls, before: Picture, after: Picture, wished: Sequence[Drawn | None] | None = None) -> "Comparison":
        """Finds the objects again: each looks like it did, or as is wished, see `editing.apply`.

        Raises:
            ValueError: if the pictures have different sizes.
        """
        if before.size != after.size:
            sizes = " and ".join(f"{width} x {height}" for width, height in (before.size, after.size))
            raise ValueError(f"a source image and its edit must have the same size, not {sizes} pixels")
        kept = before.drawn
        wished = kept if wished is None else wished
        seen = after.observation.seen
        resemblance = np.zeros((len(wished), len(seen)))
        for i, wish in enumerate(wished):
            for j, other in enumerate(seen):
                # What is wished comes first: of a copied object the one that is in the right place was moved.
                asked = _resemblance(wish, other) if wish is not None else 0.0
                resemblance[i, j] = max(asked, 0.95 * _resemblance(kept[i], other) if i < len(kept) else 0.0)
        rows, columns = optimize.linear_sum_assignment(resemblance, maximize=True)
        pairs = {i: j for i, j in zip(rows, columns, strict=True) if resemblance[i, j] >= _ALIKE}
        found = tuple(seen[pairs[i]] if i in pairs else None for i in range(len(wished)))
        return cls(before, after, found, tuple(s for j, s in enumerate(seen) if j not in pairs.values()))

    @cached_property
    def ground(self) -> float:
        """Mean change of the background's colour, in [0, 1]: of its level and of its stains, not of its noise.

        Only the levels are compared if the two backgrounds have no place in common.
        """
        pictures = (self.before, self.after)
        own = [~_occupied(picture.observation.seen) for picture in pictures]
        if own[0].mean() < _ENOUGH:
            return 0.0  # there was none to keep
        if own[1].mean() < _ENOUGH:
            return 1.0  # it was painted over
        free = own[0] & own[1]
        if free.mean() < _ENOUGH:
            before, after = (np.median(p.pixels[mask], 0) for p, mask in zip(pictures, own, strict=True))
            return float(np.sqrt(((after - before) ** 2).mean()))
        shares = blocks(free[..., None].astype(np.float32))  # of each block that is background
        change = blocks((self.after.pixels - self.before.pixels) * free[..., None]) / shares.clip(1e-6)
        return float(np.sqrt(np.average((change**2).mean(-1, keepdims=True), weights=shares)))

    @property
    def noise(self) -> float:
        """How much noisier the edit is, as a difference of standard deviations."""
        return max(0.0, self.after.observation.noise - self.before.observation.noise)

    def remains(self, source: Seen) -> float:
        """Share in [0, 1] of the place of an object of the source that is not background in the edit, if it is gone."""
        y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
        radius = np.hypot(x - source.middle[0], y - source.middle[1])
        disc = (radius < 0.7 * source.size) & ~_occupied(self.after.observation.seen, 1)
        around = (radius > 1.5 * source.size) & (radius < 2.5 * source.size) & ~_occupied(self.after.observation.seen)
        if not disc.any() or not around.any():
            return 0.0
        smooth = ndimage.uniform_filter(self.after.pixels, (3, 3, 0))
        change = abs(smooth[disc] - np.median(smooth[around], 0)).max(-1) - 1.5 * smooth[around].std(0).max()
        return float(np.clip((change - 0.1) / 0.12, 0, 1).mean())

    def hidden(self, source: Seen, found: Seen | None, covers: Sequence[Seen]) -> bool:
        """Whether all that is missing of an object of the source is behind these objects of the edit."""
        was = _occupied([source], 0) & coloured(self.before.pixels, source.colour)
        missing = was & ~coloured(self.after.pixels, found.colour) if found else was
        behind = missing & _occupied(covers, 1)
        in_place = found is None or lies_in(found, source)
        return in_place and bool(behind.any()) and (missing & ~behind).sum() <= _SLACK * was.sum()

    def clauses(self) -> Iterator[str]:
        """Yields what became of each object of the source, what is new, and what became of the background, in words."""
        for source, found in zip(self.before.observation.seen, self.found, strict=False):
            yield f"{source.thing} {_change(source, found)}"
        yield from (f"{seen.thing} added {seen.where}" for seen in self._new)
        change = max(self.ground, self.noise)
        limits = ((SAME_GROUND, "unchanged"), (0.08, "changed little"), (0.14, "changed some"))
        yield f"background {next((words for limit, words in limits if change < limit), 'redrawn')}"

    def obvious(self) -> Iterator[str]:
        """Yields what each object that changed looks like in each picture."""
        pairs = [*zip(self.before.observation.seen, self.found, strict=False), *((None, seen) for seen in self._new)]
        for source, found in pairs:
            if source is None or _change(source, found) != "kept":
                yield f"image 1 : {source or 'nothing'} ; image 2 : {found or 'nothing'}"

    def detailed(self) -> Iterator[str]:
        """Yields how the number of objects, each of their attributes and the background differ."""
        counts = [len(picture.observation.seen) for picture in (self.before, self.after)]
        yield f"objects : {counts[0]} in image 1 , {counts[1]} in image 2"
        for source, found in zip(self.before.observation.seen, self.found, strict=False):
            if found is None:
                yield f"{source.thing} : only in image 1 , {source.where}"
                continue
            attributes = {
                "colour": (source.colour, found.colour),
                "shape": (source.shape, found.shape),
                "position": (source.where, found.where),
                "size": (round(source.size), round(found.size)),
            }
            said = (f"{name} {'same' if a == b else f'{a} to {b}'}" for name, (a, b) in attributes.items())
            yield f"{source.thing} : {' , '.join(said)}"
        yield from (f"{seen.thing} : only in image 2 , {seen.where}" for seen in self._new)
        yield [*self.clauses()][-1]

    @property
    def _new(self) -> list[Seen]:
        added = self.found[len(self.before.observation.seen) :]
        return [seen for seen in (*added, *self.extra) if seen is not None]


def obvious_differences(before: Picture, after: Picture) -> str:
    """Describes what changed as it looks in each image, one line a subject, without comparing."""
    return "\n".join(f"- {line}" for line in Comparison.of(before, after).obvious()) or "- Nothing has changed."


def detailed_differences(before: Picture, after: Picture) -> str:
    """Compares number, colour, shape, position and size of the objects, and the background, one line each."""
    return "\n".join(f"- {line}" for line in Comparison.of(before, after).detailed())


def lies_in(part: Seen, whole: Seen) -> bool:
    """Whether an object is within the place of another."""
    return not (_occupied([part], 0) & ~_occupied([whole], 1)).any()


def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Returns the distance of two points in pixels."""
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


def _change(source: Seen, found: Seen | None) -> str:
    """Says what became of an object: "recolored blue moved top left", for example, or "kept"."""
    if found is None:
        return "removed"
    words = []
    if source.colour != found.colour and source.shape != found.shape:
        words.append(f"replaced {found.thing}")
    elif source.colour != found.colour:
        words.append(f"recolored {found.colour}")
    elif source.shape != found.shape:
        words.append(f"reshaped {found.shape}")
    if distance(source.middle, found.middle) > 2 * SAME_PLACE:
        words.append(f"moved {found.where}")
    growth = np.log(found.size / source.size)
    if source.shape == found.shape and abs(growth) > 1.5 * SAME_SIZE:
        words.append(f"resized {'bigger' if growth > 0 else 'smaller'}")
    return " ".join(words) or "kept"


def _resemblance(drawn: Drawn, seen: Seen) -> float:
    """In [0, 1], by colour, shape and place."""
    near = max(0.0, 1 - distance((drawn.x, drawn.y), seen.middle) / _REACH)
    return 0.3 * (drawn.thing.colour == seen.colour) + 0.3 * (drawn.thing.shape == seen.shape) + 0.4 * near


def _occupied(objects: Iterable[Seen], margin: int = 2) -> np.ndarray:
    """Where [32, 32] objects are, with a margin in pixels for their soft edges."""
    mask = np.zeros((SIZE, SIZE), bool)
    for seen in objects:
        rows, columns = seen.box
        mask[
            max(0, rows.start - margin) : rows.stop + margin, max(0, columns.start - margin) : columns.stop + margin
        ] = True
    return mask
