"""The teacher: grades pictures from their pixels and answers like a multimodal chat endpoint.

It knows exactly what its pictures show, as a very large model is presumed to for real ones, so curation can use
either. Instruction following is graded as in section 3.2 of the paper (plan, then score), quality in three sub-scores
that never depend on the prompt. How edits are judged is in `edit_teacher`.
"""

import base64
import io
import json
import re
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image

from firm.shapes.comparison import Picture, detailed_differences, obvious_differences
from firm.shapes.edit_teacher import Edit, degree
from firm.shapes.generation import Wanted, parse
from firm.shapes.scene import Thing
from firm.shapes.vision import Observation, Seen, caption, observe

_EXTRA = 0.2  # credit lost for every object that was not asked for
_RELATION = 0.25  # share of the credit for the relation
_APART = 3.0  # pixels between the centres that make "left of" true
_SECTION = re.compile(
    r"^[ \t]*<START OF (?P<name>[A-Z ]+)>[ \t]*\n(?P<content>.*?)\n[ \t]*<END OF (?P=name)>", re.MULTILINE | re.DOTALL
)
_ABOUT_EDITS = (
    "obvious differences", "detailed differences", "execution score", "consistency score", "rewrite the instruction",
)  # fmt: skip


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
    """The teacher behind the messages of the OpenAI chat protocol; it sees nothing else."""

    def complete(
        self,
        messages: list[dict[str, Any]],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """Answers what the text asks for, about no image, one, or two: a source and its edit.

        Without an image that is a plan; about one, its quality ("technical quality" in the text) or a rating; about
        two, the "obvious differences" or "detailed differences", the "execution score" or "consistency score", or
        "rewrite the instruction". The prompt is between lines `<START OF PROMPT>` and `<END OF PROMPT>`, and so are an
        evaluator's PLAN and the INSTRUCTION of an edit. Answers are exact: they do not depend on the sampling
        arguments, except that another seed gives another rewritten instruction.

        Raises:
            ValueError: for missing markers, a prompt or instruction that cannot be parsed or does not fit the source,
                or images that cannot be read or differ in size.
        """
        text, urls = _read(messages)
        sections = {match["name"]: match["content"].strip() for match in _SECTION.finditer(text)}
        asked = _SECTION.sub("", text).lower()
        pictures = [_look(url) for url in urls]
        if question := next((q for q in _ABOUT_EDITS if q in asked), None):
            return _answer_about_edit(question, sections, pictures, seed or 0)
        if len(pictures) > 1:
            raise ValueError(f"the teacher rates one image, and of two it must be asked for {', '.join(_ABOUT_EDITS)}")
        observation = pictures[0].observation if pictures else None
        if observation is not None and "technical quality" in asked:
            return json.dumps({"reasoning": caption(observation), "score": list(_quality(observation))})
        prompt = _get(sections, "PROMPT")
        wanted = parse(prompt)
        if observation is None:
            parts = (f"## {head}\n" + "".join(f"- {q}\n" for q in qs) for head, qs in _checklist(wanted).items())
            return "\n".join(parts).strip()
        listed = re.findall(r"^\s*[-*]\s+(?:\[.\]\s*)?(.+?)\s*$", sections.get("PLAN", ""), re.MULTILINE)
        return _evaluate(wanted, observation, listed or plan(prompt))


def _answer_about_edit(question: str, sections: dict[str, str], pictures: list[Picture], seed: int) -> str:
    if len(pictures) != 2:
        raise ValueError(f"an edit is a source image and an edited one, not {len(pictures)} image(s)")
    before, after = pictures
    if question == "obvious differences":
        return obvious_differences(before, after)
    if question == "detailed differences":
        return detailed_differences(before, after)
    edit = Edit.of(_get(sections, "INSTRUCTION"), before, after)
    if question == "rewrite the instruction":
        return json.dumps({"reasoning": edit.evidence(), "instruction": edit.rewritten(np.random.default_rng(seed))})
    score = edit.execution if question == "execution score" else edit.consistency
    return json.dumps({"reasoning": edit.evidence(), "score": [score]})


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
    return round(5 - 4 * degree(badness, good, bad))


def _quality(observation: Observation) -> tuple[int, int, int]:
    o = observation
    aesthetics = min(_grade(o.stain, 0.015, 0.09), _grade(o.impurity, 0.11, 0.22))
    technical = min(_grade(o.noise, 0.035, 0.12), _grade(o.murk, 0.04, 0.3))
    if not o.seen:  # an empty picture may be even and noiseless, but shows nothing of value
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
    checklist = _checklist(wanted)
    _, pairs = _match(wanted, observation)
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


def _get(sections: dict[str, str], name: str) -> str:
    if name not in sections:
        raise ValueError(f"the text has no lines <START OF {name}> and <END OF {name}>, with one between them")
    return sections[name]


def _read(messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Returns the text of all messages except the assistant's, and the URLs of the images: at most two."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of objects with 'role' and 'content'")
    texts: list[str] = []
    urls: list[str] = []
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
    if len(urls) > 2:
        raise ValueError(f"the teacher of the shapes world judges one image or two, not {len(urls)}")
    return "\n".join(texts), urls


@lru_cache(maxsize=256)
def _look(url: str) -> Picture:
    """What is seen in an image, remembered because it is judged on several dimensions, one after the other."""
    return Picture.of(_decode(url))


def _decode(url: str) -> Image.Image:
    header, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", header):
        raise ValueError(f"the image must be a data URL (data:image/png;base64,...), not {url[:40]!r}")
    try:
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
    except Exception as error:  # PIL raises many kinds of errors; the sender gets one kind
        raise ValueError(f"the image cannot be decoded: {error}") from error
