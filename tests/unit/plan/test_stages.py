"""What each stage does how often, and what follows from it."""

import json
from collections import Counter
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from firm.cli import app
from firm.config import stages_of
from firm.config.loading import load_config, preset_names
from firm.plan import stages
from firm.plan.assumptions import GB, Assumptions, Cost, Phase, StagePlan
from firm.plan.critic import Judging, Training
from firm.plan.policy import Measured
from firm.records import UserError

GIVEN = Assumptions(candidates=10_000)
SAMPLE, TRAINED, UPDATE, JUDGE = 10.0, 11.0, 7.0, 3.0


class Policy:
    """Measures nothing: an image costs 10 FLOPs, 11 by what is trained, twice as much with guidance, an update 7."""

    checkpoint = 5
    encoders: ClassVar = Counter[str]()

    def __init__(self, *_: Any) -> None:
        self.saving = Counter(weights=1)
        self.item = SAMPLE

    def train(self, *_: Any) -> None:
        self.item = TRAINED

    def sampling(self, batch: int, steps: int, guidance: float = 1.0) -> Measured:
        return Measured(Counter(weights=20 * GB, activations=batch * GB), Cost(self.item * (1 + (guidance != 1))))

    def update(self, batch: int) -> Measured:
        return Measured(Counter(weights=20 * GB), Cost(UPDATE))

    def shared(self, ranks: int) -> Counter[str]:
        return Counter(weights=12 * GB // ranks - 12 * GB, buckets=GB)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[str, StagePlan]:
    """Plans of gen-sd35 by stage, of models that cost as little as is easy to reckon with."""
    memory = Counter(weights=200 * GB)
    monkeypatch.setattr(stages, "PolicyMeter", Policy)
    monkeypatch.setattr(stages, "training", lambda *_: Training(memory, Cost(100.0), Cost(1.0), 9))
    monkeypatch.setattr(stages, "judging", lambda *_: Judging(16 * GB, Counter(kv=2 * GB), Cost(JUDGE)))
    return {plan.stage: plan for plan in stages.Planner(load_config("gen-sd35", []), GIVEN).stages()}


def flops(plan: StagePlan) -> dict[str, float]:
    return {phase.name: phase.cost.flops * phase.gpus for phase in plan.phases}


def test_all_stages_are_there_and_gate_and_report_are_free(plans: dict[str, StagePlan]) -> None:
    assert list(plans) == ["curation", "sft", "bench", "gate", "rl", "evaluate", "report"]
    assert plans["gate"].flops == plans["report"].gpus == 0


def test_sft(plans: dict[str, StagePlan]) -> None:
    steps = 154  # ceil(1.25 dimensions x 9,800 candidates / (5 x 2 x 8 workers))
    assert flops(plans["sft"]) == {"training": steps * (2 * 100 + 1) * 8}
    assert plans["sft"].gpus == 8 and plans["sft"].checkpoint == 9
    assert not any(plans["sft"].fits(card) for card in (24, 80, 141))


def test_bench_and_evaluate(plans: dict[str, StagePlan]) -> None:
    assert flops(plans["bench"]) == {"sampling policy": 512 * SAMPLE, "judging": (200 + 512) * JUDGE}
    parts = {"base": SAMPLE, "guided": 2 * SAMPLE, "final": TRAINED}
    expected = {f"sampling {name}": 512 * cost for name, cost in parts.items()}
    assert flops(plans["evaluate"]) == {**expected, "judging": 3 * 512 * JUDGE}
    assert plans["bench"].bytes_a_gpu == (20 + 128) * GB  # a whole batch of curation, before the critic is loaded
    assert plans["evaluate"].bytes_a_gpu == (20 + 8 + 16) * GB


def test_rl(plans: dict[str, StagePlan]) -> None:
    plan = plans["rl"]
    images = 48 * 16 * 600
    assert flops(plan) == {
        "sampling": pytest.approx(images * TRAINED),
        "judging": pytest.approx(images * JUDGE),
        "updating": pytest.approx(images * 9 * UPDATE),
        "saving a checkpoint": 0,
        "66 audits": pytest.approx(66 * 768 * (TRAINED + JUDGE)),
    }
    assert plan.gpu_hours(GIVEN) == pytest.approx(8 * plan.hours(GIVEN))
    assert plan.fullest and plan.fullest.name == "sampling" and plan.bytes_a_gpu == (20 + 16 + 9) * GB
    assert plan.fits(80) and not plan.fits(24)


def rl_of(*changes: str) -> dict[str, int]:
    """Bytes of each phase of RL."""
    plans = stages.Planner(load_config("gen-sd35", list(changes)), GIVEN).stages()
    [rl] = [plan for plan in plans if plan.stage == "rl"]
    return {phase.name: sum(phase.memory.values()) for phase in rl.phases}


@pytest.mark.usefixtures("plans")
def test_workers_of_rl_that_share_the_base_hold_a_share_each_and_what_is_gathered_in_a_pass() -> None:
    whole, shared, alone = rl_of(), rl_of("rl.sharding=base"), rl_of("rl.sharding=base", "launch.num_workers=1")
    share = 12 * GB // 8 - 12 * GB
    assert alone == whole
    for phase, others in {"sampling": GB, "updating": GB, "judging": 0}.items():
        assert shared[phase] == whole[phase] + share + others, phase


@pytest.mark.usefixtures("plans")
def test_encoders_that_wait_are_there_while_prompts_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rl_of()
    monkeypatch.setattr(Policy, "encoders", Counter(weights=9 * GB))
    held = (20 + 16) * GB
    assert rl_of() == {**before, "encoding prompts": held + 9 * GB}
    plans = {plan.stage: plan for plan in stages.Planner(load_config("gen-sd35"), GIVEN).stages()}
    for stage, others in {"bench": 0, "evaluate": 16 * GB}.items():
        [encoding, *_] = plans[stage].phases
        assert (encoding.name, encoding.memory) == ("encoding prompts", {"weights": 29 * GB + others})


def test_calls(plans: dict[str, StagePlan]) -> None:
    numbers = {(plan.stage, calls.role): calls.number for plan in plans.values() for calls in plan.calls}
    assert numbers == {
        ("curation", "planner"): 10_000,
        ("curation", "evaluator"): 20_000,
        ("bench", "planner"): 512,
        ("bench", "evaluator"): 1024,
        ("bench", "auditor"): 2 * (200 + 512),
        ("rl", "auditor"): 2 * 66 * 768,
        ("evaluate", "auditor"): 2 * 3 * 512,
    }


def test_hours_are_those_of_the_stated_utilisation() -> None:
    given = Assumptions(tflops=100, mfu=0.5, bandwidth=1000, mbu=0.1)
    cost = Cost(flops=50e12 * 3600, read=100e9 * 7200)
    assert cost.hours(given) == pytest.approx(1 + 2)
    plan = StagePlan("rl", 4, (Phase("a", {}, cost, gpus=4), Phase("b", {}, cost, gpus=1)))
    assert (plan.hours(given), plan.gpu_hours(given)) == (pytest.approx(6), pytest.approx(24))
    assert plan.flops == 5 * cost.flops


@pytest.mark.slow
def test_the_command_plans_the_shapes() -> None:
    result = CliRunner().invoke(app, ["plan", "gen-shapes", "--json", "--mfu", "0.5"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["assumptions"]["mfu"] == 0.5
    by = {stage["stage"]: stage for stage in said["stages"]}
    assert by["curation"]["calls"][1]["number"] == 2 * 17_000
    assert by["sft"]["note"] == "900 steps" and by["sft"]["fits"] == {"24": True, "80": True, "141": True}
    assert {phase["name"] for phase in by["rl"]["phases"]} >= {"sampling", "judging", "updating", "22 audits"}
    assert by["rl"]["checkpoint"] > by["sft"]["checkpoint"] > 0


def test_the_command_shows_tables(plans: dict[str, StagePlan]) -> None:
    result = CliRunner().invoke(app, ["plan", "gen-sd35", "--candidates", "10000"])
    assert result.exit_code == 0, result.output
    [sft] = [line.split() for line in result.output.splitlines() if line.startswith(" sft") and "none" in line]
    assert sft == ["sft", "training", "200", *["-"] * 6, "200", "none"]
    assert "Hours at 35% of 989 TFLOPS" in result.output


def test_a_model_that_is_nowhere_ends_the_command_with_its_key() -> None:
    result = CliRunner().invoke(app, ["plan", "gen-sd35", "--set", "policy.model=org/nobody-knows-it"])
    assert "policy.model" in str(result.exception) and "give a folder" in str(result.exception)


def test_a_policy_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"not a QwenImageEdit.*Pipeline \(policy\.model\)"):
        stages.Planner(load_config("gen-shapes", ["policy.family=qwen_image_edit"]), GIVEN)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("name", preset_names())
def test_a_plan_has_the_stages_that_a_run_has(name: str) -> None:
    config = load_config(name)
    made = {plan.stage: plan for plan in stages.Planner(config, GIVEN).stages()}
    assert list(made) == list(stages_of(config)) and made["report"].gpus == 0
    assert bool(made["bench"].phases[:-1]) == any(source.kind == "policy" for source in config.bench.sources)
    trains = config.critic.kind == "trained"
    assert bool("sft" in made and made["sft"].phases) == trains
    asked = {calls.role for calls in made["bench"].calls}
    assert ("critic" in asked) == (config.critic.kind == "endpoint") and ("auditor" in asked) == bool(config.auditor)
