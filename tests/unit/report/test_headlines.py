"""Headlines claim no more than the numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from unit.report.made import DIMENSIONS, GAPS, bench, make, report, rl, scores

from firm.config import RunConfig
from firm.config.loading import load_config
from firm.records import Summary
from firm.report.headlines import headlines


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("gen-shapes")


def tables(summaries: Mapping[str, Summary], name: str) -> list[dict[str, Any]]:
    return summaries["bench"].tables[name]


def test_accepted_gaps_are_in_the_headline_and_on_the_page(tmp_path: Path) -> None:
    gaps = ["quality.skill_low", "quality.pairwise"]
    following = [
        {"metric": metric, "source": "policy", "dimension": DIMENSIONS[0], "at_least": bound}
        for metric, bound in (("skill_low", 0), ("pairwise", 0.8))
    ]
    gate = {"rules": following, "accept_gaps": gaps}
    config = load_config("gen-shapes", [f"bench.gate={json.dumps(gate)}"])
    page, data, _ = report(tmp_path / "report", config, make(tmp_path, config))
    headline = json.loads(data)["headlines"][0]
    assert "No rule of the gate looks at quality.skill_low, quality.pairwise" in headline["text"]
    assert headline["tone"] == "note" and "What no rule looks at" in page


def test_headlines_claim_no_more_than_the_numbers(config: RunConfig) -> None:
    summaries = {"bench": bench(config), "samples": scores(-0.5, -0.6, -0.4), "policy": rl(stopped=False, kept=0)}
    _, gain, after, stop = headlines(config, summaries)
    assert gain["title"].startswith("RL lowered the reward (QMA) by the auditor's scores")
    assert gain["tone"] == "bad"
    assert "no candidate had a higher reward" in stop["text"] and "caught" in stop["title"]
    assert stop["title"].startswith("No over-optimisation was caught")
    assert after["tone"] == "note" and "is not trusted: of two images of one prompt" in after["title"]
    assert "61% for instruction following (before RL: 83%)" in after["title"]
    assert "skill for instruction following (0.10), pairwise for instruction following (0.61): another" in after["text"]
    sampled = summaries["samples"].tables
    alone = [{**row, "pairwise": None} for row in sampled["agreement"]]
    unpaired = summaries["samples"].model_copy(update={"tables": {**sampled, "agreement": alone}})
    assert "is not known" in headlines(config, summaries | {"samples": unpaired})[2]["title"]
    good = scores(after=0.9)
    assert headlines(config, summaries | {"samples": good})[2]["tone"] == "good"
    rows = [
        {**r, "mae": 1.5, "pairwise": 0.4} if r["dimension"] == "quality" else r for r in tables(summaries, "agreement")
    ]
    worse = summaries["bench"].model_copy(update={"tables": {"agreement": rows}})
    trust, *_ = headlines(config, summaries | {"bench": worse})
    assert "1.50 for quality (best constant 1.20)" in trust["title"] and "40% for quality" in trust["text"]
    assert trust["tone"] == "note"
    whole = [r for r in tables(summaries, "agreement") if r["by"] == "all"]
    trust, *_ = headlines(config, summaries | {"bench": worse.model_copy(update={"tables": {"agreement": whole}})})
    assert "on 120 test examples" in trust["text"] and "on test examples its error" in trust["title"]
    summaries |= {"bench": Summary(stage="bench"), "samples": Summary(stage="evaluate")}
    trust, gain, after, _ = headlines(config, summaries)
    assert "is not known" in after["title"]
    assert trust["title"] == "The critic is not trusted."
    assert "not known" in gain["title"]


@pytest.mark.parametrize("gaps", [["quality.skill_low", "quality.pairwise"], GAPS])
def test_a_critic_that_no_rule_judges_after_rl_is_not_called_good(gaps: list[str]) -> None:
    kept = [d for d in DIMENSIONS if f"{d}.pairwise" not in gaps]
    rules = [
        {"metric": metric, "source": "policy", "dimension": d, "at_least": bound}
        for d in kept
        for metric, bound in (("skill_low", 0), ("pairwise", 0.8))
    ] or [{"metric": "coverage", "at_least": 0.5}]
    config = load_config("gen-shapes", [f"bench.gate={json.dumps({'rules': rules, 'accept_gaps': gaps})}"])
    summaries = {"bench": bench(config), "samples": scores(after=0.9), "policy": rl()}
    after = headlines(config, summaries)[2]
    assert after["tone"] == "note" and "no rule of the gate judges all of the critic" in after["title"]


def test_a_dimension_without_pairs_after_rl_is_not_passed_over(config: RunConfig) -> None:
    samples = scores(after=0.9)
    rows = [
        {**r, "pairwise": None} if (r["dimension"], r["policy"]) == ("quality", "final") else r
        for r in samples.tables["agreement"]
    ]
    samples = samples.model_copy(update={"tables": {**samples.tables, "agreement": rows}})
    after = headlines(config, {"bench": bench(config), "samples": samples, "policy": rl()})[2]
    assert after["tone"] == "note" and "– for quality (before RL: 78%)" in after["title"]
    assert "pairwise for quality (–)" in after["text"]


def test_what_a_further_round_is_compared_with_is_named(config: RunConfig) -> None:
    summaries = {"bench": bench(config), "samples": scores(), "policy": rl()}
    assert "(before the first round: 83%)" in headlines(config, summaries, number=2)[2]["title"]


def test_an_auditor_that_could_not_stop_is_named(config: RunConfig, tmp_path: Path) -> None:
    looking = config.model_copy(update={"auditor": config.auditor.model_copy(update={"stops": False})})
    others = {"bench": bench(config), "samples": scores()}
    quiet, fallen = rl(stopped=False), rl()
    fallen = fallen.model_copy(update={"metrics": {**fallen.metrics, "epochs": 80.0, "stopped_by_auditor": 0.0}})
    for summary, words in ((quiet, "No over-optimisation was caught in 50 epochs"), (fallen, "was caught at epoch 50")):
        *_, stop = headlines(looking, {**others, "policy": summary})
        assert words in stop["title"] and stop["tone"] == "note"
        assert "The auditor did not stop RL, by configuration (auditor.stops)." in stop["text"]
    page, _, _ = report(tmp_path / "report", looking, make(tmp_path, looking, {"policy": fallen}))
    assert "The auditor did not stop RL, by configuration</strong>" in page and "RL then stops" not in page


def test_a_gain_that_was_paid_for_is_no_plain_gain(config: RunConfig) -> None:
    """Instruction following went up, and with it the reward; quality is the price."""
    samples = scores()
    price = [
        {**row, "dimension": "quality", "mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        for row, mean in zip(samples.tables["scores"][-3:], (4.5, 4.0, -0.5), strict=True)
    ]
    paid = samples.model_copy(update={"tables": {**samples.tables, "scores": samples.tables["scores"] + price}})
    plain, bought = (
        headlines(config, {"bench": bench(config), "policy": rl(), "samples": each})[1] for each in (samples, paid)
    )
    assert plain["tone"] == "good" and "paid" not in plain["text"]
    assert bought["title"].endswith("; in points +0.48 for instruction following and −0.50 for quality.")
    assert bought["tone"] == "note" and "The gain was paid for with quality." in bought["text"]
    assert "quality went from 4.50 to 4.00 (gain −0.50, 95% CI −0.60 to −0.40)" in bought["text"]


def test_alarms_are_in_the_headline(config: RunConfig) -> None:
    quiet = rl(stopped=False)
    said = "Alarm from epoch 5 to 9: 70% of the images were nearly empty (bound 50%)."
    row = {"monitor": "blanks", "since": 5, "until": 9, "worst": 0.7, "bound": 0.5, "text": "...", "sentence": said}
    loud = quiet.model_copy(update={"tables": {**quiet.tables, "alarms": [row]}})
    summaries = {"bench": bench(config), "samples": scores()}
    *_, before = headlines(config, {**summaries, "policy": quiet})
    *_, after = headlines(config, {**summaries, "policy": loud})
    assert (before["tone"], after["tone"]) == ("good", "note") and said not in before["text"]
    assert after["text"] == f"{before['text']} {said}"
