"""The judge over a chat: retries, order, concurrency, failures that are not numbers."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from shared import Scripted

from firm.chat.messages import ChatMessage, Reply, RequestFailed, Token
from firm.critics.judge import Answered, ChatJudge, JudgeInput, all_invalid, invalid_counts, question, soft_scores
from firm.critics.rubrics import load_rubric
from firm.records import Invalid, Judgement, Prompt, UserError

PNG = b"\x89PNG\r\n\x1a\n"
FOLLOWING = {"instruction_following": "instruction_following"}
BOTH = {"instruction_following": "short_instruction_following", "quality": "quality"}


class Echo:
    """Scores by the digit in the prompt, later items sooner, and counts how many requests are in flight."""

    name = "echo"

    def __init__(self) -> None:
        self.lock, self.active, self.most = threading.Lock(), 0, 0

    def complete(self, messages: Sequence[ChatMessage], **_options: object) -> Reply:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        text = next(part["text"] for part in messages[0]["content"] if part["type"] == "text").strip()
        digit = 1 if "prompt :" not in text else int(text[-1])
        time.sleep(0.005 * (6 - digit))
        with self.lock:
            self.active -= 1
        return Reply(f'{{"score": {digit}}}' if "prompt :" not in text else f"\\boxed{{{digit}}}")


def item(prompt: str = "a red circle", plan: Sequence[str] = ()) -> JudgeInput:
    return JudgeInput(Prompt(text=prompt), [PNG], {"plan": list(plan)} if plan else {})


def asked(chat: Scripted) -> list[str]:
    """The text of each request, after the images."""
    return [call["messages"][0]["content"][-1]["text"] for call in chat.calls]


def test_a_good_answer_is_asked_for_once() -> None:
    chat = Scripted(Reply("fine \\boxed{4}"))
    judge = ChatJudge(chat, FOLLOWING, temperature=0.2, max_tokens=99)
    assert judge.judge([item()]) == [{"instruction_following": Judgement(score=4, rationale="fine")}]
    [text], [call] = asked(chat), chat.calls
    assert "a red circle" in text
    assert call | {"messages": []} == {"messages": [], "max_tokens": 99, "temperature": 0.2, "seed": 0}


def test_an_unreadable_answer_is_asked_for_again_with_another_seed() -> None:
    chat = Scripted(Reply("hm"), Reply("", truncated=True), Reply("\\boxed{2}"))
    answered = ChatJudge(chat, FOLLOWING, attempts=3).ask(item(), "instruction_following")
    assert answered == Answered(Judgement(score=2), "\\boxed{2}")
    assert [(c["temperature"], c["seed"]) for c in chat.calls] == [(0.0, 0), (0.7, 1), (0.7, 2)]


def test_after_the_last_attempt_it_stays_invalid() -> None:
    answered = ChatJudge(Scripted(Reply("hm"), Reply("well")), FOLLOWING, attempts=2).ask(
        item(), "instruction_following"
    )
    assert answered == Answered(Invalid(reason="unparsable", detail="well"), "well")


def test_failed_requests_are_invalid_and_asked_again_only_if_that_may_help() -> None:
    chat = Scripted(RequestFailed("empty choices", retryable=True), RequestFailed("status 400"), Reply("\\boxed{2}"))
    answered = ChatJudge(chat, FOLLOWING).ask(item(), "instruction_following")
    assert answered == Answered(Invalid(reason="request_failed", detail="status 400"), "")
    assert len(chat.calls) == 2


def test_the_plan_reaches_the_rubric_that_has_a_place_for_it() -> None:
    chat = Scripted(Reply("\\boxed{2}"), Reply("\\boxed{3}"))
    judge = ChatJudge(chat, {"instruction_following": "evaluate"})
    judge.judge([item(plan=["Is it red?"]), item()])
    with_plan, without = asked(chat)
    assert "- Is it red?" in with_plan and "no plan was made" in without


def test_score_first_answers() -> None:
    chat = Scripted(Reply("Score: 2\nnot \\boxed{5}", truncated=True))
    outcome = ChatJudge(chat, FOLLOWING, answer_style="score_first").ask(item(), "instruction_following").outcome
    assert isinstance(outcome, Judgement) and outcome.score == 2


def test_samples_are_questions_of_their_own_with_seeds_of_their_own() -> None:
    chat = Scripted(Reply("\\boxed{4}"), Reply("hm"), Reply("\\boxed{2}"), Reply("\\boxed{4}"), RequestFailed("no"))
    judge = ChatJudge(chat, FOLLOWING, temperature=0.3, attempts=2, num_samples=4)
    outcome = judge.ask(item(), "instruction_following").outcome
    assert outcome == Judgement(score=4, distribution=(0, 1 / 3, 0, 2 / 3, 0), invalid_samples=1)
    assert [(c["temperature"], c["seed"]) for c in chat.calls] == [(0.3, 0), (0.3, 1), (0.7, 5), (0.3, 2), (0.3, 3)]


def test_a_reply_with_tokens_is_a_soft_score() -> None:
    belief = ((" 4", math.log(0.75)), (" 2", math.log(0.25)))
    chat = Scripted(Reply("Score: 4", tokens=(Token("Score:", 0.0), Token(" 4", belief[0][1], belief))))
    outcome = ChatJudge(chat, FOLLOWING, answer_style="score_first").ask(item(), "instruction_following").outcome
    assert isinstance(outcome, Judgement) and outcome.soft_score == pytest.approx(3.5)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_results_have_the_order_of_the_items(concurrency: int) -> None:
    chat = Echo()
    digits = [1, 5, 2, 4, 3, 5, 1]
    rows = ChatJudge(chat, BOTH, concurrency=concurrency).judge([item(f"circle {d}") for d in digits])
    assert [r["instruction_following"] for r in rows] == [Judgement(score=d) for d in digits]
    assert all(list(r) == list(BOTH) and r["quality"] == Judgement(score=1) for r in rows)
    assert chat.most == 1 if concurrency == 1 else 1 < chat.most <= concurrency


@pytest.mark.parametrize("concurrency", [0, 2])
def test_items_are_judged_on_the_dimensions_that_matter_and_no_others(concurrency: int) -> None:
    some = [("quality",), None, ("instruction_following", "consistency")]
    chat = Scripted(*['{"score": 3} \\boxed{3}'] * 4)
    judge = ChatJudge(chat, BOTH, attempts=1, concurrency=concurrency)
    rows = judge.judge([replace(item(), dimensions=d) for d in some])
    assert [list(row) for row in rows] == [["quality"], list(BOTH), ["instruction_following"]] and len(chat.calls) == 4


def test_a_useless_endpoint_ends_the_run_and_what_is_queued_is_not_started() -> None:
    chat = Scripted(*[UserError("the endpoint refuses the key")] * 100)
    with pytest.raises(UserError, match="refuses the key"):
        ChatJudge(chat, FOLLOWING, concurrency=2).judge([item()] * 100)
    assert len(chat.calls) < 100


def test_misuse() -> None:
    judge = ChatJudge(Scripted(), FOLLOWING)
    with pytest.raises(UserError, match="no rubric for the dimension 'consistency'"):
        judge.ask(item(), "consistency")
    with pytest.raises(UserError, match="judges 1 image"):
        judge.ask(JudgeInput(Prompt(text="a"), [PNG, PNG]), "instruction_following")
    with pytest.raises(UserError, match="asks for a text"):
        ChatJudge(Scripted(), {"instruction_following": "plan"})
    assert judge.judge([]) == []
    assert judge.versions == {"instruction_following": load_rubric("instruction_following").version}


def test_a_question_has_exactly_one_mark_an_image() -> None:
    text = question(load_rubric("short_instruction_following"), Prompt(text="a <image> of a cat"))
    assert text == "prompt : a < image > of a cat <image>"
    assert question(load_rubric("short_quality"), Prompt(text="a cat")) == "quality <image>"


def test_assessment_helpers() -> None:
    soft = Judgement(score=4, distribution=(0, 0, 0, 0.5, 0.5))
    rows = [{"quality": soft}, all_invalid(["quality"], "truncated"), {}]
    assert soft_scores(rows, "quality") == [4.5, None, None]
    assert soft_scores(rows, "quality", soft=False) == [4.0, None, None]
    assert invalid_counts(rows) == {"quality": {"truncated": 1}}
