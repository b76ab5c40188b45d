"""The gate stops the planted critics that it can see, lets good ones pass, and the table in docs/trust.md is true."""

from pathlib import Path

import pytest
from planted import critics, run, table
from planted.critics import BAD, DIMENSIONS, FOLLOWING, GOOD, QUALITY, Planted, soft
from planted.table import PAGE, ROWS, Row, read_rows, render

from firm.config import RunConfig

# Right on what the base policy draws: left to the auditor.
PASSES = (critics.FondOfCrowds, critics.FondOfFour)
GATED = [critic for critic in (*BAD, *GOOD) if critic not in PASSES]
WRONG_IN_ONE = {critics.InvertedQuality: {QUALITY}, critics.FirstObjectOnly: {FOLLOWING}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    fewer = ["bench.sources.0.num_images=136"]
    return run.planted_config(0, tmp_path_factory.mktemp("planted"), fewer, test_images=40)


@pytest.fixture(scope="module")
def data(config: RunConfig) -> Path:
    return run.curated(config)


@pytest.mark.parametrize("critic", GATED, ids=lambda critic: critic.__name__)
def test_the_gate(critic: type[Planted], config: RunConfig, data: Path) -> None:
    """A good critic passes, a bad one fails with sentences that name the dimensions in which it is wrong."""
    failures = run.gated(run.make(critic, config), config, data)
    expected = set() if critic in GOOD else WRONG_IN_ONE.get(critic, set(DIMENSIONS))
    assert {sentence.split()[0] for sentence in failures} == expected, failures


def test_a_planted_critic_steers_rl(config: RunConfig) -> None:
    small = {"max_epochs": 2, "prompts_per_epoch": 2, "group_size": 4, "num_inference_steps": 2}
    auditor = config.auditor.model_copy(update={"every": 1, "num_images": 8})
    config = config.model_copy(update={"rl": config.rl.model_copy(update=small), "auditor": auditor})
    row = run.audited(run.make(GOOD[0], config), config)
    assert (row.epochs, len(row.rewards), row.stopped, row.failures) == (2, 3, False, [])


@pytest.mark.parametrize("score", [-1.0, 1.0, 1.25, 3.0, 4.6, 5.0, 9.0])
def test_a_planted_score_is_read_as_it_was_meant(score: float) -> None:
    judgement = soft({QUALITY: score})[QUALITY]
    assert judgement.soft_score == pytest.approx(min(max(score, 1), 5))
    assert abs(judgement.score - judgement.soft_score) <= 0.5


# ---- the table


def test_a_fall_is_measured_from_the_best_so_far() -> None:
    row = Row(critic="Constant", seed=0, failures=[], rewards=(0.4, 0.6, 0.57, 0.7, 0.69), stopped=True)
    assert row.fall == pytest.approx(0.03) and row.right
    assert not row.model_copy(update={"stopped": False}).right, "nobody stopped it"
    row = row.model_copy(update={"rewards": (0.4, 0.6, 0.49, 0.7)})
    assert row.fall == pytest.approx(0.11) and not row.right
    assert row.model_copy(update={"failures": ["no"]}).right


def test_a_good_critic_must_not_be_stopped() -> None:
    row = Row(critic="Teacher", seed=0, failures=[], rewards=(0.4, 0.6))
    assert row.right and not row.model_copy(update={"stopped": True}).right
    assert not row.model_copy(update={"failures": ["no"]}).right


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    lines = [Row(critic=name, seed=seed, failures=[]).model_dump_json() for name, seed in (("Noisy", 1), ("Noisy", 0))]
    (tmp_path / "rows").write_text("\n".join(lines) + "\n" + lines[0][:20])
    assert [row.seed for row in read_rows(tmp_path / "rows")] == [0, 1]


def test_the_page_has_the_table_of_all_critics_and_seeds() -> None:
    rows = read_rows()
    assert [(r.critic, r.seed) for r in rows] == [(c.__name__, s) for c in (*BAD, *GOOD) for s in run.SEEDS]
    assert table.START + render(rows) + table.END in PAGE.read_text(), f"write it again from {ROWS.name}: make planted"


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: f"{row.critic}-{row.seed}")
def test_gate_or_auditor_stops_every_bad_critic_and_no_good_one(row: Row) -> None:
    assert row.right, row
