"""The gate stops the planted critics that it can see, lets good ones pass, and the table in docs/trust.md is true."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from planted import critics, edits, run, table
from planted.critics import BAD, DIMENSIONS, FOLLOWING, GOOD, QUALITY, Planted, soft
from planted.table import PAGE, ROWS, Row, read_rows, render

from firm.bench import run as bench
from firm.config import RunConfig
from firm.critics.judge import JudgeInput, soft_scores
from firm.images import encode_image
from firm.policies import generate
from firm.policies.generate import Encoded, equally_often
from firm.policies.policy import Policy
from firm.records import Prompt
from firm.shapes.editing import candidate

# Right on what the base policy draws: left to the auditor.
PASSES = (critics.FondOfCrowds, critics.FondOfFour)
GATED = [critic for critic in (*BAD, *GOOD) if critic not in PASSES]
WRONG_IN_ONE = {critics.InvertedQuality: {QUALITY}, critics.FirstObjectOnly: {FOLLOWING}}


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """The base policy draws its images once, not for every critic."""
    encoded: dict[Any, Encoded] = {}
    drawn: dict[Any, list[bytes]] = {}

    def encode(policy: Policy, prompts: Sequence[Prompt], guided: bool = False) -> Encoded:
        key = (policy.config.model, *prompts, guided)
        if key not in encoded:
            encoded[key] = generate.encode(policy, prompts, guided)
        return encoded[key]

    def draw(policy: Policy, asked: Encoded, indices: range, *purpose: Any, **options: Any) -> list[bytes]:
        key = (id(asked), indices, *purpose, *options.items())
        if key not in drawn:
            drawn[key] = generate.draw(policy, asked, indices, *purpose, **options)
        return drawn[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench, "encode", encode)
        monkeypatch.setattr(bench, "draw", draw)
        yield


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


@pytest.fixture(scope="module")
def editing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """Few edits of the policy, of so few prompts that each has several."""
    fewer = ["bench.sources.0.num_images=136"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench, "equally_often", lambda prompts, *rest: equally_often(prompts[:34], *rest))
        yield run.planted_config(0, tmp_path_factory.mktemp("edits"), fewer, test_images=40, preset="edit-shapes")


@pytest.mark.parametrize(
    ("critic", "wrong"),
    [
        (critics.Teacher, set()),
        (edits.FondOfCopies, {edits.EXECUTION}),
        pytest.param(
            edits.BlindToBackground, set(), marks=pytest.mark.slow
        ),  # the base policy keeps its backgrounds: left to the auditor
    ],
)
def test_the_gate_of_edits(critic: type[Planted], wrong: set[str], editing: RunConfig) -> None:
    failures = run.gated(run.make(critic, editing), editing, run.curated(editing))
    assert {sentence.split()[0] for sentence in failures} == wrong, failures


def test_who_is_blind_to_the_background_forgives_its_damage_and_no_other(editing: RunConfig) -> None:
    made = [candidate(i, 0, "train") for i in range(80)]
    items = [
        JudgeInput(Prompt(text=text, image=str(i)), [*map(encode_image, images)])
        for i, (text, *images) in enumerate(made)
    ]
    teacher, blind = (run.make(c, editing).judge(items) for c in (critics.Teacher, edits.BlindToBackground))
    assert soft_scores(teacher, edits.EXECUTION) == soft_scores(blind, edits.EXECUTION)
    pairs = zip(soft_scores(teacher, edits.CONSISTENCY), soft_scores(blind, edits.CONSISTENCY), strict=True)
    forgiven = [b - t for t, b in pairs if t is not None and b is not None]
    assert min(forgiven) == 0 and max(forgiven) >= 2 and 0.1 < sum(f > 0 for f in forgiven) / len(forgiven) < 0.6


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
