"""A run that does not fit on its GPUs is refused before its first stage."""

from collections import Counter

import pytest

from firm.config.loading import load_config
from firm.plan import fits
from firm.plan.assumptions import GB, Cost, Phase, StagePlan
from firm.plan.fits import check_fits
from firm.records import UserError

CONFIG = load_config("gen-shapes", [])


def phase(name: str, **gigabytes: int) -> Phase:
    return Phase(name, Counter({part: size * GB for part, size in gigabytes.items()}), Cost())


def test_the_fullest_moment_of_each_stage_must_fit_beside_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    full = phase("updating", weights=20, activations=50, states=8)
    plans = [StagePlan("gate"), StagePlan("rl", 8, (phase("sampling", weights=20), full))]
    monkeypatch.setattr(fits.Planner, "stages", lambda _: plans)
    check_fits(CONFIG, {"rl", "gate"}, 80 * GB)
    check_fits(CONFIG, {"sft"}, 24 * GB)  # rl has ended
    with pytest.raises(UserError) as caught:
        check_fits(CONFIG, {"rl"}, 79 * GB)
    assert caught.value.what == (
        "rl needs 78.0 GB of a GPU for tensors while updating (activations 50.0, weights 20.0) and 2 for CUDA, "
        "and a GPU has 79"
    )


@pytest.mark.slow
def test_the_models_of_a_run_are_planned() -> None:
    with pytest.raises(UserError, match="sft needs 1.. GB of a GPU for tensors while training"):
        check_fits(CONFIG, {"sft"}, 3 * GB)


def test_a_plan_that_breaks_stops_no_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fits.Planner, "stages", lambda _: [][0])
    check_fits(CONFIG, {"sft"}, 1.0)
    assert "not planned whether the run fits" in capsys.readouterr().out


def test_a_model_that_nobody_knows_here_is_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    check_fits(load_config("gen-shapes", ["critic.model=org/unknown"]), {"sft"}, 1.0)
    assert "not planned whether the run fits on its GPUs" in capsys.readouterr().out
