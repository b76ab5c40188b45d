"""From a judge's reply to a judgement with the distribution of its score, and from several samples to one judgement.

A reply may come from any endpoint: fields that are wrong or contradict the text give no distribution, never an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from firm.chat.messages import Reply, Token
from firm.critics.answers import (
    AnswerStyle,
    ScoreFormat,
    parse_answer,
    parse_score_first,
    verdict_positions,
    without_thoughts,
)
from firm.records import SCORES, Invalid, Judgement, Outcome

Distribution = tuple[float, float, float, float, float]
MIN_MASS = 0.5
"""Probability that the five scores must have together where the verdict was written: below, it was hardly a choice."""
_SCORES = {str(score): score for score in SCORES}
_MARKUP = " \t\r\n*_"


def read_reply(reply: Reply, answer: ScoreFormat, style: AnswerStyle) -> Judgement | Invalid:
    """Read a judge's reply; the judgement has a distribution where the tokens show how the verdict was reached.

    Args:
        reply: The reply, with tokens or without.
        answer: The rubric's format.
        style: Where the score stands; see `firm.critics.answers`.
    """
    first = style == "score_first"
    outcome = (
        parse_score_first(reply.text, reply.truncated) if first else parse_answer(reply.text, answer, reply.truncated)
    )
    if isinstance(outcome, Invalid):
        return outcome
    return outcome.model_copy(
        update={"distribution": _distribution(reply, outcome, "score_first" if first else answer)}
    )


def _distribution(reply: Reply, outcome: Judgement, form: ScoreFormat | Literal["score_first"]) -> Distribution | None:
    """Probabilities of the scores where the verdict was first written."""
    text = _ascii(without_thoughts(reply.text))
    pieces = [_ascii(token.text) for token in reply.tokens]
    whole = "".join(pieces)
    offset = -whole.find(text, whole.rfind("</think>") + 1)
    if offset > 0:  # the text is none of these tokens
        return None
    written: dict[int, Token] = {}
    for token, piece in zip(reply.tokens, pieces, strict=True):
        at = offset + len(piece) - len(piece.lstrip(_MARKUP))
        if piece.strip(_MARKUP) in _SCORES and 0 <= at < len(text):
            written[at] = token
        offset += len(piece)
    verdict = verdict_positions(text, list(written), form)
    if tuple(int(text[at]) for at in verdict) != (outcome.parts or (outcome.score,)):
        return None  # what stands there first is not what the answer concludes
    rows = [_probabilities(written[at]) for at in verdict]
    return of_the_lowest([row for row in rows if row is not None]) if None not in rows else None


def _ascii(text: str) -> str:
    """Servers disagree on which token wrote a character that takes several; no verdict is written in those."""
    return text.encode("ascii", "ignore").decode()


def _probabilities(token: Token) -> Distribution | None:
    """Probabilities of the scores in the place of a token; those not among the likeliest have none."""
    if not token.top:
        return None
    mass = dict.fromkeys(SCORES, 0.0)
    for text, logprob in token.top:
        if (score := _SCORES.get(text.strip(_MARKUP))) is not None:
            mass[score] += math.exp(min(logprob, 1.0))
    if not mass[written := _SCORES[token.text.strip(_MARKUP)]]:  # drawn, though it is not among the likeliest
        mass[written] = math.exp(min(token.logprob, 1.0))
    total = sum(mass.values())
    if not MIN_MASS <= total <= 1.01:  # also for NaN
        return None
    one, two, three, four, five = (m / total for m in mass.values())
    return one, two, three, four, five


def of_the_lowest(rows: Sequence[Distribution]) -> Distribution:
    """Distribution of the lowest of independent scores with the distributions ``rows``."""
    at_least = [math.prod(sum(row[i:]) for row in rows) for i in range(len(SCORES))]
    one, two, three, four, five = (max(0.0, p - q) for p, q in zip(at_least, [*at_least[1:], 0.0], strict=True))
    return one, two, three, four, five


def pool(samples: Sequence[Judgement | Invalid]) -> Judgement | Invalid:
    """One judgement of several samples of the same question.

    Its distribution is the mean of theirs (all on the score for a sample without one), which holds their spread too;
    its score is the most frequent one, of several the nearest to the mean. Failed samples are left out and counted in
    ``invalid_samples``; more than half of them make the judgement `Invalid`, for the most frequent reason.
    """
    if len(samples) == 1:
        return samples[0]
    valid = [sample for sample in samples if isinstance(sample, Judgement)]
    failed = [sample for sample in samples if isinstance(sample, Invalid)]
    if len(failed) > len(valid):
        [(reason, number)] = Counter(sample.reason for sample in failed).most_common(1)
        detail = next(sample.detail for sample in failed if sample.reason == reason)
        return Invalid(reason=reason, detail=f"{number} of {len(samples)} samples, such as: {detail}")
    rows = [s.distribution or [float(s.score == score) for score in SCORES] for s in valid]
    mean = sum(s * sum(column) for s, column in zip(SCORES, zip(*rows, strict=True), strict=True)) / len(valid)
    counts = Counter(sample.score for sample in valid)
    score = min(counts, key=lambda s: (-counts[s], abs(s - mean), s))
    pooled = {
        "distribution": tuple(sum(column) / len(valid) for column in zip(*rows, strict=True)),
        "invalid_samples": len(failed),
    }
    return next(sample for sample in valid if sample.score == score).model_copy(update=pooled)


def soft_share(outcomes: Iterable[Outcome]) -> float | None:
    """Share of the valid judgements that have a distribution; the others are whole scores. None without a valid one."""
    valid = [outcome for outcome in outcomes if isinstance(outcome, Judgement)]
    return sum(judgement.distribution is not None for judgement in valid) / len(valid) if valid else None
