"""The auditor's statistics: what is stopped, what is not, and what is kept, in runs with the demo's noise."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from firm.config import RunConfig
from firm.config.loading import load_config, preset_names
from firm.config.reward import REWARD
from firm.rl.audit import Audit, SampleName, best, first_fall, num_looks, over_optimised
from firm.rl.auditor import Auditor
from firm.rl.run import summary
from firm.rl.train import RLTrainer
from firm.stats import Floats

BASE, BONUS = "instruction_following", "quality"
Course = Callable[[int], float]
"""Points by which a score's true mean is away from its start at a check."""


def still(_: int) -> float:
    return 0.0


def scores(rng: np.random.Generator, num_checks: int, num_images: int, mean: float, course: Course) -> Floats:
    """Whole scores [checks, images] plus the true course, with noise as in the demo.

    In the demo (gen-shapes, checks 5 epochs apart, 512 images) the difference of an image's score between two checks
    has sd 0.85, four checks apart 1.1, nine apart 1.3, between means of three checks 0.75, and none of it is shared by
    images of a prompt. A slow part (correlation 0.87 from check to check) and a fresh one give 0.85, 1.1, 1.3, 0.72.
    """
    slow = 0.95 * rng.normal(size=num_images)
    rows = []
    for check in range(num_checks):
        score = np.clip(np.rint(mean + slow + 0.45 * rng.normal(size=num_images)), 1, 5)
        rows.append(score + course(check))
        slow = 0.87 * slow + np.sqrt(1 - 0.87**2) * 0.95 * rng.normal(size=num_images)
    return np.array(rows)


def simulated(
    config: RunConfig,
    seed: int,
    num_checks: int,
    auditor: Mapping[str, Course] | None = None,
    critic: Mapping[str, Course] | None = None,
) -> list[Audit]:
    """The checks of a run; a dimension without a course has a constant true mean."""
    rng = np.random.default_rng(seed)
    number = config.auditor.num_images
    judged = {}
    for who, courses in (("auditor", auditor or {}), ("critic", critic or {})):
        found = {
            d: scores(rng, num_checks, number, mean, courses.get(d, still)) for d, mean in ((BASE, 3.6), (BONUS, 4.3))
        }
        base, bonus = (np.clip((found[d] - 1) / 4, 0, 1) for d in (BASE, BONUS))
        judged[who] = {REWARD: base * (0.4 + 0.6 * bonus), **found}
    prompts = tuple(i // 2 for i in range(number))
    return [
        Audit(
            epoch=config.auditor.every * check,
            prompts=prompts,
            **{who: {m: tuple(v[check].tolist()) for m, v in rows.items()} for who, rows in judged.items()},
        )
        for check in range(num_checks)
    ]


def stop_of(audits: Sequence[Audit], config: RunConfig, first: int = 1) -> int | None:
    """The check at which the run would have been stopped, None if at none."""
    return next((i for i in range(first, len(audits)) if over_optimised(audits[: i + 1], config)), None)


@pytest.fixture(scope="module")
def demo() -> RunConfig:
    return load_config("gen-shapes")


@pytest.fixture(scope="module")
def long() -> RunConfig:
    config = load_config("gen-sd35")
    assert num_looks(config) == 60
    return config


# ---- the stop


def falling(check: int) -> float:
    return -0.06 * max(check - 6, 0)


def rising(check: int) -> float:
    return 0.04 * check


def test_hacking_of_the_bonus_alone_is_stopped(demo: RunConfig) -> None:
    audits = simulated(demo, 0, 17, {BONUS: falling}, {BASE: rising, BONUS: rising})
    stop = stop_of(audits, demo)
    assert stop is not None and audits[stop].mean("auditor", BONUS) > audits[6].mean("auditor", BONUS) - 0.5
    fall = over_optimised(audits[: stop + 1], demo)
    assert fall is not None and fall.measure in {REWARD, BONUS}
    assert fall.auditor_after < fall.auditor_before and fall.critic_after > fall.critic_before and fall.at_least > 0


@pytest.mark.parametrize(
    ("auditor", "critic"),
    [
        ({BASE: falling}, {BASE: falling}),  # the critic sees it, too: training fails, nobody is fooled
        ({BASE: rising, BONUS: falling}, {BASE: rising, BONUS: falling}),  # a price that both see
        ({BASE: lambda check: 0.06 * check - 1, BONUS: falling}, {BASE: rising}),  # a price that is worth it
    ],
    ids=["both", "traded", "worth it"],
)
def test_what_is_no_over_optimisation(
    demo: RunConfig, auditor: Mapping[str, Course], critic: Mapping[str, Course]
) -> None:
    assert stop_of(simulated(demo, 0, 17, auditor, critic), demo) is None


def few(config: RunConfig, num_images: int) -> RunConfig:
    return config.model_copy(update={"auditor": config.auditor.model_copy(update={"num_images": num_images})})


def test_too_few_prompts_never_stop_a_run(demo: RunConfig) -> None:
    config = few(demo, 16)
    assert stop_of(simulated(config, 0, 17, {BASE: lambda check: -2.0 * (check > 8)}), config) is None


def test_a_failed_judgement_masks_its_image_in_both_audits(demo: RunConfig) -> None:
    """Every other image is a point worse, and these fail in the first half: the rest alone has a higher mean."""
    audits = [
        audit.model_copy(
            update={
                "auditor": {
                    m: tuple(None if i % 2 and check < 8 else v - i % 2 for i, v in enumerate(column))
                    for m, column in audit.auditor.items()
                }
            }
        )
        for check, audit in enumerate(simulated(demo, 0, 17))
    ]
    assert audits[7].mean("auditor", BASE) - audits[8].mean("auditor", BASE) > 0.3
    assert stop_of(audits, demo) is None


def test_an_auditor_that_may_not_stop_says_when_it_would_have(demo: RunConfig) -> None:
    config = demo.model_copy(update={"auditor": demo.auditor.model_copy(update={"stops": False})})
    audits = simulated(config, 0, 17, {BONUS: falling}, {BASE: rising, BONUS: rising})
    stop = stop_of(audits, config)
    assert stop is not None and first_fall(audits, config) == over_optimised(audits[: stop + 1], config)
    fresh = [a.model_copy(update={"sample": "report"}) for a in (audits[0], audits[6])]
    found = summary(config, [*audits, *fresh], [])
    assert found.metrics["stopped_by_auditor"] == 0 and found.metrics["epochs"] == audits[-1].epoch
    assert found.tables["stop"][0]["until"] == audits[stop].epoch
    assert "RL went on: by configuration" in found.notes[0]
    quiet = summary(config, [*simulated(config, 0, 17), *fresh], [])
    assert quiet.tables["stop"] == [] and "by configuration could stop nothing" in quiet.notes[0]
    seen = audits[: stop + 1]
    for run, stops in ((config, False), (demo, True)):
        trainer = RLTrainer.__new__(RLTrainer)  # whose policy and judges do not matter
        trainer.config, trainer.history, trainer.epoch = run, seen, seen[-1].epoch
        assert trainer.is_done is stops


# ---- what is kept


def test_the_best_is_the_earliest_with_the_highest_reward(demo: RunConfig) -> None:
    def flat(epoch: int, value: float | None, other: float = 0.5) -> Audit:
        return Audit(epoch=epoch, prompts=(0, 1), critic={}, auditor={REWARD: (value, other)})

    assert best([flat(0, 0.3), flat(5, 0.5), flat(10, 0.5), flat(15, 0.4)]).epoch == 5
    assert best([flat(0, 0.3), flat(5, None, 0.4)]).epoch == 0  # the other image alone would be the higher mean


def test_on_a_plateau_the_reported_gain_is_no_luck(demo: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of 17 checks looks better than the base; what is reported of it does not."""
    config = few(demo, 128)
    lucky, reported = [], []
    for seed in range(60):
        checks = simulated(config, seed, 17)
        fresh = iter(simulated(config, 1000 + seed, 5))

        def check(_: Auditor, epoch: int, __: str, sample: str, fresh: object = fresh) -> Audit:
            return next(fresh).model_copy(update={"epoch": epoch, "sample": sample})  # type: ignore[call-overload,no-any-return]

        monkeypatch.setattr(Auditor, "check", check)
        top = best(checks)
        auditor = Auditor.__new__(Auditor)
        found = auditor.choose({0: "reference", top.epoch: "best", checks[-1].epoch: "ema"})
        lines = [{"step": 5, "invalid_judgements": 0.0, "reward": 0.5, "loss": 1.0, "old_deviation": 0.1}]
        metrics = summary(config, [*checks, *found], lines).metrics
        lucky.append(top.mean("auditor", REWARD) - checks[0].mean("auditor", REWARD))
        reported.append(metrics["gain"])
    error = np.std(reported) / np.sqrt(len(reported))
    assert abs(np.mean(reported)) < 2.5 * error
    assert np.mean(lucky) > 5 * error


def test_a_better_policy_is_kept_and_measured(demo: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    audits = {a.epoch: a for a in simulated(demo, 0, 3, {BASE: lambda check: (0.0, 0.2, 0.6)[check]})}
    used: list[tuple[int, str, str]] = []

    def check(_: Auditor, epoch: int, parameters: str, sample: str) -> Audit:
        used.append((epoch, parameters, sample))
        return audits[epoch].model_copy(update={"sample": sample})

    monkeypatch.setattr(Auditor, "check", check)
    found = Auditor.__new__(Auditor).choose({0: "reference", 5: "best", 10: "ema"})
    assert used == [
        (0, "reference", "choice"), (5, "best", "choice"), (10, "ema", "choice"),
        (0, "reference", "report"), (10, "ema", "report"),
    ]  # fmt: skip
    result = summary(demo, [*audits.values(), *found], [])
    m = result.metrics
    assert m["kept_epoch"] == 10 and m["gain_low"] > 0 and m["stopped_by_auditor"] == 0
    assert m[f"auditor_{BASE}_kept"] - m[f"auditor_{BASE}_base"] == pytest.approx(0.6, abs=0.15)
    rows = result.tables["audits"]
    assert [row["sample"] for row in rows] == ["check"] * 3 + ["choice"] * 3 + ["report"] * 2
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in rows)
    assert rows[2]["gain_low"] < rows[5]["gain_low"]  # one of sixteen looks is less sure than one on its own
    assert "was kept" in result.notes[0] and "Over-optimisation" not in result.notes[0]


@pytest.mark.parametrize(("rewards", "kept"), [((0.4, 0.5, 0.3), 5), ((0.4, 0.3, 0.2), 0), ((0.2, 0.3, 0.4), 10)])
def test_the_best_of_the_fresh_audits_is_kept(
    rewards: tuple[float, ...], kept: int, demo: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = dict(zip((0, 5, 10), rewards, strict=True))

    def check(_: Auditor, epoch: int, __: str, sample: SampleName) -> Audit:
        return Audit(sample=sample, epoch=epoch, prompts=(0,), critic={}, auditor={REWARD: (reward[epoch],)})

    monkeypatch.setattr(Auditor, "check", check)
    history = [check(object.__new__(Auditor), epoch, "ema", "check") for epoch in (0, 5, 10)]
    trainer = SimpleNamespace(auditor=object.__new__(Auditor), history=history, epoch=10)
    parameters, audits = RLTrainer.choose(trainer)  # type: ignore[arg-type]
    assert [a.epoch for a in audits if a.sample == "report"] == sorted({0, kept})
    assert parameters == {0: "reference", 5: "best", 10: "ema"}[kept]


def test_one_bad_check_of_a_dimension_stops_nothing(demo: RunConfig) -> None:
    """A dimension is looked at in whole windows: its fall has to last."""

    def run(first_bad: int) -> list[Audit]:
        audits = simulated(demo, 0, 7, {BONUS: lambda check: -0.25 * (check >= first_bad)})
        level = audits[0].auditor[REWARD]
        return [a.model_copy(update={"auditor": a.auditor | {REWARD: level}}) for a in audits]

    assert over_optimised(run(6), demo) is None
    fall = over_optimised(run(4), demo)
    assert fall is not None and fall.measure == BONUS


@pytest.mark.parametrize(
    "overrides",
    [[], ["rl.max_epochs=3"], ["auditor.every=1", "rl.max_epochs=4"]],
    ids=["as it is", "one check", "four checks"],
)
@pytest.mark.parametrize("name", [name for name in preset_names() if load_config(name).rl])
def test_every_preset_s_auditor_looks_at_each_dimension(name: str, overrides: list[str]) -> None:
    """A dimension that falls halfway, unseen by the critic and without a change of the reward, is caught in time."""
    config = load_config(name, overrides)
    number = config.auditor.num_images
    checks = num_looks(config) + 1
    for fallen in config.reward.dimensions:
        noise = np.random.default_rng(0).normal(size=(checks, number))
        flat = (0.5,) * number
        audits = [
            Audit(
                epoch=config.auditor.every * check,
                prompts=tuple(i // 2 for i in range(number)),
                critic={REWARD: flat, **dict.fromkeys(config.reward.dimensions, flat)},
                auditor={REWARD: flat, **dict.fromkeys(config.reward.dimensions, flat)}
                | {fallen: tuple(((4.2 if check < checks // 2 else 2.9) + noise[check]).tolist())},
            )
            for check in range(checks)
        ]
        fall = first_fall(audits, config)
        assert fall is not None and fall.measure == fallen
        assert overrides or fall.until < config.rl.max_epochs, "there is something left to stop"


# ---- in many runs


@pytest.mark.slow
@pytest.mark.parametrize("rise", [0.0, 0.01], ids=["flat", "rising"])
def test_noise_stops_at_most_one_run_in_twenty(demo: RunConfig, rise: float) -> None:
    config = demo.model_copy(update={"rl": demo.rl.model_copy(update={"max_epochs": 60 * demo.auditor.every})})
    runs = [simulated(config, seed, 61, {BASE: lambda check: rise * check}) for seed in range(30)]
    assert sum(stop_of(audits, config) is not None for audits in runs) <= 0.05 * len(runs)


@pytest.mark.parametrize(
    ("preset", "falls_at", "dimension"), [("demo", 9, BASE), ("demo", 9, BONUS), ("long", 30, BASE)]
)
def test_nine_in_ten_falls_of_a_seventh_point_are_found_in_five_checks(
    preset: str, falls_at: int, dimension: str, request: pytest.FixtureRequest
) -> None:
    config: RunConfig = request.getfixturevalue(preset)
    runs = [
        simulated(config, seed, falls_at + 5, {dimension: lambda check: -0.15 * (check >= falls_at)})
        for seed in range(60)
    ]
    assert sum(stop_of(audits, config, falls_at) is not None for audits in runs) >= 0.9 * len(runs)
