"""What labellers have in common: a helper prepares material by a template, an evaluator judges with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from firm.chat.journal import OpenChat
from firm.chat.messages import Chat
from firm.config import ChatConfig, CurationConfig, EndpointChat
from firm.critics.judge import JudgeInput, ask_chat, message_of
from firm.critics.load import open_judge
from firm.critics.rubrics import Rubric
from firm.records import Candidate, Invalid, JudgedCandidate, Provenance

MAX_TOKENS = 2048
"""Limit of a helper's answer."""
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


class Helper:
    """A chat that prepares what an evaluator is given, asked again with another seed where its answer cannot be used.

    Args:
        chat: The chat.
        config: Its configuration.
        attempts: Tries for each answer.
    """

    def __init__(self, chat: Chat, config: ChatConfig, attempts: int) -> None:
        self._chat = chat
        self._attempts = attempts
        self._concurrency = config.concurrency if isinstance(config, EndpointChat) else 1

    def ask(
        self,
        rubric: Rubric,
        item: JudgeInput,
        read: Callable[[str, bool], T | Invalid],
        *,
        seed: int = 0,
        temperature: float = 0.0,
    ) -> T | Invalid:
        """What ``read`` makes of the answer and whether it was truncated, or why the last try failed.

        Raises:
            UserError: The chat cannot be used at all, or the item has another number of images than the rubric's.
        """
        answered = ask_chat(
            self._chat,
            message_of(rubric, item),
            lambda reply: read(reply.text, reply.truncated),
            seeds=range(seed, seed + self._attempts),
            max_tokens=MAX_TOKENS,
            temperature=temperature,
        )
        return answered.outcome

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """``function`` of each item, in order, with as many requests in flight as the chat may have."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(function, items))


class Evaluator:
    """A labeller's evaluator: judges candidates with material, and keeps how each judgement came about.

    Args:
        config: Its configuration.
        open_chat: Opens it.
        helpers: Versions of the rubrics that the material is made by, for the provenance.
    """

    def __init__(self, config: CurationConfig, open_chat: OpenChat, helpers: Mapping[str, str]) -> None:
        rubrics = {d: judged.rubric for d, judged in config.dimensions.items()}
        chat = open_chat("evaluator", config.evaluator)
        self._judge = open_judge(config.evaluator, rubrics, chat=chat, attempts=config.attempts)
        self._versions = {**helpers, **self._judge.versions}

    def label(
        self, candidates: Sequence[Candidate], name: str, made: Sequence[list[str] | Invalid]
    ) -> list[JudgedCandidate]:
        """Judge candidates on every dimension, in order; one whose material failed is judged without it.

        Args:
            candidates: The candidates.
            name: Name of the material.
            made: The material of each candidate.
        """
        material = [{name: lines} if isinstance(lines, list) else {} for lines in made]
        items = [JudgeInput(c.prompt, c.images, given) for c, given in zip(candidates, material, strict=True)]
        return [
            JudgedCandidate(
                **dict(candidate),
                material=given,
                failed={name: lines} if isinstance(lines, Invalid) else {},
                assessment={d: a.outcome for d, a in answers.items()},
                provenance=Provenance(
                    teacher=self._judge.chat.name,
                    rubrics=self._versions,
                    answers={d: a.text for d, a in answers.items()},
                ),
            )
            for candidate, given, lines, answers in zip(
                candidates, material, made, self._judge.ask_all(items), strict=True
            )
        ]


def difficulty(judged: JudgedCandidate, name: str, hard_from: int) -> str:
    """``hard`` if the material has many lines, as there is much to check, else ``easy``; without it nobody knows."""
    if name not in judged.material:
        return "unknown"
    return "hard" if len(judged.material[name]) >= hard_from else "easy"
