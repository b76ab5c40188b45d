"""The teacher: grades pictures from their pixels and answers like a multimodal chat endpoint.

It knows exactly what its pictures show, as a very large model is presumed to for real ones, so curation can use
either. Instruction following is graded as in section 3.2 of the paper (plan, then score), quality in three sub-scores
that never depend on the prompt.
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

from firm.shapes.generation import Wanted, parse
from firm.shapes.scene import Thing
from firm.shapes.vision import Observation, Seen, caption, observe

_EXTRA = 0.2  # credit lost for every object that was not asked for
_RELATION = 0.25  # share of the credit for the relation
_APART = 3.0  # pixels between the centres that make "left of" true


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
        """Answers a request for a plan (no image), for quality ("technical quality" in the text), or for a rating.

        The prompt is between lines `<START OF PROMPT>` and `<END OF PROMPT>`, an evaluator's plan between
        `<START OF PLAN>` and `<END OF PLAN>`. The answer is exact: it does not depend on the sampling arguments.

        Raises:
            ValueError: for missing markers, a prompt that `parse` refuses, or an image that cannot be read.
        """
        text, url = _read(messages)
        observation = None if url is None else _observe(url)
        if observation is not None and "technical quality" in text.lower():
            return json.dumps({"reasoning": caption(observation), "score": list(_quality(observation))})
        prompt = _between(text, "PROMPT")
        if prompt is None:
            raise ValueError("the text has no lines <START OF PROMPT> and <END OF PROMPT> around a prompt")
        wanted = parse(prompt)
        if observation is None:
            sections = (f"## {head}\n" + "".join(f"- {q}\n" for q in qs) for head, qs in _checklist(wanted).items())
            return "\n".join(sections).strip()
        listed = re.findall(r"^\s*[-*]\s+(?:\[.\]\s*)?(.+?)\s*$", _between(text, "PLAN") or "", re.MULTILINE)
        return _evaluate(wanted, observation, listed or plan(prompt))


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


def _between(text: str, name: str) -> str | None:
    match = re.search(rf"^[ \t]*<START OF {name}>[ \t]*\n(.*?)\n[ \t]*<END OF {name}>", text, re.MULTILINE | re.DOTALL)
    return match.group(1).strip() if match else None


def _read(messages: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Returns the text of all messages except the assistant's, and the URL of the image if there is one."""
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
    if len(urls) > 1:
        raise ValueError(f"the teacher of the shapes world judges one image, not {len(urls)}")
    return "\n".join(texts), urls[0] if urls else None


@lru_cache(maxsize=256)
def _observe(url: str) -> Observation:
    """What is seen in an image, remembered because it is judged on several dimensions, one after the other."""
    return observe(_decode(url))


def _decode(url: str) -> Image.Image:
    header, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", header):
        raise ValueError(f"the image must be a data URL (data:image/png;base64,...), not {url[:40]!r}")
    try:
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
    except Exception as error:  # PIL raises many kinds of errors; the sender gets one kind
        raise ValueError(f"the image cannot be decoded: {error}") from error
