r"""From a judge's text to a `Judgement` or an explicit `Invalid`, and back for training answers.

Pure functions that never raise for any text. Anything but a whole number from 1 to 5 is never turned into one: a
fractional score such as 4.7 is ``unparsable`` (every rubric asks for whole numbers, so the judge did not follow it and
is asked again), not 4 and not 5. Where an answer holds several scores the last one counts, as it is the conclusion.

Formats (paper section 3.2, appendix D): ``boxed`` is free text that ends in ``\boxed{N}``; ``json`` is an object with
``reasoning`` and ``score``; ``score`` is free text that ends in ``Score: N``, for critics that know few words. The
``score_first`` style, whatever the format, is ``Score: N``, a line break and the rationale, so that the
score can be read from the first tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from firm.chat.messages import valid_unicode
from firm.critics.verdict import OF_FIVE, ends_line, leads, number, stands_alone
from firm.records import Invalid, Judgement

SCORE_PREFIX = "Score:"
MAX_CHARS = 50_000
"""Only the end of a longer answer is read, which bounds the time that a runaway answer can take."""

AnswerStyle = Literal["score_first", "reason_first"]
ScoreFormat = Literal["boxed", "json", "score"]

_TOKEN = rf"[\s*_]{{0,8}}:[\s*_]{{0,8}}(\S{{1,80}}(?:{OF_FIVE})?)"
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathbf|mathrm)\s*\{)?([^{}]{0,80})\}")
_RATING = re.compile(rf"(?:final alignment rating|\bscore){_TOKEN}", re.IGNORECASE)
_SCORE_LAST = re.compile(rf"\bscore{_TOKEN}\s*\Z", re.IGNORECASE)
_SCORE_FIRST = re.compile(rf"\s*[*_]{{0,4}}score{_TOKEN}", re.IGNORECASE)
_RATING_AT_END = re.compile(r"[*_#]{0,4}\s{0,4}final alignment rating[\s*_]{0,8}:[^\n]{0,80}\s*\Z", re.IGNORECASE)
_FINAL_ANALYSIS = re.compile(r"final analysis[\s*_]{0,8}:[*_]{0,4}", re.IGNORECASE)
_BEFORE_FIRST = re.compile(r"\A\s*[*_]{0,4}score[\s*_]{0,8}:[\s*_]{0,8}\Z", re.IGNORECASE)
_BEFORE_RATING = re.compile(r"final alignment rating[\s*_]{0,8}:[\s*_]{0,8}\Z", re.IGNORECASE)
_BEFORE_SCORE = re.compile(r"\bscore[\s*_]{0,8}:[\s*_]{0,8}\Z", re.IGNORECASE)
_BEFORE_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathbf|mathrm)\s*\{)?\s*\Z")
_BEFORE_JSON = re.compile(r'"score"\s*:\s*(?:\[\s*(?:[1-5]\s*,\s*){0,2})?\Z')
_BEFORE = {
    "boxed": (_BEFORE_RATING, _BEFORE_BOXED, _BEFORE_SCORE),
    "json": (_BEFORE_JSON,),
    "score": (_BEFORE_SCORE,),
    "score_first": (_BEFORE_FIRST,),
}
_NEARBY = 200  # characters before a digit that say what it is
_OBJECT = re.compile(r'\{\s*"')
_RATING_LINE = re.compile(rf"final alignment rating{_TOKEN}(?=[*_ \t]{{0,8}}\n)", re.IGNORECASE)
_THOUGHTS_BEGIN = re.compile(r"<\s*(?:think|thinking|thoughts?)\s*>|\[think\]|◁think▷", re.IGNORECASE)
_THOUGHTS_END = re.compile(r"<\s*/\s*(?:think|thinking|thoughts?)\s*>|\[/think\]|◁/think▷", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:[-*+]|[0-9]{1,3}[.)])\s+(?:\[[ xX]?\]\s*)?(.+)")
_MARKUP = " \t#*_`-+"


def _excerpt(text: str, length: int = 160) -> str:
    """The end of a text on one line: the score is expected there."""
    flat = " ".join(text[-4 * length :].split())
    return flat if len(flat) <= length else "..." + flat[-length:]


def _judgement(value: float | None, rationale: str, text: str) -> Judgement | Invalid:
    if value is None:
        return Invalid(reason="unparsable", detail=_excerpt(text))
    if not math.isfinite(value):
        return Invalid(reason="non_finite", detail=str(value))
    if not 1 <= value <= 5:
        return Invalid(reason="out_of_range", detail=f"{value:g}")
    if not value.is_integer():
        return Invalid(reason="unparsable", detail=f"a fractional score: {value:g}")
    return Judgement(score=int(value), rationale=rationale.strip())


def _no_score(text: str, truncated: bool) -> Invalid:
    return Invalid(reason="truncated" if truncated else "unparsable", detail=_excerpt(text))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def without_thoughts(text: str) -> str:
    """What is said behind the last thinking block; nothing where the block was not closed: thoughts are no answer."""
    end = _last(_THOUGHTS_END, text)
    answer = text[end.end() :] if end else text
    begin = _THOUGHTS_BEGIN.search(answer)
    return answer[: begin.start()] if begin else answer


def _parse_boxed(text: str, truncated: bool) -> Judgement | Invalid:
    # Cut off in its analysis, a text may speak of scores that are not its verdict; so may a sentence about a rating.
    match = _last(_BOXED, text)
    concludes = match is not None
    if match is None:
        match = _last(_RATING_LINE if truncated else _RATING, text)
        concludes = match is not None and (leads(text, match.start()) or ends_line(text, match.end()))
    if match is None or not concludes or (truncated and not leads(text, match.start())):
        return _no_score(text, truncated)
    return _read(text, match, _RATING_AT_END.sub("", text[: match.start()]), truncated)


def _parse_score(text: str, truncated: bool) -> Judgement | Invalid:
    match = None if truncated else _SCORE_LAST.search(text.rstrip())
    return _read(text, match, text[: match.start()], truncated) if match else _no_score(text, truncated)


def _read(text: str, match: re.Match[str], rationale: str, truncated: bool) -> Judgement | Invalid:
    """The number that a pattern found, where it stands alone."""
    if not stands_alone(text, *match.span()):
        return _no_score(text, truncated)
    return _judgement(number(match[1]), rationale, text)


def _json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Outermost JSON objects in a text, each with its span; braces in prose are stepped over."""
    decoder = json.JSONDecoder(strict=False)  # judges write raw line breaks in strings
    match = _OBJECT.search(text)
    while match:
        try:
            value, end = decoder.raw_decode(text, match.start())
            # Escapes in strings can be half a surrogate pair, though the text itself has none.
            value = json.loads(valid_unicode(json.dumps(value, ensure_ascii=False)))
        except (ValueError, RecursionError):
            end = match.start() + 1
        else:
            yield value, match.start(), end
        match = _OBJECT.search(text, end)


def _json_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return number(value) if isinstance(value, str) else None


def _json_scores(value: Any) -> list[float] | None:
    """A number, or a list of one number or of the three sub-scores of quality."""
    numbers = [_json_number(v) for v in (value if isinstance(value, list) else [value])]
    present = [n for n in numbers if n is not None]
    return present if len(numbers) in (1, 3) and len(present) == len(numbers) else None


def _parse_json(text: str, truncated: bool) -> Judgement | Invalid:
    found = None
    for value, start, end in _json_objects(text):
        if "score" in value:
            verdict = stands_alone(text, start, end) and (not truncated or leads(text, start))
            found = value if verdict else None
    if found is None:
        return _no_score(text, truncated)
    reasoning = found.get("reasoning")
    rationale = reasoning if isinstance(reasoning, str) else ""
    scores = _json_scores(found["score"])
    if scores is None:
        return _judgement(None, rationale, text)
    # A sub-score that is no valid score spoils the answer, even where it is not the lowest.
    spoilt = (n for n in scores if not (1 <= n <= 5 and n.is_integer()))
    outcome = _judgement(next(spoilt, min(scores)), rationale, text)
    several = isinstance(outcome, Judgement) and len(scores) > 1
    return outcome.model_copy(update={"parts": tuple(int(n) for n in scores)}) if several else outcome


_PARSERS: dict[ScoreFormat, Callable[[str, bool], Judgement | Invalid]] = {
    "boxed": _parse_boxed,
    "json": _parse_json,
    "score": _parse_score,
}


def parse_answer(text: str, answer: ScoreFormat, truncated: bool = False) -> Judgement | Invalid:
    r"""Read a judge's answer.

    ``boxed``: the last ``\boxed{n}`` counts, else the last ``Final Alignment Rating: n`` or ``Score: n``. ``json``: the
    last JSON object with a ``score`` counts, within prose or code fences too; three sub-scores give their minimum.
    ``score``: the text must end in ``Score: n``.

    Args:
        text: The answer.
        answer: Its format, from the rubric.
        truncated: True if the judge ran out of tokens. Only a final verdict that stands complete is read then.

    Returns:
        The judgement with its rationale, or `Invalid` with the reason: ``empty``, ``non_finite``, ``out_of_range``
        (not in 1..5), ``truncated`` (cut off before a score) or ``unparsable`` (also for a fractional score).
    """
    text = without_thoughts(text)[-MAX_CHARS:]
    if not text.strip():
        return Invalid(reason="truncated" if truncated else "empty")
    return _PARSERS[answer](text, truncated)


def verdict_positions(text: str, digits: Sequence[int], form: ScoreFormat | Literal["score_first"]) -> list[int]:
    """Which of the digits of an answer wrote its verdict first: there the judge decided, later ones only repeat it.

    Args:
        text: The answer, without thoughts.
        digits: Where in it tokens stand that are a score, in order.
        form: Its format, or its style.

    Returns:
        One position; several for a list of sub-scores; none where no verdict is found.
    """
    for pattern in _BEFORE[form]:
        found: list[int] = []
        for position in reversed(digits):
            match = pattern.search(text, max(0, position - _NEARBY), position)
            found += [position] if match else []
            if found and not (match and "," in match[0]):
                break
        if found:
            return found[::-1]
    return []


def parse_score_first(text: str, truncated: bool = False) -> Judgement | Invalid:
    """Read an answer of the ``score_first`` style: ``Score: N`` at the very beginning, then the rationale.

    Scores further down belong to the rationale and do not count. Reasons as for `parse_answer`.
    """
    text = text[:MAX_CHARS]
    if not text.strip():
        return Invalid(reason="truncated" if truncated else "empty")
    match = _SCORE_FIRST.match(text)
    if match is None or (truncated and match.end() == len(text)):  # more digits might have followed
        return _no_score(text, truncated)
    return _read(text, match, text[match.end() :], truncated)


def write_answer(score: int, rationale: str, style: AnswerStyle, answer: ScoreFormat, parts: Sequence[int] = ()) -> str:
    """Write a training answer that parses back to the same score.

    Args:
        score: Score, 1..5.
        rationale: The explanation.
        style: ``score_first`` gives ``Score: N`` and the rationale, whatever the rubric's format, because the critic's
            score distribution is read at the token after `SCORE_PREFIX`; it is read by `parse_score_first`.
            ``reason_first`` gives the rubric's own format, read by `parse_answer`.
        answer: The rubric's format.
        parts: Sub-scores whose lowest is the score, where the rubric asks for several.

    Raises:
        ValueError: The score is not in 1..5, or not the lowest of its parts.
    """
    if score not in range(1, 6) or (parts and min(parts) != score):
        raise ValueError(f"score must be in 1..5 and the lowest of its parts, got {score} and {list(parts)}")
    if style == "score_first":
        return f"{SCORE_PREFIX} {score}\n{rationale}".rstrip()
    if answer == "json":
        return json.dumps({"reasoning": rationale, "score": list(parts) or [score]}, ensure_ascii=False)
    if answer == "score":
        return f"{rationale}\n{SCORE_PREFIX} {score}".lstrip()
    return f"{rationale}\n\nFinal Alignment Rating: {score}\n\\boxed{{{score}}}".lstrip()


def final_analysis(text: str) -> str:
    """The paragraph after the last ``Final Analysis:``, up to the rating; empty if there is no such paragraph."""
    match = _last(_FINAL_ANALYSIS, text)
    if match is None:
        return ""
    rest = text[match.end() :]
    ends = [m.start() for m in (_RATING.search(rest), _BOXED.search(rest)) if m]
    return rest[: min(ends, default=len(rest))].strip().strip("*_#").strip()


def parse_plan(text: str, truncated: bool = False) -> list[str] | Invalid:
    """The questions of a planner's Markdown checklist, in order and without duplicates.

    Returns:
        The questions, at least one; or `Invalid` with the reason ``truncated`` (part of a plan would make the prompt
        seem easy), ``empty`` or ``unparsable``.
    """
    whole = _whole(text, truncated)
    if isinstance(whole, Invalid):
        return whole
    matches = (_QUESTION.fullmatch(line.rstrip()) for line in whole.splitlines())
    found = (match[1].strip().strip("*_").strip() for match in matches if match)
    questions = list(dict.fromkeys(q for q in found if q and q.rstrip(".").lower() not in ("none", "n/a")))
    return questions or Invalid(reason="unparsable", detail=_excerpt(whole))


def parse_report(text: str, truncated: bool = False) -> list[str] | Invalid:
    """The lines of a description, in order and without duplicates and the marks of lists and headings.

    Returns:
        The lines, at least one; or `Invalid` with the reason ``truncated`` (what was not said any more would count as
        unchanged) or ``empty``.
    """
    whole = _whole(text, truncated)
    if isinstance(whole, Invalid):
        return whole
    lines = (line.strip(_MARKUP) for line in whole[-MAX_CHARS:].splitlines())
    return list(dict.fromkeys(filter(None, lines))) or Invalid(reason="empty")


def parse_instruction(text: str, truncated: bool = False) -> tuple[str, str] | Invalid:
    """The last JSON object with an ``instruction``: this text on one line, and the ``reasoning``, if there is one.

    Returns:
        Both texts, the first not empty; or `Invalid` with the reason ``truncated``, ``empty`` or ``unparsable``.
    """
    whole = _whole(text, truncated)
    if isinstance(whole, Invalid):
        return whole
    objects = (found for found, _, _ in _json_objects(whole[-MAX_CHARS:]) if "instruction" in found)
    last = next(iter(deque(objects, maxlen=1)), {})
    instruction, reasoning = last.get("instruction"), last.get("reasoning")
    if not isinstance(instruction, str) or not instruction.strip():
        return Invalid(reason="unparsable", detail=_excerpt(whole))
    return " ".join(instruction.split()), reasoning.strip() if isinstance(reasoning, str) else ""


def _whole(text: str, truncated: bool) -> str | Invalid:
    """What an answer says besides its thoughts, or why there is nothing or not all of it."""
    if truncated:
        return Invalid(reason="truncated", detail=_excerpt(text))
    text = without_thoughts(text)
    return text if text.strip() else Invalid(reason="empty")
