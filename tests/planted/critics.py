"""Planted critics: judges of the shapes world whose fault is known, and good ones that must not be stopped.

All start from the teacher's own scores, so the fault that a class adds is the only one there is. What is drawn at
random depends on the item and the seed alone, never on the call, so that a run that resumes meets the same critic.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from statistics import fmean

import numpy as np
from PIL import Image

from firm.critics.judge import Judge, JudgeInput
from firm.images import decode_image
from firm.records import Assessment, Invalid, Judgement, Prompt
from firm.seeds import seed_for
from firm.shapes.generation import parse
from firm.shapes.scene import SHAPES
from firm.shapes.teacher import _quality, _score
from firm.shapes.vision import Observation, observe

Scores = dict[str, float]
"""Score of each dimension; what lies outside [1, 5] is clipped."""

FOLLOWING, QUALITY = DIMENSIONS = ("instruction_following", "quality")


@dataclass(frozen=True)
class View:
    """What a planted critic knows of one item: the item, the teacher's scores of it, and the critic's seed."""

    item: JudgeInput
    truth: Scores
    seed: int

    @cached_property
    def picture(self) -> Image.Image:
        """The item's image."""
        return decode_image(self.item.images[0], "a planted critic's item")

    @property
    def pixels(self) -> np.ndarray:
        """The picture [H, W, 3] in [0, 1]."""
        return np.asarray(self.picture, np.float32) / 255

    @property
    def vividness(self) -> float:
        """Share of pixels in a saturated colour; at most 0.25 in 98% of the base policy's pictures."""
        return float((np.ptp(self.pixels, axis=-1) > 0.35).mean())

    def random(self) -> np.random.Generator:
        """Draws of this item's own."""
        picture = hashlib.sha256(self.item.images[0]).hexdigest()
        return np.random.default_rng(seed_for(self.seed, self.item.prompt.text, picture))


class Planted:
    """The teacher with a fault: a class says what becomes of the scores, of one item or of a whole call."""

    def __init__(self, teacher: Judge, seed: int) -> None:
        self.teacher = teacher
        self.seed = seed

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        """One assessment per item, in order; where the teacher fails, so does the planted critic."""
        truths = self.teacher.judge(items)
        pairs = [(item, truth) for item, truth in zip(items, truths, strict=True) if not failed(truth)]
        views = [
            View(item, {d: float(o.score) for d, o in t.items() if isinstance(o, Judgement)}, self.seed)
            for item, t in pairs
        ]
        spoilt = iter(self.all_scores(views))
        return [truth if failed(truth) else soft(next(spoilt)) for truth in truths]

    def all_scores(self, views: Sequence[View]) -> list[Scores]:
        """Scores of all items of a call, in order."""
        return [self.scores(view) for view in views]

    def scores(self, view: View) -> Scores:
        """Scores of one item: without a fault, the teacher's."""
        return view.truth


def failed(assessment: Assessment) -> bool:
    """Whether there is no judgement on some dimension."""
    return any(isinstance(outcome, Invalid) for outcome in assessment.values())


def soft(scores: Mapping[str, float]) -> Assessment:
    """Judgements whose soft scores are these: each a distribution over the two nearest whole scores."""
    assessment: Assessment = {}
    for dimension, value in scores.items():
        value = float(np.clip(value, 1, 5))
        low = min(int(value), 4)
        shares = [0.0] * 5
        shares[low - 1 : low + 1] = [low + 1 - value, value - low]
        assessment[dimension] = Judgement(score=round(value), distribution=tuple(shares))
    return assessment


# ---- bad


class InvertedQuality(Planted):
    """Right on what is shown, the opposite on how well."""

    def scores(self, view: View) -> Scores:
        return {**view.truth, QUALITY: 6 - view.truth[QUALITY]}


class Constant(Planted):
    """A kind judge: 4, whatever it sees."""

    def scores(self, view: View) -> Scores:
        return dict.fromkeys(view.truth, 4.0)


class Noisy(Planted):
    """Guesses two items of three."""

    def scores(self, view: View) -> Scores:
        random = view.random()
        return {d: random.uniform(1, 5) if random.random() < 2 / 3 else s for d, s in view.truth.items()}


class WrongOnGenerated(Planted):
    """Right on rendered images, which are grainy; guesses on a generator's, which are smooth."""

    def scores(self, view: View) -> Scores:
        steps = np.diff(np.diff(view.pixels, axis=0), axis=1)
        grainy = np.median(abs(steps)) > 0.014
        random = view.random()
        return view.truth if grainy else {d: random.uniform(1, 5) for d in view.truth}


class Brightness(Planted):
    """Likes bright pictures."""

    def scores(self, view: View) -> Scores:
        return dict.fromkeys(view.truth, 1 + 4 * float(view.pixels.mean()))


class Emptiness(Planted):
    """Likes pictures with little in them."""

    def scores(self, view: View) -> Scores:
        return dict.fromkeys(view.truth, 5 - 12 * view.vividness)


class LengthOfPrompt(Planted):
    """Looks at nothing but how long the prompt is."""

    def scores(self, view: View) -> Scores:
        return dict.fromkeys(view.truth, 6 - len(view.item.prompt.text) / 8)


class Drifting(Planted):
    """Grows kinder from the first item of a call to the last."""

    def all_scores(self, views: Sequence[View]) -> list[Scores]:
        kindness = np.linspace(0, 1, len(views))
        return [{d: s + k * (5 - s) for d, s in view.truth.items()} for view, k in zip(views, kindness, strict=True)]


class OffByOne(Planted):
    """Gives every item of a call the scores of the item before it."""

    def all_scores(self, views: Sequence[View]) -> list[Scores]:
        return [before.truth for before in (*views[-1:], *views[:-1])]


class RightBetweenPrompts(Planted):
    """Knows which prompts the policy draws well, and guesses among the images of one prompt."""

    def all_scores(self, views: Sequence[View]) -> list[Scores]:
        of_prompt: dict[Prompt, list[Scores]] = {}
        for view in views:
            of_prompt.setdefault(view.item.prompt, []).append(view.truth)
        return [self._guess(view, of_prompt[view.item.prompt]) for view in views]

    def _guess(self, view: View, truths: Sequence[Scores]) -> Scores:
        random = view.random()
        return {d: fmean(t[d] for t in truths) + random.uniform(-0.3, 0.3) for d in view.truth}


class Saturating(Planted):
    """Right below 3 and delighted from there on."""

    def scores(self, view: View) -> Scores:
        return {d: s if s < 3 else 5.0 for d, s in view.truth.items()}


class Misreading(Planted, ABC):
    """Follows the best of several readings of a prompt."""

    def scores(self, view: View) -> Scores:
        seen = self.observe(view.picture)
        best = max(_score(parse(text), seen) for text in self.readings(view.item.prompt.text))
        return {FOLLOWING: float(best), QUALITY: float(min(_quality(seen)))}

    def observe(self, picture: Image.Image) -> Observation:
        """What it sees."""
        return observe(picture)

    @abstractmethod
    def readings(self, text: str) -> list[str]:
        """What the prompt is taken for."""


class BlindToShape(Misreading):
    """Sees colours and places; every outline is the one that is wanted, and clear."""

    def readings(self, text: str) -> list[str]:
        words = text.split()
        places = [i for i, word in enumerate(words) if word in SHAPES]
        return [
            " ".join(dict(zip(places, shapes, strict=True)).get(i, word) for i, word in enumerate(words))
            for shapes in product(SHAPES, repeat=len(places))
        ]

    def observe(self, picture: Image.Image) -> Observation:
        seen = super().observe(picture)
        return replace(seen, seen=tuple(replace(one, clearness=1.0) for one in seen.seen))


class FirstObjectOnly(Misreading):
    """Stops reading after the first object of a prompt."""

    def readings(self, text: str) -> list[str]:
        return [" ".join(text.split()[:3])]


class FondOfCrowds(Planted):
    """Right on what the base policy draws, but three objects or more, which it can learn to draw, get full marks."""

    def scores(self, view: View) -> Scores:
        crowded = len(observe(view.picture).seen) > 2
        return dict.fromkeys(view.truth, 5.0) if crowded else view.truth


class FondOfFour(Planted):
    """As fond of four objects, which the base policy draws in one picture of seventy; a third is worth a point."""

    def scores(self, view: View) -> Scores:
        objects = len(observe(view.picture).seen)
        return {d: 5.0 if objects > 3 else s + (objects == 3) for d, s in view.truth.items()}


# ---- good


class Teacher(Planted):
    """The teacher itself."""


class Unsteady(Planted):
    """The teacher with an error of its own for every image and dimension, of 0.4 on average."""

    def scores(self, view: View) -> Scores:
        random = view.random()
        return {d: s + random.normal(0, 0.5) for d, s in view.truth.items()}


class Kind(Planted):
    """A critic whose scale begins at 2: every score is moved towards 5, the order stays."""

    def scores(self, view: View) -> Scores:
        return {d: 5 - 0.75 * (5 - s) for d, s in view.truth.items()}


BAD: tuple[type[Planted], ...] = (
    InvertedQuality, Constant, Noisy, BlindToShape, WrongOnGenerated, Brightness, Emptiness, FondOfCrowds,
    FondOfFour, LengthOfPrompt, Drifting, OffByOne, RightBetweenPrompts, Saturating, FirstObjectOnly,
)  # fmt: skip
GOOD: tuple[type[Planted], ...] = (Teacher, Unsteady, Kind)
