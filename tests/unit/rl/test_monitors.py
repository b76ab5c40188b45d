"""Monitors: each way to hack a reward is planted and found, and healthy batches raise no alarm."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ALONE, CPU, TINY, Redness

from firm.config import RewardConfig, RLConfig
from firm.config.loading import load_config
from firm.config.monitors import MonitorsConfig
from firm.config.reward import REWARD
from firm.critics.judge import JudgeInput, judge_inputs, judging
from firm.policies.policy import Policy
from firm.records import Assessment, Invalid, Judgement, Prompt
from firm.rl.audit import Audit
from firm.rl.monitors import SHARES, Alarm, alarms, all_alarms, means
from firm.rl.rollout import sample_groups, score, with_advantages
from firm.rl.run import summary
from firm.rl.train import _note

BOUNDS = MonitorsConfig()
HEALTHY = {name: 0.0 for name, _ in SHARES.values()}


# ---- numbers of an epoch


def test_means_leave_out_what_is_unknown_and_take_a_group_for_one_witness() -> None:
    rows: list[dict[str, float | None]] = [
        {"copies": None, "score_x": value} for value in (1.0, 1.0, None, 3.0, None, None)
    ]
    found = means(rows, 2)
    assert found["copies"] is None and found["score_x"] == pytest.approx(5 / 3)
    assert found["error_x"] == pytest.approx(np.std([1, 3], ddof=1) / 2**0.5)
    assert means(rows[4:], 2) == {"copies": None, "score_x": None, "error_x": None}


# ---- alarms


def lines(number: int, **changed: float | None) -> list[dict[str, Any]]:
    return [{**HEALTHY, **changed} for _ in range(number)]


def names(found: Sequence[Alarm]) -> list[str]:
    return [alarm.monitor for alarm in found]


@pytest.mark.parametrize("monitor", SHARES)
def test_a_share_beyond_its_bound_for_a_window_is_an_alarm(monitor: str) -> None:
    name, words = SHARES[monitor]
    bound = getattr(BOUNDS, monitor)
    assert alarms(lines(BOUNDS.window, **{name: bound}), BOUNDS) == []
    assert alarms(lines(BOUNDS.window - 1, **{name: 1.0}), BOUNDS) == []  # too few epochs to tell
    [alarm] = alarms(lines(9) + lines(BOUNDS.window, **{name: 1.0}), BOUNDS)
    assert (alarm.monitor, alarm.until, alarm.worst) == (monitor, 9 + BOUNDS.window, 1.0) and words in alarm.text
    off = BOUNDS.model_copy(update={monitor: 1.0})
    assert alarms(lines(BOUNDS.window, **{name: 1.0}), off) == []


def test_one_bad_epoch_is_no_alarm_and_unknown_ones_do_not_count() -> None:
    for monitor, (name, _) in SHARES.items():
        if monitor != "invalid":  # one epoch without a judge is 20% of five
            assert alarms(lines(9) + lines(1, **{name: 1.0}) + lines(1), BOUNDS) == []
        unknown = lines(2, **{name: 1.0}) + lines(3, **{name: None})
        assert names(alarms(unknown, BOUNDS)) == [monitor]


def test_a_run_has_one_alarm_a_monitor_from_first_to_last_in_its_worst_words() -> None:
    course = lines(6) + lines(6, blanks=0.6) + lines(6, blanks=0.9) + lines(9)
    [alarm] = all_alarms(course, BOUNDS)
    assert (alarm.since, alarm.until, alarm.worst) == (11, 20, pytest.approx(0.9)) and "90%" in alarm.text
    assert str(alarm).startswith("Alarm from epoch 11 to 20: 90% of the images")
    assert all_alarms([], BOUNDS) == [] == all_alarms(lines(50), BOUNDS)


def scores(
    random: np.random.Generator, epochs: int, groups: int, execution: float, consistency: float
) -> list[dict[str, Any]]:
    """A run of drawn prompts, each with an ease of its own, in which the scores change evenly by so many points."""
    rows = []
    for epoch in range(epochs):
        seen: list[dict[str, float | None]] = []
        for _ in range(groups):
            ease = random.normal(size=2)
            for _ in range(4):
                by = epoch / (epochs - 1)
                x, y = np.array([3 + execution * by, 4 + consistency * by]) + ease + 0.5 * random.normal(size=2)
                seen.append({"score_execution": float(x), "score_consistency": float(y)})
        rows.append({**HEALTHY, **means(seen, 4)})
    return rows


@pytest.mark.parametrize(("execution", "consistency"), [(1.5, -1.5), (-1.8, 1.2)])
def test_one_dimension_bought_with_another_is_an_alarm(execution: float, consistency: float) -> None:
    [alarm] = all_alarms(scores(np.random.default_rng(0), 60, 16, execution, consistency), BOUNDS)
    fallen, risen = ("consistency", "execution") if execution > 0 else ("execution", "consistency")
    assert alarm.monitor == "fall" and 1 < alarm.worst < 2.2 and alarm.since > 2 * BOUNDS.window
    assert f"the critic's mean {fallen} fell by" in alarm.text and f"{risen} rose" in alarm.text


@pytest.mark.parametrize(
    ("execution", "consistency"),
    [(0, 0), (1.0, 0.5), (1.0, -0.3), (-1.0, -1.0), (0, -1.0)],
    ids=["still", "both rise", "a small price", "both fall", "one falls"],
)
def test_no_alarm_without_a_trade(execution: float, consistency: float) -> None:
    raised = sum(
        bool(all_alarms(scores(np.random.default_rng(seed), 40, 12, execution, consistency), BOUNDS))
        for seed in range(20)
    )
    assert raised <= 1


def test_one_dimension_alone_cannot_diverge_and_unknown_scores_are_no_change() -> None:
    rows = [{**HEALTHY, "score_x": 5 - epoch / 10, "error_x": 0.0} for epoch in range(30)]
    assert all_alarms(rows, BOUNDS) == []
    both = [{**row, "score_y": epoch / 10, "error_y": None} for epoch, row in enumerate(rows)]
    assert all_alarms(both, BOUNDS) == []
    known = [{**row, "error_y": 0.0} for row in both]
    assert names(all_alarms(known, BOUNDS)) == ["fall"]


def test_alarms_are_in_the_progress_and_in_the_summary() -> None:
    config = load_config("gen-shapes")
    values = {REWARD: (0.5, 0.6), **dict.fromkeys(config.reward.dimensions, (3.0, 4.0))}
    audit = Audit(epoch=0, prompts=(0, 1), critic=values, auditor=values)
    numbers = {"reward": 0.5, "loss": 1.0, "old_deviation": 0.1, "invalid_judgements": 0.0}
    course = [{"step": i, **numbers, **line} for i, line in enumerate(lines(6, blanks=0.75), 1)]
    told = _note(course, [audit], config.rl.monitors)
    assert told.endswith("; ALARM: 75% of the images were nearly empty (bound 50%)")
    assert "ALARM" not in _note(course[:4], [audit], config.rl.monitors)
    loud = summary(config, [audit, audit.model_copy(update={"sample": "report"})], course)
    sentence = "Alarm from epoch 5 to 6: 75% of the images were nearly empty (bound 50%)."
    assert loud.metrics["alarms"] == 1 and loud.notes[1:] == [sentence]
    assert [row["sentence"] for row in loud.tables["alarms"]] == [sentence]
    assert {"blanks", "copies", "zero_std_groups", "invalid_share"} <= {curve.name for curve in loud.curves}
    quiet = summary(config, [audit, audit.model_copy(update={"sample": "report"})], course[:4])
    assert quiet.metrics["alarms"] == 0 and len(quiet.notes) == 1 and quiet.tables["alarms"] == []


# ---- in a rollout


class Split(Redness):
    """Judges two dimensions; every other judgement of the second fails."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        self.asked += items
        return [
            {"execution": Judgement(score=4), "consistency": Invalid(reason="empty") if i % 2 else Judgement(score=2)}
            for i in range(len(items))
        ]


def test_a_rollout_watches_its_images_and_the_scores_of_each_dimension() -> None:
    policy = Policy(TINY, CPU)
    policy.train(None, ("old",), seed=0)
    rl = RLConfig(prompts_per_epoch=2, group_size=4, max_epochs=1, num_inference_steps=2)
    with judging(Split()) as critic:
        groups = sample_groups(
            policy, [Prompt(text="a red circle"), Prompt(text="a blue square")], rl, 0, 0, ALONE, critic
        )
        stats = with_advantages(groups, *score(critic, groups, RewardConfig(formula="cme")), rl, ALONE).stats
    assert (stats["score_execution"], stats["score_consistency"]) == (4, 2) and stats["error_execution"] == 0
    assert (stats["invalid_share"], stats["invalid_judgements"], stats["zero_std_groups"]) == (0.5, 4, 1)
    assert "copies" not in stats and 0 <= (stats["blanks"] or 0) <= 1


def test_an_editor_that_returns_its_source_is_seen(tmp_path: Any) -> None:
    """The samples are what the editor is given, in another size and as JPEG."""
    policy = Policy(TINY, CPU)
    policy.train(None, ("old",), seed=0)
    rl = RLConfig(prompts_per_epoch=2, group_size=4, max_epochs=1, num_inference_steps=2)
    groups = sample_groups(policy, [Prompt(text="a red circle"), Prompt(text="a blue square")], rl, 0, 0, ALONE)
    prompts = []
    images = [item.images[0] for item in groups.items]
    for i, image in enumerate(images):
        picture = Image.open(io.BytesIO(image)).resize((96, 96))
        picture.save(tmp_path / f"{i}.jpg", quality=95)
        prompts.append(Prompt(text="make it red", image=str(tmp_path / f"{i}.jpg")))
    copied = type(groups)(judge_inputs(prompts, images), groups.generated, groups.first)
    with judging(Split()) as critic:
        critic.add(copied.items)
        stats = with_advantages(copied, *score(critic, copied, RewardConfig(formula="cme")), rl, ALONE).stats
    assert stats["copies"] == 1
    assert all(len(item.images) == 2 and item.images[1] == png for item, png in zip(copied.items, images, strict=True))
