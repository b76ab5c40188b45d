"""The teacher: reads pictures of the shapes world pixel by pixel and answers like a multimodal chat endpoint.

It knows the truth of its world as a very large model is presumed to know the truth of ours, so curation can use the
one or the other. Instruction following is graded as in section 3.2 of the paper (plan, then score), quality in three
sub-scores that never depend on the prompt.
"""

import base64
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from firm.shapes.world import COLOURS, SHAPES, SIZE, Thing, Wanted, parse

VOCABULARY = (
    *COLOURS, *SHAPES, "blob", "clear", "fair", "rough", "top", "middle", "bottom", "left", "center", "right",
    ";", "nothing",
)  # fmt: skip
"""Every word a caption can hold."""

_PALETTE = np.array(list(COLOURS.values()), np.float32)  # [4, 3]
_NEAR = 0.30  # a pixel within this distance of a palette colour has that colour
_MIN_AREA = 14  # pixels; smaller specks are not seen
_MAX_SEEN = 5  # of a noisy picture only the largest specks are told
_EXTRA = 0.2  # credit lost for every object nobody asked for
_RELATION = 0.25  # share of the credit for the relation
_APART = 3.0  # pixels between the centres that make "left of" true


@dataclass(frozen=True)
class Seen:
    """One object in a picture: centre in pixels, `clearness` of its shape in [0, 1]; the shape may be "blob"."""

    colour: str
    shape: str
    clearness: float
    x: float
    y: float

    @property
    def where(self) -> str:
        """The cell of a 3 x 3 grid it lies in, such as "top left"."""
        return f"{('top', 'middle', 'bottom')[_third(self.y)]} {('left', 'center', 'right')[_third(self.x)]}"

    def __str__(self) -> str:
        if self.shape == "blob":
            return f"{self.colour} blob {self.where}"
        word = "clear" if self.clearness > 0.8 else "fair" if self.clearness > 0.5 else "rough"
        return f"{self.colour} {word} {self.shape} {self.where}"


@dataclass(frozen=True)
class Observation:
    """What the teacher sees in a picture.

    `seen` is in scan order. `noise` and `stain` are the standard deviations of the background between neighbouring
    pixels and between regions, `murk` the share of unclear pixels around the objects, `impurity` the mean distance of
    the objects' colour to the palette; all in [0, 1], and `murk` may be larger in noise.
    """

    seen: tuple[Seen, ...]
    noise: float
    stain: float
    murk: float
    impurity: float


def observe(image: Image.Image) -> Observation:
    """Finds the objects of a picture (any size and mode) and measures how clean it is; about half a millisecond."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32) / 255
    distance = np.sqrt(((pixels[..., None, :] - _PALETTE) ** 2).sum(-1))  # [32, 32, 4]
    nearest, nearness = distance.argmin(-1), distance.min(-1)
    near = nearness < _NEAR
    found: list[tuple[int, Seen]] = []
    solid = np.zeros_like(near)
    for index, colour in enumerate(COLOURS):
        mask = near & (nearest == index)
        if mask.sum() < _MIN_AREA:
            continue
        labels, _ = ndimage.label(mask)
        areas = np.bincount(labels.ravel())
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if areas[label] >= _MIN_AREA:
                part = labels[box] == label
                solid[box] |= part
                found.append((int(areas[label]), _recognise(colour, part, box)))
    found = sorted(found, key=lambda item: -item[0])[:_MAX_SEEN]
    seen = sorted((item[1] for item in found), key=lambda s: (_third(s.y), s.x))
    return Observation(tuple(seen), *_cleanness(pixels, solid, nearness))


def caption(observation: Observation) -> str:
    """Tells what was seen in scan order, e.g. "red clear circle top left ; blue blob middle right", or "nothing"."""
    return " ; ".join(map(str, observation.seen)) or "nothing"


def plan(prompt: str) -> list[str]:
    """Returns the checklist of verifiable questions for a prompt; raises ValueError where `parse` does."""
    return [question for questions in _checklist(parse(prompt)).values() for question in questions]


def instruction_following(prompt: str, image: Image.Image) -> int:
    """Scores from 1 to 5 how well the picture shows what the prompt asks for; raises ValueError where `parse` does."""
    return _score(parse(prompt), observe(image))


def quality(image: Image.Image) -> tuple[int, int, int]:
    """Scores aesthetics, technical quality, and structure & texture of a picture, each from 1 to 5."""
    return _quality(observe(image))


class PixelTeacher:
    """The teacher behind the messages of the OpenAI chat protocol; it sees nothing but them."""

    def complete(
        self,
        messages: list[dict[str, Any]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """Answers a request for a plan (no image), for quality ("technical quality" in the text), or for a rating.

        The prompt stands between lines `<START OF PROMPT>` and `<END OF PROMPT>`, an evaluator's plan between
        `<START OF PLAN>` and `<END OF PLAN>`. The answer is exact: it does not depend on the sampling arguments.

        Raises:
            ValueError: for missing markers, a prompt the world does not know, or an image that cannot be read.
        """
        text, image = _read(messages)
        if image is not None and "technical quality" in text.lower():
            observation = observe(image)
            return json.dumps({"reasoning": caption(observation), "score": list(_quality(observation))})
        prompt = _between(text, "PROMPT")
        if prompt is None:
            raise ValueError("the text holds no lines <START OF PROMPT> and <END OF PROMPT> around a prompt")
        wanted = parse(prompt)
        if image is None:
            sections = (f"## {head}\n" + "".join(f"- {q}\n" for q in qs) for head, qs in _checklist(wanted).items())
            return "\n".join(sections).strip()
        listed = re.findall(r"^\s*[-*]\s+(?:\[.\]\s*)?(.+?)\s*$", _between(text, "PLAN") or "", re.MULTILINE)
        return _evaluate(wanted, observe(image), listed or plan(prompt))


def _third(position: float) -> int:
    return min(2, int(3 * position / SIZE))


@cache
def _templates(height: int, width: int) -> np.ndarray:
    """The three shapes [3, height, width] filling a bounding box."""
    v = ((np.arange(height) + 0.5) * 2 / height - 1)[:, None]
    u = ((np.arange(width) + 0.5) * 2 / width - 1)[None]
    triangle = abs(u) <= (v + 1) / 2 + 1 / width
    return np.stack([u**2 + v**2 <= 1, np.ones((height, width), bool), triangle])


def _recognise(colour: str, part: np.ndarray, box: tuple[slice, slice]) -> Seen:
    """Names the shape that overlaps best with a part of the picture [height, width]."""
    height, width = part.shape
    templates = _templates(height, width)
    union = (templates | part).sum((1, 2))
    overlap = (templates & part).sum((1, 2)) / union
    best = int(overlap.argmax())
    stretch = max(width / height, height / width)
    # Graded on purpose: a cliff at some overlap is what a small critic cannot see.
    clearness = np.clip((overlap[best] - 0.55) / 0.33, 0, 1) * np.clip((1.9 - stretch) / 0.4, 0, 1)
    ys, xs = part.nonzero()
    x, y = xs.mean() + 0.5 + box[1].start, ys.mean() + 0.5 + box[0].start
    shape = SHAPES[best] if clearness > 0.25 else "blob"
    return Seen(colour, shape, float(clearness), float(x), float(y))


def _cleanness(pixels: np.ndarray, solid: np.ndarray, nearness: np.ndarray) -> tuple[float, float, float, float]:
    """Measures noise, stain, murk and impurity, see `Observation`."""
    around = ndimage.binary_dilation(solid, iterations=3)
    ground = pixels[~around]  # [N, 3]
    level = np.median(ground, 0) if len(ground) else np.full(3, 0.5, np.float32)
    flat = np.where(around[..., None], level, pixels)
    pairs = ~(around[:, 1:] | around[:, :-1])
    steps = (pixels[:, 1:] - pixels[:, :-1])[pairs]
    noise = float(steps.std() / 2**0.5) if len(steps) else 0.0
    regions = flat.reshape(8, SIZE // 8, 8, SIZE // 8, 3).mean((1, 3))
    stain = float(np.sqrt(((regions - level) ** 2).mean()))
    # The first pixel outside an object may be half covered by its edge; what is unclear beyond it is blur or smear.
    beyond = around & ~ndimage.binary_dilation(solid)
    unclear = beyond & (nearness > _NEAR) & (np.sqrt(((pixels - level) ** 2).sum(-1)) > 0.12 + 2.5 * noise)
    murk = float(unclear.sum() / max(solid.sum(), 1))
    impurity = float(nearness[solid].mean()) if solid.any() else 1.0
    return noise, stain, murk, impurity


def _match(wanted: Wanted, observation: Observation) -> tuple[float, list[tuple[Seen | None, float]]]:
    """Pairs wanted with seen objects for the most credit; returns the total in [0, 1] and each object's pair."""
    seen: list[Seen | None] = [*observation.seen, *[None] * len(wanted.objects)]
    best: tuple[float, list[tuple[Seen | None, float]]] = (-1.0, [])
    for chosen in permutations(seen, len(wanted.objects)):
        pairs = [(s, _credit(o, s)) for o, s in zip(wanted.objects, chosen, strict=True)]
        pairs = [(s, c) if c else (None, 0.0) for s, c in pairs]
        total = sum(c for _, c in pairs) / len(pairs)
        if wanted.relation == "left of":
            total = (1 - _RELATION) * total + _RELATION * _left_of(pairs)
        total -= _EXTRA * (len(observation.seen) - sum(s is not None for s, _ in pairs))
        if total > best[0]:
            best = (total, pairs)
    return max(best[0], 0.0), best[1]


def _credit(wanted: Thing, seen: Seen | None) -> float:
    if seen is None:
        return 0.0
    return 0.4 * (seen.colour == wanted.colour) + 0.6 * seen.clearness * (seen.shape == wanted.shape)


def _left_of(pairs: list[tuple[Seen | None, float]]) -> bool:
    (a, _), (b, _) = pairs
    return a is not None and b is not None and a.x + _APART <= b.x


def _score(wanted: Wanted, observation: Observation) -> int:
    return round(1 + 4 * _match(wanted, observation)[0])


def _grade(badness: float, good: float, bad: float) -> int:
    """Maps a measure to 5 at `good` or below, to 1 at `bad` or above, and linearly between."""
    return round(5 - 4 * float(np.clip((badness - good) / (bad - good), 0, 1)))


def _quality(observation: Observation) -> tuple[int, int, int]:
    o = observation
    aesthetics = min(_grade(o.stain, 0.015, 0.09), _grade(o.impurity, 0.11, 0.22))
    technical = min(_grade(o.noise, 0.035, 0.12), _grade(o.murk, 0.04, 0.3))
    if not o.seen:  # an empty picture may be even and noiseless, but there is nothing to like in it
        return min(aesthetics, 2), min(technical, 2), 1
    shapes = sum(s.clearness for s in o.seen) / len(o.seen)
    return aesthetics, technical, _grade(1 - shapes, 0.1, 0.9)


def _checklist(wanted: Wanted) -> dict[str, list[str]]:
    """The questions under their headings; `_answers` answers each."""
    things = wanted.objects
    count = "one object" if len(things) == 1 else "two objects"
    composition = [f"Is the {things[0]} left of the {things[1]}?"] if wanted.relation == "left of" else []
    return {
        "Main subject": [f"Is there a {thing}?" for thing in things],
        "Attribute": [f"Is the outline of the {thing} clear?" for thing in things],
        "Composition": [*composition, f"Is there nothing but {count}?"],
    }


def _evaluate(wanted: Wanted, observation: Observation, questions: list[str]) -> str:
    answers = _answers(wanted, observation)
    lines = [f"{n}. {q} {answers.get(q, 'Cannot tell.')}" for n, q in enumerate(questions, start=1)]
    score = _score(wanted, observation)
    verdict = f"Final Analysis: {caption(observation)}\n\nFinal Alignment Rating: {score}\n\\boxed{{{score}}}"
    return "\n".join(lines) + "\n\n" + verdict


def _answers(wanted: Wanted, observation: Observation) -> dict[str, str]:
    """Answers every question of the plan."""
    checklist, (_, pairs) = _checklist(wanted), _match(wanted, observation)
    answers = {}
    for thing, (seen, _), exists, clear in zip(
        wanted.objects, pairs, checklist["Main subject"], checklist["Attribute"], strict=True
    ):
        there = seen is not None and (seen.colour, seen.shape) == (thing.colour, thing.shape)
        answers[exists] = f"Yes, {seen}." if there else f"No, {seen or 'there is none'}."
        answers[clear] = f"Yes, {seen}." if there and seen and seen.clearness > 0.8 else "No."
    *relation, only = checklist["Composition"]
    answers |= {question: "Yes." if _left_of(pairs) else "No." for question in relation}
    answers[only] = "Yes." if len(observation.seen) == len(wanted.objects) else f"No, I see {len(observation.seen)}."
    return answers


def _between(text: str, name: str) -> str | None:
    match = re.search(rf"^[ \t]*<START OF {name}>[ \t]*\n(.*?)\n[ \t]*<END OF {name}>", text, re.MULTILINE | re.DOTALL)
    return match.group(1).strip() if match else None


def _read(messages: list[dict[str, Any]]) -> tuple[str, Image.Image | None]:
    """Returns the text of all messages but the assistant's, and the image if there is one."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of objects with 'role' and 'content'")
    texts, urls = [], []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or message.get("role") == "assistant":
            continue
        for part in parts:
            match part:
                case {"type": "text", "text": str(text)}:
                    texts.append(text)
                case {"type": "image_url", "image_url": {"url": str(url)}}:
                    urls.append(url)
                case _:
                    raise ValueError(f"a content part must be a text or an image_url, not {str(part)[:80]!r}")
    if len(urls) > 1:
        raise ValueError(f"the teacher of the shapes world judges one image, not {len(urls)}")
    return "\n".join(texts), _decode(urls[0]) if urls else None


def _decode(url: str) -> Image.Image:
    header, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", header):
        raise ValueError(f"the image must be a data URL (data:image/png;base64,...), not {url[:40]!r}")
    try:
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
    except Exception as error:  # whatever PIL raises for whatever bytes: the sender must hear it as one kind of error
        raise ValueError(f"the image cannot be decoded: {error}") from error
