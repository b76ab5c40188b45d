"""One critic for many callers: questions encoded one by one, batches of a kind, long answers behind short ones."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from shared import CPU

from firm.chat.messages import Caller, RequestFailed, user_message
from firm.config import CriticConfig
from firm.config.serve import QuestionLimits
from firm.critics import shifts
from firm.critics.batching import BatchingChat
from firm.critics.local import LocalCritic
from firm.critics.pen import Manner
from firm.images import encode_image
from firm.shapes.models import WEIGHTS

PNG = encode_image(Image.new("RGB", (32, 32), "red"))
SETTINGS: dict[str, Any] = {"model": "any", "rubrics": {}, "dtype": "float32", "max_new_tokens": 1000}


@pytest.fixture(scope="module")
def critic() -> LocalCritic:
    return LocalCritic(WEIGHTS / "critic", CriticConfig(**SETTINGS), CPU)


def ask(chat: BatchingChat, text: str, caller: Caller | None = None, **options: Any) -> str:
    plain: dict[str, Any] = {"max_tokens": 400, "temperature": 0.0, "seed": 1, "caller": caller}
    return chat.complete([user_message(text, [PNG])], **{**plain, **options}).text


def test_answers_of_one_batch_are_each_written_in_their_manner(critic: LocalCritic) -> None:
    manners = [Manner(3), Manner(30, top_logprobs=2), Manner(30, temperature=2.0, seed=7, top_logprobs=0), Manner(30)]
    one = critic.encoder.questions(["<image>what is it"], [[PNG]])
    together = critic.write(critic.encoder.questions(["<image>what is it"] * 4, [[PNG]] * 4), manners)
    alone = [critic.write(one, [manner])[0] for manner in manners]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [reply.truncated for reply in together] == [reply.truncated for reply in alone]
    assert together[0].truncated and not together[3].truncated
    assert [len(token.top) for reply in together for token in reply.tokens[:1]] == [2, 0]


def test_nobody_waits_for_a_long_answer_but_who_asked(critic: LocalCritic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifts, "MIN_LONG_S", 0.2)
    chat = BatchingChat("tiny", critic)
    chat.warm_up()
    text = "red " * 900
    asked = critic.encoder.questions([f"<image>{text}"], [[PNG]])
    [expected] = critic.write(asked, [Manner(1000)])
    assert expected.truncated
    aside = threading.Event()
    caller = Caller(aside=lambda cost_s: aside.set())
    with ThreadPoolExecutor(1) as executor:
        long = executor.submit(ask, chat, text, caller, max_tokens=1000)
        assert aside.wait(20)
        for number in range(2):
            assert ask(chat, f"is it {number}", max_tokens=5)
            assert not long.done()
        assert long.result(60) == expected.text  # though the model did something else between its tokens
    assert caller.cost_s > 0


def test_a_question_with_too_many_tokens_is_refused_alone(critic: LocalCritic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifts, "MIN_LONG_S", 600)  # on a slow machine, too, no answer is written again
    chat = BatchingChat("tiny", critic, QuestionLimits(max_question_tokens=100), patience_s=2)
    with ThreadPoolExecutor(3) as executor:
        answers = [executor.submit(ask, chat, text) for text in ("is it", "red " * 90, "is it red")]
        assert answers[0].result(60) and answers[2].result(60)
        with pytest.raises(RequestFailed, match="has 1[0-9][0-9] tokens, with those of its images; 100 may be"):
            answers[1].result(60)
    assert chat.batches == 1


def test_a_long_question_is_no_batch_with_short_ones(critic: LocalCritic, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, score = list[list[int]](), critic.score

    def noted(inputs: dict[str, Any]) -> list[list[float]]:
        asked.append(sorted(inputs["attention_mask"].sum(1).tolist()))
        return score(inputs)

    monkeypatch.setattr(critic, "score", noted)
    monkeypatch.setattr(critic, "config", CriticConfig(**SETTINGS, answer_style="score_first"))
    chat = BatchingChat("tiny", critic, patience_s=2)
    texts = ["is it"] * 4 + ["red " * 900] * 4
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda text: ask(chat, text, max_tokens=2), texts))
    assert sum(map(len, asked)) == 8 and max(map(max, asked)) > 900
    assert all(batch[-1] <= 4 * batch[0] and batch[-1] * len(batch) <= 2048 for batch in asked)
