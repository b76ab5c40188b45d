"""The held-out suite: means, paired gains, what is left out of them, and the prompts it asks for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from shared import CPU, HTTPRequest, serving

from firm.config import RunConfig
from firm.config.loading import load_config
from firm.evaluate.held_out import HeldOut
from firm.images import encode_image
from firm.prompts import load_prompts
from firm.records import Invalid, Judgement, Prompt, Sample, Summary
from firm.shapes import teacher
from firm.shapes.generation import candidate

DIMENSION = "instruction_following"
Soft = tuple[float, float, float, float, float]
Score = int | Soft | None  # a hard score, the distribution of a soft one, or an invalid judgement


def config(*assignments: str, url: str = "http://127.0.0.1:9", preset: str = "gen-shapes") -> RunConfig:
    """A shapes run with a served critic, so that none has to be trained; it is asked by `score` only."""
    endpoint = f"critic.endpoint={{kind: endpoint, base_url: '{url}/v1', model: m}}"
    rubrics = f"critic.rubrics={{{', '.join(f'{d}: short_{d}' for d in load_config(preset).reward.dimensions)}}}"
    critic = ["critic.kind=endpoint", "critic.answer_style=score_first", endpoint, rubrics, "reward.soft=false"]
    return load_config(preset, [*critic, "evaluate.num_bootstrap=20", *assignments])


def suite(*assignments: str, **options: str) -> HeldOut:
    return HeldOut(config(*assignments, **options), Path(), CPU)


def outcome(score: Score) -> dict[str, Any]:
    made: Judgement | Invalid
    if score is None:
        made = Invalid(reason="unparsable")
    elif isinstance(score, int):
        made = Judgement(score=score)
    else:
        made = Judgement(score=1 + max(range(5), key=score.__getitem__), distribution=score)
    return made.model_dump(mode="json")


def samples(judge: str, base: list[Score], final: list[Score], dimension: str = DIMENSION) -> list[Sample]:
    """Images that one judge has judged on one dimension, and on nothing else."""
    return [
        Sample(
            index=i,
            prompt=Prompt(text=f"prompt {i}"),
            seed=i,
            policy=policy,  # type: ignore[arg-type]
            images=[],
            scores={"auditor": {}, "critic": {}} | {judge: {dimension: outcome(score)}},
        )
        for policy, scores in (("base", base), ("final", final))
        for i, score in enumerate(scores)
    ]


def rows(summary: Summary) -> dict[str, dict[str, Any]]:
    """Policy -> row of the table of scores."""
    return {row["policy"]: row for row in summary.tables["scores"]}


def test_means_and_the_paired_gain() -> None:
    summary = suite().summary(samples("auditor", [1, 2, 3, 4], [3, 2, 4, 5]))
    assert summary.stage == "evaluate" and summary.metrics == {
        f"auditor_{DIMENSION}_base": 2.5,
        f"auditor_{DIMENSION}_final": 3.5,
        f"auditor_{DIMENSION}_gain": 1.0,
        f"auditor_{DIMENSION}_full_marks_base": 0.0,
        f"auditor_{DIMENSION}_full_marks_final": 0.25,
    }
    found = rows(summary)
    assert list(found) == ["base", "final", "gain"]
    for row in found.values():
        assert (row["judge"], row["dimension"], row["n"], row["invalid"]) == ("auditor", DIMENSION, 4, 0)
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["mean"] == summary.metrics[f"auditor_{DIMENSION}_{row['policy']}"]


@pytest.mark.parametrize(("preset", "weight"), [("gen-shapes", 0.4), ("edit-shapes", 0.6)])
def test_the_reward_is_a_row_before_the_scores_that_it_is_made_of(preset: str, weight: float) -> None:
    """A gain on one dimension is bought with the other: what the formula makes of both, image by image, fell."""
    made = suite(preset=preset)
    base, bonus = made.config.reward.dimensions
    both = [
        a.model_copy(update={"scores": {"critic": {}, "auditor": a.scores["auditor"] | b.scores["auditor"]}})
        for a, b in zip(
            samples("auditor", [3, 4, 4, 2], [4, 5, 5, 3], base),
            samples("auditor", [5, 5, 5, 3], [1, 1, 1, None], bonus),
            strict=True,
        )
    ]
    summary = made.summary(both)
    first, *others = dict.fromkeys(row["dimension"] for row in summary.tables["scores"])
    assert first == "reward" and set(others) == {base, bonus}
    before, after, gain = (row for row in summary.tables["scores"] if row["dimension"] == "reward")
    rewards = [0.5, 0.75, 0.75, 0.25 * (weight + (1 - weight) / 2)]
    assert before["mean"] == pytest.approx(sum(rewards) / 4) and before["n"] == 4
    assert after["mean"] == pytest.approx(weight * (0.75 + 1 + 1) / 3) and after["invalid"] == 1
    assert gain["mean"] == pytest.approx(weight * 2.75 / 3 - 2 / 3) and gain["n"] == 3 and gain["high"] < 0
    assert summary.metrics["auditor_reward_gain"] == gain["mean"] and summary.metrics[f"auditor_{base}_gain"] > 0
    assert not [name for name in summary.metrics if "reward_full_marks" in name]
    assert {row["dimension"] for row in summary.tables["invalid"]} == {base, bonus}, "no failure is counted twice"


def test_the_interval_of_the_gain_is_that_of_the_differences() -> None:
    """Scores differ much between prompts, but every prompt gains one: of that nothing is uncertain."""
    found = rows(suite().summary(samples("auditor", [1, 4, 1, 4], [2, 5, 2, 5])))
    assert (found["gain"]["mean"], found["gain"]["low"], found["gain"]["high"]) == (1, 1, 1)
    assert found["base"]["low"] < found["base"]["high"]


def test_the_order_of_base_and_final_does_not_matter() -> None:
    given = samples("auditor", [1, 2, 3], [3, 2, 5])
    mixed = [sample for pair in zip(given[3:], given[:3], strict=True) for sample in pair]
    assert suite().summary(mixed) == suite().summary(given)


def test_invalid_judgements_are_left_out_and_counted() -> None:
    summary = suite().summary(samples("critic", [1, None, 3, 5], [2, 4, None, 5], "quality"))
    found = rows(summary)
    assert (found["base"]["n"], found["base"]["invalid"], found["base"]["mean"]) == (3, 1, 3)
    assert (found["final"]["n"], found["final"]["invalid"]) == (3, 1)
    assert found["final"]["mean"] == pytest.approx(11 / 3)
    # only the first and the last image have both judgements
    assert (found["gain"]["n"], found["gain"]["invalid"], found["gain"]["mean"]) == (2, 2, 0.5)


def test_soft_scores_are_the_expectation_and_full_marks_start_at_four_and_a_half() -> None:
    soft: list[Score] = [(0, 0, 0, 0.5, 0.5), (0, 0, 0, 0.6, 0.4)]  # 4.5 and 4.4
    summary = suite().summary(samples("critic", soft, [5, 4]))
    assert summary.metrics[f"critic_{DIMENSION}_base"] == pytest.approx(4.45)
    assert summary.metrics[f"critic_{DIMENSION}_full_marks_base"] == 0.5
    assert summary.metrics[f"critic_{DIMENSION}_full_marks_final"] == 0.5


@pytest.mark.parametrize(
    ("base", "final"),
    [([None, None], [None, None]), ([None, None], [3, 4]), ([3, None], [None, 4])],
    ids=["nothing", "one policy", "no pair"],
)
def test_a_judge_without_a_valid_pair_has_no_numbers(base: list[Score], final: list[Score]) -> None:
    valid, invalid = samples("auditor", [1, 2], [2, 2]), samples("critic", base, final)
    both = [
        a.model_copy(update={"scores": a.scores | {"critic": b.scores["critic"]}})
        for a, b in zip(valid, invalid, strict=True)
    ]
    summary = suite().summary(both)
    assert {row["judge"] for row in summary.tables["scores"]} == {"auditor"}
    mine = [r for r in summary.tables["invalid"] if (r["judge"], r["dimension"]) == ("critic", DIMENSION)]
    failed = {r["policy"]: r["invalid"] for r in mine}
    assert failed == {"base": base.count(None), "final": final.count(None)}, "what failed is counted all the same"
    means = {f"critic_{DIMENSION}_{which}" for which in ("base", "final", "gain")}
    assert summary.metrics and not means & set(summary.metrics)


def test_every_held_out_prompt_equally_often_in_seeded_order() -> None:
    held_out = load_prompts(config().prompts, "test")
    more = 2 * len(held_out) + 3
    drawn = suite(f"evaluate.num_images={more}").prompts()
    counts = Counter(drawn)
    assert len(drawn) == more and set(counts) == set(held_out)
    assert sorted(counts.values()) == [2] * (len(held_out) - 3) + [3] * 3
    assert drawn == suite(f"evaluate.num_images={more}").prompts()
    other = suite(f"evaluate.num_images={more}", "seed=1").prompts()
    assert other != drawn and Counter(other[: len(held_out)]) == Counter(held_out)
    assert suite("evaluate.num_images=5").prompts() == drawn[:5]


def critic(request: HTTPRequest) -> None:
    """A served critic that gives a 2, but has nothing to say on quality."""
    text = "I see." if b"quality" in request.body else "Score: 2"
    answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    request.reply(200, json.dumps(answer).encode())


def test_both_judges_score_every_image() -> None:
    texts, pictures = zip(*[candidate(i, 0, "train") for i in range(3)], strict=True)
    prompts, images = [Prompt(text=text) for text in texts], [encode_image(picture) for picture in pictures]
    with serving(critic) as url:
        found = suite(url=url).score(prompts, images)
    assert [scores["auditor"][DIMENSION]["score"] for scores in found] == [
        teacher.instruction_following(text, picture) for text, picture in zip(texts, pictures, strict=True)
    ]
    for scores in found:
        assert scores["critic"][DIMENSION]["score"] == 2 and scores["critic"]["quality"]["reason"] == "unparsable"


def test_the_base_with_guidance_is_a_column_of_its_own() -> None:
    """It takes no part in the gain, which is between policies sampled alike."""
    plain = samples("auditor", [1, 2], [3, 4])
    guided = [s.model_copy(update={"policy": "guided"}) for s in samples("auditor", [4, 5], []) if s.policy == "base"]
    found = rows(suite().summary([*plain, *guided]))
    assert list(found) == ["base", "final", "guided", "gain"]
    assert (found["guided"]["mean"], found["gain"]["mean"]) == (4.5, 2.0)


def test_a_guided_base_without_a_judgement_has_no_row() -> None:
    plain = samples("auditor", [1, 2], [3, 4])
    guided = [s.model_copy(update={"policy": "guided"}) for s in samples("auditor", [None, None], [])]
    summary = suite().summary([*plain, *guided])
    assert list(rows(summary)) == ["base", "final", "gain"] and rows(summary)["gain"]["mean"] == 2.0
    assert f"auditor_{DIMENSION}_full_marks_guided" not in summary.metrics
    where = {"judge": "auditor", "dimension": DIMENSION, "policy": "guided"}
    assert {**where, "invalid": 2, "of": 2} in summary.tables["invalid"]


def test_the_critics_error_is_that_of_the_benchs_point_estimate() -> None:
    """The likeliest score is 2, the median 4."""
    unsure: list[Score] = [(0, 0.4, 0, 0.3, 0.3)]
    judged = zip(samples("auditor", [4], [4]), samples("critic", unsure, unsure), strict=True)
    both = [a.model_copy(update={"scores": a.scores | {"critic": c.scores["critic"]}}) for a, c in judged]
    for estimate, error in (("median", 0), ("score", 2)):
        measured = config()
        measured = measured.model_copy(update={"bench": measured.bench.model_copy(update={"point_estimate": estimate})})
        rows = HeldOut(measured, Path(), CPU).summary(both).tables["agreement"]
        assert [row["mae"] for row in rows] == [error, error]


def test_the_critic_is_measured_against_the_auditor_before_and_after() -> None:
    """Two images of each prompt: before RL the critic ranks all pairs like the auditor, after it one of two."""
    auditor = samples("auditor", [1, 2, 3, 5], [1, 2, 3, 5])
    critic = samples("critic", [2, 3, 3, 4], [2, 3, 4, 3])
    both = [
        a.model_copy(
            update={"scores": a.scores | {"critic": c.scores["critic"]}, "prompt": Prompt(text=f"{a.index // 2}")}
        )
        for a, c in zip(auditor, critic, strict=True)
    ]
    summary = suite().summary(both)
    found = {row["policy"]: row for row in summary.tables["agreement"] if row["dimension"] == DIMENSION}
    assert (found["base"]["pairwise"], found["final"]["pairwise"]) == (1.0, 0.5)
    assert (found["base"]["mae"], found["final"]["mae"]) == (0.75, 1.25)
    assert summary.metrics[f"critic_{DIMENSION}_pairwise_final"] == 0.5
    unjudged = [s.model_copy(update={"scores": {**s.scores, "auditor": {}}}) for s in both[:4]]
    assert suite().summary([*unjudged, *both[4:]]).tables["agreement"][0]["policy"] == "final"


def test_intervals_are_clustered_by_prompt() -> None:
    """Ten images of each of four prompts, which alone decide the gain, are four witnesses and not forty."""
    base, final = [1] * 40, [1 + i // 10 for i in range(40)]
    alone = samples("auditor", list(base), list(final))
    together = [s.model_copy(update={"prompt": Prompt(text=f"prompt {s.index // 10}")}) for s in alone]
    few, many = (rows(suite("evaluate.num_bootstrap=500").summary(s))["gain"] for s in (together, alone))
    assert few["mean"] == many["mean"] == 1.5
    assert few["high"] - few["low"] > 2 * (many["high"] - many["low"])
