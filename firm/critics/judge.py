"""The protocol of a judge, and a judge over any chat, which retries answers that do not parse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from firm.chat.messages import IMAGE_MARK, Chat, ChatMessage, Reply, RequestFailed, user_message
from firm.critics.answers import AnswerStyle
from firm.critics.calls import Calls
from firm.critics.rubrics import INSTEAD, Rubric, load_rubric
from firm.critics.soft import pool, read_reply
from firm.prompts import with_source
from firm.records import Assessment, Invalid, Judgement, Prompt, Reason, UserError

RETRY_TEMPERATURE = 0.7
T = TypeVar("T")


@dataclass(frozen=True)
class JudgeInput:
    """What is judged.

    Attributes:
        prompt: The image's prompt.
        images: PNG bytes: one image for generation, (source, edited) for editing.
        material: What only a teacher is given: name -> lines, such as the questions of a plan.
        dimensions: On which it is judged; None: on all that the judge knows.
    """

    prompt: Prompt
    images: list[bytes]
    material: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dimensions: Collection[str] | None = None

    def among(self, known: Iterable[str]) -> tuple[str, ...]:
        """Those of the dimensions that a judge knows on which this is judged, in the judge's order."""
        return tuple(d for d in known if self.dimensions is None or d in self.dimensions)


def judge_inputs(prompts: Iterable[Prompt], images: Iterable[bytes]) -> list[JudgeInput]:
    """What is judged of samples, PNG images: see `with_source`."""
    return [JudgeInput(prompt, with_source(prompt, png)) for prompt, png in zip(prompts, images, strict=True)]


class Judge(Protocol):
    """A judge of images, trained or served."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        """Judge ``items``: one assessment per item, in order, each with every dimension on which it is judged."""
        ...


@dataclass(frozen=True)
class Answered(Generic[T]):
    """An outcome with the raw answer that it was read from (empty if the request failed): the last of several."""

    outcome: T | Invalid
    text: str


def ask_chat(
    chat: Chat,
    message: ChatMessage,
    read: Callable[[Reply], T | Invalid],
    *,
    seeds: Iterable[int],
    max_tokens: int,
    temperature: float = 0.0,
) -> Answered[T]:
    """What is read of the first answer that can be read, after as many tries as there are seeds.

    Args:
        chat: The chat to ask.
        message: The question.
        read: Makes of a reply what is wanted, or says why it cannot.
        seeds: One for each try.
        max_tokens: Limit of an answer.
        temperature: Of the first try; it is at least `RETRY_TEMPERATURE` in further ones.
    """
    answered: Answered[T] = Answered(Invalid(reason="request_failed", detail="not asked"), "")
    for attempt, seed in enumerate(seeds):
        # At temperature 0 the same question would get the same unreadable answer.
        heat = max(temperature, RETRY_TEMPERATURE) if attempt else temperature
        try:
            reply = chat.complete([message], max_tokens=max_tokens, temperature=heat, seed=seed)
        except RequestFailed as error:
            answered = Answered(Invalid(reason="request_failed", detail=error.detail), "")
            if not error.retryable:
                break
            continue
        answered = Answered(read(reply), reply.text)
        if not isinstance(answered.outcome, Invalid):
            break
    return answered


class ChatJudge:
    """Judges by asking a chat, one request per item, dimension and sample (paper section 3.2: the evaluator).

    Samples are requests of their own, not the protocol's ``n``: each is retried and journalled by itself, and servers
    without ``n`` will do.

    Args:
        chat: The chat to ask.
        rubrics: Name of the template for each dimension.
        attempts: Tries for an answer that does not parse, with another seed and temperature > 0 after the first.
        concurrency: Requests in flight, by threads of their own; 0: the caller's thread asks, one after the other.
        temperature: Temperature of the first try; with several samples it must be above 0.
        max_tokens: Limit of an answer.
        answer_style: ``score_first`` for critics trained to answer ``Score: N`` first; otherwise the rubric's format.
        num_samples: Answers to each question, with seeds of their own, that make one judgement: see `soft.pool`.

    Raises:
        UserError: An unknown rubric, or one that does not ask for a score.
    """

    def __init__(
        self,
        chat: Chat,
        rubrics: Mapping[str, str],
        *,
        attempts: int = 3,
        concurrency: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 4096,
        answer_style: AnswerStyle = "reason_first",
        num_samples: int = 1,
    ) -> None:
        self.chat = chat
        self.rubrics: dict[str, Rubric] = {dimension: load_rubric(name) for dimension, name in rubrics.items()}
        self._attempts = attempts
        self.concurrency = concurrency
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._style = answer_style
        self._num_samples = num_samples
        for rubric in self.rubrics.values():
            _ = rubric.score_format  # raises where no score is asked for

    @property
    def versions(self) -> dict[str, str]:
        """Version of the rubric of each dimension, for the provenance of judgements."""
        return {dimension: rubric.version for dimension, rubric in self.rubrics.items()}

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        """Judge items, in order. A failed judgement is `Invalid`, never a number.

        Raises:
            UserError: The judge cannot be used at all, for example because of a refused key or a server that is down.
        """
        return [_outcomes(row) for row in self.ask_all(items)]

    def ask_all(self, items: Sequence[JudgeInput]) -> list[dict[str, Answered[Judgement]]]:
        """As `judge`, with the raw answers."""
        questions = self.questions(items)
        if not self.concurrency:
            return self.rows(items, [ask() for ask in questions])
        with Calls[Answered[Judgement]](self.concurrency) as calls:
            calls.add(questions)
            return self.rows(items, calls.results())

    def questions(self, items: Sequence[JudgeInput]) -> list[Callable[[], Answered[Judgement]]]:
        """What is to be called to judge items: an item after the other, on one dimension after the other."""
        return [partial(self.ask, item, dimension) for item in items for dimension in item.among(self.rubrics)]

    def rows(
        self, items: Iterable[JudgeInput], answers: Iterable[Answered[Judgement]]
    ) -> list[dict[str, Answered[Judgement]]]:
        """What the `questions` about items gave, by item."""
        each = iter(answers)
        return [{dimension: next(each) for dimension in item.among(self.rubrics)} for item in items]

    def ask(self, item: JudgeInput, dimension: str) -> Answered[Judgement]:
        """Judge one item on one dimension.

        Raises:
            UserError: No such dimension, an item with another number of images than the rubric asks for, or a judge
                that cannot be used at all.
        """
        rubric = self.rubrics.get(dimension)
        if rubric is None:
            known = ", ".join(self.rubrics)
            raise UserError(f"no rubric for the dimension {dimension!r}", "", f"use one of {known}", usage=True)
        message = message_of(rubric, item)
        samples = [self._ask(message, rubric, sample) for sample in range(self._num_samples)]
        return Answered(pool([sample.outcome for sample in samples]), samples[-1].text)

    def _ask(self, message: ChatMessage, rubric: Rubric, sample: int) -> Answered[Judgement]:
        return ask_chat(
            self.chat,
            message,
            lambda reply: read_reply(reply, rubric.score_format, self._style),
            seeds=range(sample, self._attempts * self._num_samples, self._num_samples),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        )


def _outcomes(row: Mapping[str, Answered[Judgement]]) -> Assessment:
    return {dimension: answered.outcome for dimension, answered in row.items()}


class Judging(Protocol):
    """Judging of what is added piece by piece."""

    def add(self, items: Sequence[JudgeInput]) -> None:
        """Add items; raises what judging the earlier ones has raised."""

    def assessments(self) -> list[Assessment]:
        """One assessment for each item that was added, in order; raises as `Judge.judge` does."""


@contextmanager
def judging(judge: Judge) -> Iterator[Judging]:
    """Judge what is added piece by piece, with the outcomes of one call of ``judge`` for all of it.

    A judge that waits for a server is asked at once, while the caller makes more. One that computes here is asked in
    the end: it would take the processor from who makes more, and it chooses its batches itself.
    """
    if isinstance(judge, ChatJudge) and judge.concurrency:
        with Calls[Answered[Judgement]](judge.concurrency) as calls:
            yield _AtOnce(judge, calls)
    else:
        yield _InTheEnd(judge)


class _AtOnce:
    def __init__(self, judge: ChatJudge, calls: Calls[Answered[Judgement]]) -> None:
        self._judge = judge
        self._calls = calls
        self._items: list[JudgeInput] = []

    def add(self, items: Sequence[JudgeInput]) -> None:
        self._calls.add(self._judge.questions(items))
        self._items += items

    def assessments(self) -> list[Assessment]:
        return [_outcomes(row) for row in self._judge.rows(self._items, self._calls.results())]


class _InTheEnd:
    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._items: list[JudgeInput] = []

    def add(self, items: Sequence[JudgeInput]) -> None:
        self._items += items

    def assessments(self) -> list[Assessment]:
        return self._judge.judge(self._items) if self._items else []


def message_of(rubric: Rubric, item: JudgeInput) -> ChatMessage:
    """The message that asks about an item by a template.

    Raises:
        UserError: The item has another number of images than the template asks for.
    """
    if len(item.images) != rubric.images:
        what = f"the rubric judges {rubric.images} image(s), the item has {len(item.images)}"
        raise UserError(what, rubric.name, "choose another rubric for this dimension", usage=True)
    return user_message(question(rubric, item.prompt, item.material), item.images)


def question(rubric: Rubric, prompt: Prompt, material: Mapping[str, Sequence[str]] | None = None) -> str:
    """Text of the user message that asks a judge, with one ``<image>`` mark per image.

    The marks stand where the template has them, else in front. Curation writes this text into training examples and
    critics are asked with it, in this process and at an endpoint, so training and judging are the same. A mark inside
    the prompt is made harmless, as marks are counted.
    """
    nothing: dict[str, Sequence[str]] = dict.fromkeys(INSTEAD, ())
    values = {**nothing, "prompt": prompt.text.replace(IMAGE_MARK, "< image >"), **(material or {})}
    text = rubric.render({name: values[name] for name in rubric.placeholders if name in values})
    return text if IMAGE_MARK in rubric.text else IMAGE_MARK * rubric.images + text


def all_invalid(dimensions: Iterable[str], reason: Reason, detail: str = "") -> Assessment:
    """An assessment that failed on every dimension."""
    return {dimension: Invalid(reason=reason, detail=detail) for dimension in dimensions}


def soft_scores(assessments: Iterable[Assessment], dimension: str, soft: bool = True) -> list[float | None]:
    """Scores in [1, 5] of one dimension, soft or hard; None (never a number) where the judgement failed."""
    outcomes = (assessment.get(dimension) for assessment in assessments)
    return [
        None if o is None or isinstance(o, Invalid) else (o.soft_score if soft else float(o.score)) for o in outcomes
    ]


def invalid_counts(assessments: Iterable[Assessment]) -> dict[str, dict[str, int]]:
    """Number of failed judgements as dimension -> reason -> count, for reports."""
    counts: dict[str, Counter[str]] = {}
    for assessment in assessments:
        for dimension, outcome in assessment.items():
            counter = counts.setdefault(dimension, Counter())
            if isinstance(outcome, Invalid):
                counter[outcome.reason] += 1
    return {dimension: dict(counter) for dimension, counter in counts.items()}
