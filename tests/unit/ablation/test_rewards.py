"""Which rewards are compared, and what is different in their runs: the reward, and that nobody stops RL."""

from typing import Any

import pytest
from edits import edit_run

from firm.ablation.rewards import plan
from firm.config import RunConfig, for_stage
from firm.config.loading import load_config, parse_config
from firm.records import UserError


@pytest.fixture
def generation() -> RunConfig:
    return load_config("gen-shapes")


@pytest.fixture
def editing() -> RunConfig:
    return parse_config(edit_run())


def test_editing_compares_the_paper_s_rewards(editing: RunConfig) -> None:
    found = {
        one.reward: (one.label, one.config.reward.formula, one.config.reward.weights) for one in plan(editing, [7])
    }
    assert found == {
        "weighted-sum-0.5-0.5": ("weighted sum 0.5/0.5", "weighted_sum", [0.5, 0.5]),
        "weighted-sum-0.6-0.4": ("weighted sum 0.6/0.4", "weighted_sum", [0.6, 0.4]),
        "base-only": ("execution only", "base_only", [1.0]),
        "cme": ("CME", "cme", [0.6, 0.4]),
    }


def test_generation_compares_qma_with_its_base_and_more_on_request(generation: RunConfig) -> None:
    assert [one.label for one in plan(generation, [0])] == ["instruction following only", "QMA"]
    asked = plan(generation, [0], ["qma", "weighted-sum-0.4-0.6"])
    assert [one.label for one in asked] == ["weighted sum 0.4/0.6", "QMA"]
    assert asked[0].config.reward.weights == [0.4, 0.6]


def test_a_weighted_sum_may_have_any_weights(editing: RunConfig) -> None:
    names = ["cme", "weighted-sum-0.2-0.8", "base-only", "weighted-sum-1-0", "weighted-sum-.20-.80"]
    found = {one.reward: one.config.reward.weights for one in plan(editing, [0], names)}
    assert list(found) == ["weighted-sum-0.2-0.8", "weighted-sum-1-0", "base-only", "cme"]
    assert found["weighted-sum-0.2-0.8"] == [0.2, 0.8] and found["weighted-sum-1-0"] == [1, 0]


def test_a_seed_is_finished_before_the_next(generation: RunConfig) -> None:
    folders = [one.folder for one in plan(generation, [3, 1, 3])]
    assert folders == ["base-only-seed-3", "qma-seed-3", "base-only-seed-1", "qma-seed-1"]
    assert [one.config.seed for one in plan(generation, [3, 1])] == [3, 3, 1, 1]


@pytest.mark.parametrize("task", ["generation", "editing"])
def test_runs_differ_in_nothing_else(task: str, request: pytest.FixtureRequest) -> None:
    config: RunConfig = request.getfixturevalue(task)
    for one in plan(config, [config.seed]):
        gate = one.config.bench.gate
        assert not one.config.auditor.stops and config.auditor.stops
        assert gate.accept_gaps == [gap for gap in config.bench.gate.accept_gaps if gap in gaps(one.config)]
        same = {
            "reward": config.reward,
            "auditor": one.config.auditor.model_copy(update={"stops": True}),
            "bench": one.config.bench.model_copy(update={"gate": config.bench.gate}),
        }
        assert one.config.model_copy(update=same) == for_stage(config, "rl")
        assert one.config.reward.dimensions[0] == config.reward.base


def gaps(config: RunConfig) -> list[str]:
    return config.bench.gaps(config.reward.dimensions)


def test_weights_and_hard_scores_of_the_configuration_stay(generation: RunConfig) -> None:
    reward = {"formula": "qma", "weights": [0.1, 0.9], "soft": False}
    config = parse_config({**generation.model_dump(mode="json"), "reward": reward})
    only, named = (one.config.reward for one in plan(config, [0]))
    assert named == config.reward and only.soft is False
    other = parse_config({**generation.model_dump(mode="json"), "reward": {**config.reward.model_dump(), **SUM}})
    assert plan(other, [0])[1].config.reward.weights == [0.4, 0.6]  # the paper's: these are no weights of QMA


SUM: dict[str, Any] = {"formula": "weighted_sum", "weights": [0.7, 0.3]}


def test_the_store_is_that_of_the_run(generation: RunConfig) -> None:
    [one, _] = plan(generation, [0])
    assert one.at("elsewhere").config == one.config.model_copy(update={"store": "elsewhere"})


@pytest.mark.parametrize(
    ("overrides", "seeds", "names", "words"),
    [
        ([], [], [], ["needs a seed", "--seed 0"]),
        ([], [-1], [], ["seed: Input should be greater"]),
        ([], [0], ["cme"], ["no reward 'cme' for this task", "qma, base-only or weighted-sum-A-B"]),
        ([], [0], ["weighted-sum-0.4-0.5"], ["no reward 'weighted-sum-0.4-0.5'", "add up to 1"]),
        ([], [0], ["weighted-sum-0.4-0.3-0.3"], ["no reward 'weighted-sum-0.4-0.3-0.3'"]),
        (["rounds=2"], [0], [], ["one round", "rounds=1"]),
        (
            ["reward={formula: base_only, base: quality}"],
            [0],
            [],
            ["no rewards are known for base quality and bonuses []", "(cme)", "(qma)"],
        ),
    ],
)
def test_what_cannot_be_compared_is_named(
    overrides: list[str], seeds: list[int], names: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        plan(load_config("gen-shapes", overrides), seeds, names)
    assert caught.value.usage and all(word in str(caught.value) for word in words), str(caught.value)
