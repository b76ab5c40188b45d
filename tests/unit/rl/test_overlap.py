"""Judging while sampling: a server is asked as images come, in order and with the same outcomes; its errors end it."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import free_port
from shared import ALONE, CPU, TINY, Redness

from firm.chat.journal import Journals
from firm.chat.messages import ChatMessage, Reply
from firm.chat.server import ChatServer
from firm.config import EndpointChat, RewardConfig, RLConfig
from firm.critics.answers import write_answer
from firm.critics.judge import ChatJudge, JudgeInput, judging
from firm.critics.load import open_judge
from firm.policies.policy import Policy
from firm.records import Assessment, Prompt, UserError
from firm.rl.rollout import Rollout, sample_groups, score, with_advantages

DELAY_S = 0.05
BASE = RewardConfig(formula="base_only", base="instruction_following")
PROMPTS = [Prompt(text=text) for text in ("a red circle", "a blue square", "a green triangle", "a yellow circle")]


class Critic:
    """A served critic that takes its time; it scores by the length of what it is shown."""

    name = "critic"

    def __init__(self, delay_s: float = DELAY_S) -> None:
        self.delay_s, self.times = delay_s, list[float]()

    def complete(self, messages: Sequence[ChatMessage], **_: object) -> Reply:
        self.times.append(time.monotonic())
        time.sleep(self.delay_s)
        size = sum(len(part["image_url"]["url"]) for part in messages[0]["content"] if part["type"] == "image_url")
        return Reply(write_answer(1 + size % 5, "so many bytes", "reason_first", "boxed"))


@contextmanager
def served(critic: Critic) -> Iterator[ChatJudge]:
    with ChatServer(critic).running() as url:
        config = EndpointChat(base_url=url, model="critic", concurrency=1)
        yield open_judge(config, {"instruction_following": "instruction_following"})


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy(TINY, CPU)
    made.train(None, ("old",), seed=0)
    return made


def settings(**changes: Any) -> RLConfig:
    few: dict[str, Any] = {"prompts_per_epoch": 4, "group_size": 8, "max_epochs": 1, "num_inference_steps": 3}
    return RLConfig(**{**few, "batch_size": 4, **changes})


def roll(policy: Policy, critic: Any, rl: RLConfig) -> Rollout:
    with judging(critic) as judged:
        groups = sample_groups(policy, PROMPTS, rl, 0, 0, ALONE, judged)
        return with_advantages(groups, *score(judged, groups, BASE), rl, ALONE)


class Later:
    """A judge of which only `judge` is known, so that it is asked in the end."""

    def __init__(self, judge: ChatJudge) -> None:
        self.judge = judge.judge


def test_a_server_judges_while_the_policy_samples(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take about as long alone; one after the other takes the sum. A busy machine makes all three longer."""

    def sample(_policy: object, _conditions: object, noise: torch.Tensor, *_: object) -> torch.Tensor:
        time.sleep(len(noise) * DELAY_S)
        sampled.append(time.monotonic())
        return noise

    monkeypatch.setattr("firm.policies.generate.sample", sample)
    sampled: list[float] = []
    critic, rl = Critic(), settings()
    with served(critic) as judge:
        roll(policy, judge, settings(prompts_per_epoch=1))  # connections are there
        start = time.monotonic()
        groups = sample_groups(policy, PROMPTS, rl, 0, 0, ALONE)
        judge.judge(groups.items)
        one_after_the_other_s = time.monotonic() - start
        sampled.clear()
        critic.times.clear()
        start = time.monotonic()
        roll(policy, judge, rl)
        took_s = time.monotonic() - start
    asked = [sum(at < end for at in critic.times) for end in sampled]
    assert len(critic.times) == 32 and asked[0] == 0 and asked == sorted(asked) and asked[-1] >= 8
    assert took_s < 0.8 * one_after_the_other_s, (
        f"{took_s:.2f} s, and one after the other {one_after_the_other_s:.2f} s"
    )


def test_rewards_do_not_depend_on_it(policy: Policy) -> None:
    rl = settings(batch_size=5)
    with served(Critic(0)) as judge:
        ahead, later = roll(policy, judge, rl), roll(policy, Later(judge), rl)
    assert len(set(later.advantage.tolist())) > 4
    assert torch.equal(ahead.advantage, later.advantage) and torch.equal(ahead.latents, later.latents)
    assert ahead.stats == later.stats


def test_a_judge_in_this_process_is_asked_once_with_everything(policy: Policy) -> None:
    """It chooses its batches, and a judgement may differ in the last bit with these."""
    calls: list[int] = []

    class Here(Redness):
        def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
            calls.append(len(items))
            return super().judge(items)

    roll(policy, Here(), settings())
    assert calls == [32]


def test_an_error_of_the_judge_ends_sampling_and_what_waits() -> None:
    """The third question shows that it is broken; what waits behind it is never asked."""

    class Breaking(Critic):
        def complete(self, messages: Sequence[ChatMessage], **options: Any) -> Reply:
            if len(self.times) == 2:
                raise UserError("the critic is broken", "there")
            return super().complete(messages, **options)

    critic, made = Breaking(), list[int]()
    judge = ChatJudge(critic, {"instruction_following": "instruction_following"}, concurrency=1)
    with pytest.raises(UserError, match="the critic is broken"), judging(judge) as judged:
        for number in range(100):
            made.append(number)
            judged.add([JudgeInput(PROMPTS[0], [b"\x89PNG\r\n\x1a\n"])] * 20)
            time.sleep(0.05)
    assert len(made) < 50 and len(critic.times) == 2


def test_an_error_does_not_wait_for_the_answers_before_it() -> None:
    class Mixed(Critic):
        def complete(self, messages: Sequence[ChatMessage], **options: Any) -> Reply:
            if "slow" in str(messages):
                time.sleep(3)
                return Reply("\\boxed{3}")
            raised.append(time.monotonic())
            raise UserError("the critic is broken", "there")

    raised: list[float] = []
    judge = ChatJudge(Mixed(), {"instruction_following": "instruction_following"}, concurrency=2)
    with ThreadPoolExecutor(1) as executor, judging(judge) as judged:
        judged.add([JudgeInput(Prompt(text=text), [b"\x89PNG\r\n\x1a\n"]) for text in ("slow", "fast")])
        waiting = executor.submit(judged.assessments)
        with pytest.raises(UserError, match="broken"):
            waiting.result(1.5)


@pytest.mark.parametrize("critic", [Critic(600), None], ids=["hangs", "is gone"])
def test_who_is_told_to_end_waits_for_no_answer(tmp_path: Path, critic: Critic | None) -> None:
    """Judging, between two batches or in the end; deadline and patience are ten minutes."""
    gone = nullcontext(f"http://127.0.0.1:{free_port()}/v1")
    with ChatServer(critic).running() if critic else gone as url:
        config = EndpointChat(base_url=url, model="critic", concurrency=2, patience_s=600)
        start = time.monotonic()
        with pytest.raises(SystemExit), Journals(tmp_path) as open_chat:
            chat = open_chat("critic", config)
            with judging(open_judge(config, {"quality": "quality"}, chat=chat)) as judged:
                judged.add([JudgeInput(PROMPTS[0], [b"\x89PNG\r\n\x1a\n"])] * 5)
                time.sleep(0.5)
                raise SystemExit(143)
        while any(thread.name.startswith("judge") for thread in threading.enumerate()):
            assert time.monotonic() - start < 10, "a thread waits, and this process with it"
            time.sleep(0.05)
