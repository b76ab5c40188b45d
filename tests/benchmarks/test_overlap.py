"""A rollout whose critic takes 50 ms an image, against sampling and judging alone, in turns: `make bench`."""

import json
import statistics
import sys
import time

import pytest
from servers import free_port, started
from shared import ALONE, CPU, TINY
from torch import Tensor

from firm.config import EndpointChat, RewardConfig, RLConfig
from firm.critics.judge import judging
from firm.critics.load import open_judge
from firm.policies.policy import Policy
from firm.records import Prompt
from firm.rl.rollout import sample_groups, score

ROUNDS = 5
CRITIC = """
import sys, time
from firm.chat.messages import Reply
from firm.chat.server import ChatServer

class Critic:
    name = "critic"

    def complete(self, _messages, **_):
        time.sleep(0.05)
        return Reply("\\\\boxed{4}")

ChatServer(Critic(), port=int(sys.argv[1])).serve()
"""


def wait(noise: Tensor) -> Tensor:
    time.sleep(0.05 * len(noise))
    return noise


@pytest.mark.bench
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("sampler", ["this processor", "a device"])
def test_a_rollout_takes_about_as_long_as_the_longer_of_its_halves(
    sampler: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device samples as fast as the critic judges one after the other, and leaves this processor alone."""
    if sampler == "a device":
        monkeypatch.setattr("firm.policies.generate.sample", lambda _policy, _conditions, noise, *_: wait(noise))
    policy = Policy(TINY, CPU)
    policy.train(None, ("old",), seed=0)
    prompts = [Prompt(text=text) for text in ("a red circle", "a blue square", "a green triangle", "a yellow circle")]
    rl = RLConfig(prompts_per_epoch=4, group_size=16, max_epochs=1, num_inference_steps=10, batch_size=4)
    formula = RewardConfig(formula="base_only", base="instruction_following")
    seconds: dict[str, list[float]] = {"sampling": [], "judging": [], "both": []}
    port = free_port()
    with started([sys.executable, "-c", CRITIC, str(port)]):  # a process of its own, as a critic elsewhere has
        config = EndpointChat(base_url=f"http://127.0.0.1:{port}/v1", model="critic", concurrency=at_once)
        judge = open_judge(config, {"instruction_following": "instruction_following"})
        for _ in range(ROUNDS + 1):
            start = time.monotonic()
            groups = sample_groups(policy, prompts, rl, 0, 0, ALONE)
            sampled = time.monotonic()
            judge.judge(groups.items)
            judged = time.monotonic()
            with judging(judge) as critic:
                score(critic, sample_groups(policy, prompts, rl, 0, 0, ALONE, critic), formula)
            both = time.monotonic()
            for name, took in (("sampling", sampled - start), ("judging", judged - sampled), ("both", both - judged)):
                seconds[name].append(took)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first is slow
    ratio = medians["both"] / max(medians["sampling"], medians["judging"])
    print(
        f"\n{at_once} at once: " + json.dumps({name: round(value, 3) for name, value in medians.items()}),
        f"{ratio:.3f}",
    )
    assert ratio <= 1.15
