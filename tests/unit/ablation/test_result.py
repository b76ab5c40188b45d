"""Tables and curves of an ablation show what was seen, seed by seed."""

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from edits import edit_run

from firm.ablation.figure import curves, looks
from firm.ablation.result import BEFORE, FRESH, KEPT, LAST, Ablation, Run, markdown, of_run
from firm.ablation.rewards import plan
from firm.config.loading import parse_config
from firm.records import ArtifactRef, Curve, Summary

POLICY = ArtifactRef(uri="runs/edits/rl-1", sha256="0" * 64)
Ends = tuple[float, float]


def audit(sample: str, epoch: int, execution: float, consistency: float | None, copies: float) -> dict[str, Any]:
    scores = {"auditor_reward": 0.5, "auditor_execution": execution, "auditor_consistency": consistency}
    return {"sample": sample, "epoch": epoch, "critic_reward": 0.5, **scores, "copies": copies, "blanks": 0.0}


def made(
    reward: str, seed: int, execution: Ends, consistency: tuple[float | None, float | None], copies: Ends,
    caught: int | None = None, alarms: tuple[str, ...] = (),
) -> Run:  # fmt: skip
    """A run of ten epochs from what its first and last checks say; the kept policy is that of epoch 5."""
    config = parse_config(edit_run())
    [planned] = plan(config, [seed], [reward])
    middle = [(a + b) / 2 for a, b in (execution, copies)]
    audits = [
        audit("check", 0, execution[0], consistency[0], copies[0]),
        audit("check", 5, middle[0], consistency[0], middle[1]),
        audit("check", 10, execution[1], consistency[1], copies[1]),
        audit("choice", 5, 1.0, 1.0, 1.0),
        audit("report", 0, 2.0, 2.0, 0.2),
        audit("report", 5, 3.5, 4.5, 0.25),
    ]
    rl = Summary(
        stage="rl",
        metrics={"epochs": 10.0, "kept_epoch": 5.0},
        tables={
            "audits": audits,
            "stop": [{"until": caught}] if caught else [],
            "alarms": [{"sentence": sentence} for sentence in alarms],
        },
        curves=[Curve(name="copies", x=[1, 2], y=[0.1, 0.2])],
    )
    return of_run(planned, rl, Summary(stage="evaluate", tables={"scores": HELD_OUT}), POLICY)


HELD_OUT = [
    {"judge": judge, "dimension": dimension, "policy": policy, "mean": mean, "low": mean - 0.01, "high": mean + 0.01}
    for judge, dimension, means in (
        ("auditor", "reward", (0.4, 0.48, 0.08)),
        ("auditor", "execution", (2.0, 2.5, 0.5)),
        ("critic", "consistency", (4.0, 5.0, 1.0)),
    )
    for policy, mean in zip(("base", "final", "gain"), means, strict=True)
]
SUM = "weighted-sum-0.5-0.5"


@pytest.fixture(scope="module")
def ablation() -> Ablation:
    runs = [
        made(SUM, 0, (2.0, 1.2), (4.0, 5.0), (0.2, 0.95), 10, ("Alarm at epoch 9: 95% of the images.",)),
        made("cme", 0, (2.0, 3.0), (4.0, None), (0.2, 0.1)),
        made(SUM, 1, (2.4, 1.0), (4.2, 5.0), (0.3, 1.0), 5),
        Run(reward="cme", label="CME", seed=1, refused="the critic is not trusted"),
    ]
    return Ablation(name="edits", seeds=[0, 1], dimensions=["execution", "consistency"], images=512, runs=runs)


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> the others, of all lines of tables."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells if not first.startswith("-")}


def test_the_table_has_means_and_the_extremes_of_the_seeds(ablation: Ablation) -> None:
    found = rows(markdown(ablation, "curves.svg").partition("## Each run")[0])
    assert found == {
        "policy": ["execution", "consistency", "untouched", "empty"],
        BEFORE: ["2.20 (2.00 to 2.40)", "4.10 (4.00 to 4.20)", "25% (20% to 30%)", "0% (0% to 0%)"],
        FRESH: ["2.00 (2.00 to 2.00)", "2.00 (2.00 to 2.00)", "20% (20% to 20%)", "0% (0% to 0%)"],
        f"weighted sum 0.5/0.5, {LAST}": [
            "1.10 (1.00 to 1.20)", "5.00 (5.00 to 5.00)", "98% (95% to 100%)", "0% (0% to 0%)",
        ],
        f"weighted sum 0.5/0.5, {KEPT}": [
            "3.50 (3.50 to 3.50)", "4.50 (4.50 to 4.50)", "25% (25% to 25%)", "0% (0% to 0%)",
        ],
        f"CME (seed 0 only), {LAST}": ["3.00", "–", "10%", "0%"],
        f"CME (seed 0 only), {KEPT}": ["3.50", "4.50", "25%", "0%"],
    }  # fmt: skip


def test_the_page_lists_each_run_with_stops_alarms_and_refusals(ablation: Ablation) -> None:
    page = markdown(ablation, "curves.svg")
    assert "for 10 epochs" in page and "the auditor did not stop it" in page and "![Curves](curves.svg)" in page
    assert (
        "| weighted sum 0.5/0.5 | 1 | 2.40 → 1.00 | 4.20 → 5.00 | 30% → 100% | 0% → 0% | 5 | at epoch 5 |" in page
        and "| CME | 0 | 2.00 → 3.00 | 4.00 → – | 20% → 10% | 0% → 0% | 5 | no |" in page
    )
    assert "- weighted sum 0.5/0.5, seed 0: Alarm at epoch 9" in page
    assert "- CME, seed 1: the critic is not trusted" in page


def test_the_page_has_the_kept_policy_of_each_run_on_held_out_prompts(ablation: Ablation) -> None:
    table = markdown(ablation, "curves.svg").partition("## Held-out prompts")[2].partition("## Alarms")[0]
    cells = "0.400 → 0.480 (+0.080, +0.070 to +0.090) | 2.00 → 2.50 (+0.50, +0.49 to +0.51) | –"
    assert "| reward | seed | reward | execution | consistency |" in table
    assert [line for line in table.splitlines() if "→ 0.480" in line] == [
        f"| {label} | {seed} | {cells} |"
        for label, seed in (("weighted sum 0.5/0.5", 0), ("CME", 0), ("weighted sum 0.5/0.5", 1))
    ]


def test_a_page_of_refusals_has_no_numbers(ablation: Ablation) -> None:
    page = markdown(ablation.model_copy(update={"runs": ablation.runs[3:]}), "curves.svg")
    assert "not trusted" in page and "|" not in page and "curves.svg" not in page


def test_numbers_are_kept_whole(ablation: Ablation) -> None:
    text = ablation.model_dump_json()
    assert Ablation.model_validate_json(text) == ablation
    first = json.loads(text)["runs"][0]
    assert first["caught"] == 10 and first["policy"]["uri"] == POLICY.uri and len(first["audits"]) == 6
    assert first["curves"][0]["name"] == "copies" and first["held_out"] == HELD_OUT


def test_the_curves_are_a_file_with_a_panel_for_each_measure(ablation: Ablation) -> None:
    svg = curves(ablation)
    assert svg == curves(ablation)
    root = ET.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("execution, by the auditor", "consistency, by the auditor", "share of untouched images", "CME"):
        assert text in words
    assert "share of empty images" in words and "weighted sum 0.5/0.5" in words


def test_any_number_of_rewards_has_looks_of_their_own(ablation: Ablation) -> None:
    sums = [f"weighted-sum-{i / 40:g}-{1 - i / 40:g}" for i in range(40)]
    found = looks([*sums, "base-only", "cme"])
    assert len(set(found.values())) == 42 and found["cme"] == looks(["qma"])["qma"]
    five = [made(name, 0, (2.0, 3.0), (4.0, 4.5), (0.2, 0.1)) for name in (*sums[8:11], "base-only", "cme")]
    svg = curves(ablation.model_copy(update={"runs": five}))
    assert all(run.label in svg for run in five)


def test_generation_has_nothing_untouched(ablation: Ablation) -> None:
    runs = [
        run.model_copy(update={"audits": [{k: v for k, v in row.items() if k != "copies"} for row in run.audits]})
        for run in ablation.done
    ]
    without = ablation.model_copy(update={"runs": runs})
    assert "untouched" not in markdown(without, "curves.svg") and "untouched" not in curves(without)
