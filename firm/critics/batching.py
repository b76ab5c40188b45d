"""One critic for many callers: questions that come at the same time are answered as one batch.

A batch of eight costs little more than one. A batch that cannot be encoded or answered is tried one by one, so what the
model cannot take is refused alone. Answers that take much longer than usual are written again behind the others, with a
part of the time, so that nobody waits for them but who asked.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from PIL import Image

from firm.chat.messages import Caller, ChatMessage, Reply, RequestFailed, Token, user_message
from firm.config.serve import QuestionLimits
from firm.critics.answers import SCORE_PREFIX
from firm.critics.asked import read_question
from firm.critics.encoder import Batch
from firm.critics.line import Asked, Line
from firm.critics.local import LocalCritic, question_seed
from firm.critics.pen import Manner
from firm.critics.shifts import Shifts
from firm.images import encode_image
from firm.records import SCORES, UserError

MAX_RATIO = 4
"""Of the lengths of two questions of one batch: all are padded to the longest."""


class BatchingChat:
    """A critic in this process as a `firm.chat.messages.Chat`: one thread answers the requests of many.

    Args:
        name: Its name in the API.
        critic: The critic; its configuration sets the answer style and the batch size.
        limits: What a question may be. A batch has at most as many tokens, with padding, as two of the longest ones.
        patience_s: How long a batch waits for more questions after its first.
    """

    gives_logprobs = True
    minds_callers = True

    def __init__(
        self, name: str, critic: LocalCritic, limits: QuestionLimits | None = None, patience_s: float = 0.005
    ) -> None:
        self.name = name
        self.batches = 0
        self.limits = limits or QuestionLimits()
        self._critic = critic
        self._patience_s = patience_s
        self._waiting = Line(2 * self.limits.max_question_pixels)
        self._shifts = Shifts()
        self._long = Line(2 * self.limits.max_question_pixels)
        self._token_s = 0.0  # what a token costs, on average: in a small batch it costs more, by nobody's fault
        self._max_tokens = min(self.limits.max_question_tokens, critic.encoder.max_tokens)
        for work in (self._work, self._work_behind):
            threading.Thread(target=work, daemon=True).start()

    def complete(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        top_logprobs: int | None = None,
        caller: Caller | None = None,
    ) -> Reply:
        """Answer the messages; with a seed always in the same way, whatever else is in the batch.

        Raises:
            RequestFailed: The messages are not a question with images that a critic understands, or beyond the limits.
            CancelledError: The caller has left.
        """
        question = read_question(messages, self.limits)
        seed = question_seed(secrets.randbits(63) if seed is None else seed, question.text, question.images)
        reply: Future[Reply] = Future()
        caller = caller or Caller()
        caller.left.add_done_callback(lambda _: reply.cancel())
        limit = min(max_tokens, self._critic.config.max_new_tokens)
        manner = Manner(limit, temperature, seed, top_logprobs, unwanted=reply.cancelled)
        asked = Asked(question, manner, caller, reply)
        self._waiting.put(asked)
        try:
            return reply.result()
        finally:  # a caller that has left takes its images with it
            self._waiting.drop(asked)
            self._long.drop(asked)

    def warm_up(self) -> None:
        """Answer a question for nobody: the first one takes longer, and its caller should not pay for that."""
        message = user_message("ready?", [encode_image(Image.new("RGB", (32, 32)))])
        self.complete([message], max_tokens=2, temperature=0.0, seed=0)

    def waiting(self) -> int:
        """How many questions no batch has taken yet."""
        return len(self._waiting)

    def _work(self) -> None:
        while True:
            batch = self._waiting.take(self._critic.config.batch_size, self._patience_s)
            with self._shifts.batch() as too_long:
                unfinished = self._answer(batch, self._waiting, too_long)
            for asked in unfinished:
                asked.caller.aside(asked.caller.cost_s)
                self._long.put(asked)

    def _work_behind(self) -> None:
        """Answer again, and to the end, what takes long."""
        while True:
            batch = self._long.take(self._critic.config.batch_size)
            with self._shifts.behind() as give_way:
                self._answer(batch, self._long, give_way)

    def _answer(self, batch: Sequence[Asked], line: Line, stop: Callable[[], bool]) -> list[Asked]:
        """Answer questions from a line, until ``stop`` says so; returns those whose answers are not finished."""
        start = time.thread_time()
        batch, inputs = self._encode([asked for asked in batch if not asked.reply.cancelled()], line)
        if not batch:
            return []
        encoding_s = (time.thread_time() - start) / sum(map(_size, batch))
        self.batches += 1
        stops = _Stops(stop)
        replies: Sequence[Reply | Exception]
        try:
            replies = self._replies(batch, inputs, stops)
        except Exception as error:  # the callers get the error; the thread continues for others
            if len(batch) > 1:
                return [unfinished for asked in batch for unfinished in self._answer([asked], line, stop)]
            replies = [error]
        lengths = [n + _written(asked.manner, r) for n, asked, r in zip(_lengths(inputs), batch, replies, strict=True)]
        seconds = time.thread_time() - start
        self._token_s += (self.batches < 2 or 0.05) * (seconds / sum(lengths) - self._token_s)
        for asked, reply, length in zip(batch, replies, lengths, strict=True):
            asked.caller.cost_s = encoding_s * _size(asked) + length * self._token_s
            if not stops.has_cut(asked.manner, reply):
                asked.settle(reply)
        return [asked for asked, reply in zip(batch, replies, strict=True) if stops.has_cut(asked.manner, reply)]

    def _encode(self, batch: Sequence[Asked], line: Line) -> tuple[Sequence[Asked], Batch]:
        """Those of a batch that are answered together, as the model reads them; others go back to their line."""
        if not batch:
            return [], {}
        try:
            inputs, lengths = self._read(batch)
        except Exception:  # a processor may raise anything
            return self._encode(self._sound(batch, line), line)
        fitting = [asked for asked, n in zip(batch, lengths, strict=True) if _alike(n, lengths[0])]
        fitting = fitting[: 2 * self._max_tokens // max(lengths)]
        if len(fitting) == len(batch):
            return batch, inputs
        for asked in batch:
            if asked not in fitting:
                line.put(asked)
        return self._encode(fitting, line)

    def _sound(self, batch: Sequence[Asked], line: Line) -> Sequence[Asked]:
        """What is left of a batch that cannot be encoded, without those at fault; they pay for the time of all."""
        start = time.thread_time()
        faults = {asked: fault for asked in batch if (fault := self._fault(asked))}
        for asked, fault in faults.items():
            asked.caller.cost_s = (time.thread_time() - start) / len(faults)
            asked.settle(fault)
        if faults:
            return [asked for asked in batch if asked not in faults]
        for asked in batch[1:]:
            line.put(asked)
        return batch[:1]

    def _read(self, batch: Sequence[Asked]) -> tuple[Batch, list[int]]:
        """A batch as the model reads it, and the number of tokens of each question."""
        texts, images, _ = zip(*(asked.question for asked in batch), strict=True)
        inputs = self._critic.encoder.questions(texts, images)
        lengths = _lengths(inputs)
        if max(lengths) > self._max_tokens:
            raise ValueError(f"it has {max(lengths)} tokens, with those of its images; {self._max_tokens} may be")
        return inputs, lengths

    def _fault(self, asked: Asked) -> Exception | None:
        """Why a question cannot be encoded."""
        try:
            self._read([asked])
        except (UserError, ValueError) as error:
            detail = error.what if isinstance(error, UserError) else str(error)
            return RequestFailed(f"the critic does not take this question: {detail}")
        except Exception as error:
            return error
        return None

    def _replies(self, batch: Sequence[Asked], inputs: Batch, stop: Callable[[], bool]) -> list[Reply]:
        manners = [asked.manner for asked in batch]
        if self._critic.config.answer_style == "score_first":
            rows = self._critic.score(inputs)
            return [_score_first(row, manner.top_logprobs) for row, manner in zip(rows, manners, strict=True)]
        return self._critic.write(inputs, manners, stop=stop)


class _Stops:
    """Says whether to stop, between tokens, and then which answers that has cut short.

    Args:
        stop: Whether to, if it is called after a token.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self._written = 0
        self._stopped = False

    def __call__(self) -> bool:
        self._written += 1
        self._stopped = self._stop()
        return self._stopped

    def has_cut(self, manner: Manner, reply: Reply | Exception) -> bool:
        """Whether there would have been more of an answer."""
        return self._stopped and isinstance(reply, Reply) and reply.truncated and manner.limit > self._written


def _lengths(inputs: Batch) -> list[int]:
    """Number of tokens of each question."""
    lengths: list[int] = inputs["attention_mask"].sum(1).tolist()
    return lengths


def _alike(one: int, other: int) -> bool:
    """Whether questions of such lengths may be one batch."""
    return max(one, other) <= MAX_RATIO * min(one, other)


def _size(asked: Asked) -> int:
    """What it takes to encode a question is about in proportion to this: its images are most of it."""
    return asked.question.pixels + 2**14


def _written(manner: Manner, reply: Reply | Exception) -> int:
    """About how many tokens were written."""
    if isinstance(reply, Exception):
        return 0
    return manner.limit if reply.truncated else min(len(reply.text), manner.limit)


def _score_first(probabilities: Sequence[float], top_logprobs: int | None) -> Reply:
    """The likeliest score; a critic whose numbers have become NaN must not seem to have one.

    Its tokens are the forced prefix and the score, with the five scores for all that might stand in its place.
    """
    if not all(map(math.isfinite, probabilities)):
        return Reply(f"{SCORE_PREFIX} nan")
    logprobs = [(f" {s}", math.log(p) if p else -9999.0) for s, p in zip(SCORES, probabilities, strict=True)]
    likely = sorted(logprobs, key=lambda token: -token[1])
    best, logprob = likely[0]
    if top_logprobs is None:
        return Reply(SCORE_PREFIX + best)
    prefix = Token(SCORE_PREFIX, 0.0, ((SCORE_PREFIX, 0.0),)[:top_logprobs])
    return Reply(SCORE_PREFIX + best, tokens=(prefix, Token(best, logprob, tuple(likely[:top_logprobs]))))
