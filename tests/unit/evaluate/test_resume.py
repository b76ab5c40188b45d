"""The evaluate stage after a kill: finished shards are not sampled again, and the result is the uninterrupted one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from shared import CPU, TINY

from firm.chat.journal import OpenChat
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.evaluate.run import run
from firm.evaluate.suite import SUITES
from firm.policies.policy import Conditions, Policy, save_policy
from firm.records import Prompt, Sample, Summary
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards


class Killed(BaseException):
    """Stands for a kill -9."""


class Sizes:
    """Scores an image by its size; ``asked`` holds the prompts of all batches, of which the number ``kill`` ends it."""

    asked: list[list[str]] = []  # noqa: RUF012
    kill = -1

    def __init__(self, config: RunConfig, critic: Path, device: torch.device, open_chat: OpenChat) -> None:
        self.number = config.evaluate.num_images

    def prompts(self) -> list[Prompt]:
        return [Prompt(text=f"a {color} circle") for color in ("red", "blue", "green", "yellow")[: self.number]]

    def score(self, prompts: Sequence[Prompt], images: Sequence[bytes]) -> list[dict[str, Any]]:
        if len(self.asked) == self.kill:
            raise Killed
        self.asked.append([prompt.text for prompt in prompts])
        return [{"bytes": len(png)} for png in images]

    def summary(self, samples: Sequence[Sample]) -> Summary:
        return Summary(stage="evaluate", metrics={"bytes": float(sum(s.scores["bytes"] for s in samples))})


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> type[Sizes]:
    """The suite, under a name that the configuration can say."""
    module = ModuleType("sizes_of_images")
    module.Sizes = Sizes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(SUITES, "sizes", f"{module.__name__}:Sizes")
    monkeypatch.setattr(Sizes, "asked", [])
    monkeypatch.setattr(Sizes, "kill", -1)
    return Sizes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained policy; the suite needs no critic."""
    folder = tmp_path_factory.mktemp("rl")
    policy = Policy(TINY, CPU)
    for parameter in policy.train(None, (), seed=0).trainable:
        parameter.data.mul_(1.05)
    save_policy(folder / "policy", policy)
    return {"critic": folder, "policy": folder}


def config(num_images: int, *assignments: str) -> RunConfig:
    few = f"{{suite: sizes, num_images: {num_images}, num_inference_steps: 1, batch_size: 2}}"
    return load_config("gen-shapes", [f"evaluate={few}", *assignments])


def evaluate(folder: Path, inputs: dict[str, Path], num_images: int, *assignments: str) -> tuple[Summary, list[Sample]]:
    out = Output.open(str(folder))
    summary = run(config(num_images, *assignments), inputs, out)
    return summary, list(iter_shards(out.folder / "samples", Sample))


# A shard holds as many rows as a whole batch. Where the last batch of the base policy is a smaller one, shards end
# inside batches: what a shard lacks of its batch is sampled again.
@pytest.mark.parametrize(("num_images", "kill", "first"), [(4, 1, 1), (4, 3, 3), (3, 1, 1), (3, 2, 1), (3, 3, 2)])
def test_a_resumed_run_asks_for_the_rest_and_equals_the_whole(
    tmp_path: Path, inputs: dict[str, Path], sizes: type[Sizes], num_images: int, kill: int, first: int
) -> None:
    whole = evaluate(tmp_path / "whole", inputs, num_images)
    batches = list(sizes.asked)
    assert len(whole[1]) == 2 * num_images and len(batches) == 4
    sizes.asked.clear()
    sizes.kill = kill
    with pytest.raises(Killed):
        evaluate(tmp_path / "parts", inputs, num_images)
    sizes.asked.clear()
    sizes.kill = -1
    assert evaluate(tmp_path / "parts", inputs, num_images) == whole
    assert sizes.asked == batches[first:]


def test_a_finished_run_asks_for_nothing(tmp_path: Path, inputs: dict[str, Path], sizes: type[Sizes]) -> None:
    whole = evaluate(tmp_path, inputs, 4)
    sizes.asked.clear()
    assert evaluate(tmp_path, inputs, 4) == whole and sizes.asked == []


def test_the_base_is_sampled_with_guidance_as_well_where_a_scale_is_given(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    _, plain = evaluate(tmp_path / "plain", inputs, 3)
    _, three = evaluate(tmp_path / "three", inputs, 3, "evaluate.base_guidance_scale=3")
    assert [(s.policy, s.index) for s in three] == [(p, i) for p in ("base", "final", "guided") for i in range(3)]
    assert three[:6] == plain
    for base, guided in zip(three[:3], three[6:], strict=True):
        assert (base.prompt, base.seed) == (guided.prompt, guided.seed) and base.images != guided.images


@pytest.mark.parametrize(("tokens", "times"), [(1, 1), (2, 3)], ids=["the base", "another base"])
def test_prompts_are_encoded_once_for_all_policies_of_one_base(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tokens: int, times: int
) -> None:
    asked: list[list[str]] = []
    encode = Policy.encode

    def counted(policy: Policy, prompts: Sequence[Prompt]) -> Conditions:
        asked.append([prompt.text for prompt in prompts])
        return encode(policy, prompts)

    monkeypatch.setattr(Policy, "encode", counted)
    evaluate(tmp_path, inputs, 3, "evaluate.base_guidance_scale=3", f"policy.max_sequence_length={tokens}")
    assert asked == [["a red circle", "a blue circle"], [""], ["a green circle"], [""]] * times
