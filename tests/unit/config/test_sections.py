"""A configuration holds the sections of the stages that it is used for; what it has says which stages run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from firm.config import STAGES, RunConfig, SteeredRun, for_stage, stages_of
from firm.config.loading import load_config, parse_config, preset_names
from firm.records import UserError

WHOLE = STAGES
CRITIC = ("curation", "sft", "bench", "gate", "report")
PROOF = ("bench", "gate", "report")
SERVED = ("bench", "gate", "rl", "evaluate", "report")
OF_PRESETS = {
    "bench-gen": PROOF,
    **dict.fromkeys(("critic-gen-8b", "critic-gen-8b-lora", "critic-gen-shapes"), CRITIC),
    "rl-gen-served": SERVED,
}
JUDGE = {"kind": "python", "target": "somewhere:Judge"}
FUNCTION = {"kind": "function", "name": "mine", "function": "somewhere:candidate", "num_images": 4}
SCORES = {"kind": "scores", "name": "people", "path": "scores.jsonl"}
ENDPOINT = {"kind": "endpoint", "endpoint": {"base_url": "http://localhost/v1", "model": "m"}}


def critic_only(**changes: Any) -> dict[str, Any]:
    """The smallest configuration of a critic."""
    return {
        "name": "test",
        "curation": {
            "planner": JUDGE,
            "evaluator": JUDGE,
            "sources": [FUNCTION],
            "dimensions": {"quality": {"rubric": "quality"}},
        },
        "critic": {"model": "tiny", "rubrics": {"quality": "quality"}},
        "bench": {"gate": {"rules": [{"metric": "mae", "at_most": 0.6}]}},
        **changes,
    }


def bench_only(**changes: Any) -> dict[str, Any]:
    plain = critic_only(critic={**ENDPOINT, "rubrics": {"quality": "quality"}}, curation=None)
    plain["bench"]["sources"] = [SCORES]
    return {**plain, **changes}


def refusal(plain: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(plain)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_the_stages_of_each_preset(name: str) -> None:
    assert stages_of(load_config(name)) == OF_PRESETS.get(name, WHOLE)


def test_a_critic_needs_neither_prompts_nor_policy() -> None:
    config = parse_config(critic_only())
    assert stages_of(config) == CRITIC
    assert config.dimensions == ("quality",) and config.reward is None
    assert stages_of(parse_config(critic_only(bench=None))) == ("curation", "sft", "report")


def test_a_critic_that_is_there_is_measured() -> None:
    assert stages_of(parse_config(bench_only())) == PROOF
    existing = {"kind": "existing", "model": "tiny", "rubrics": {"quality": "quality"}}
    assert stages_of(parse_config(bench_only(critic=existing))) == PROOF
    assert stages_of(parse_config(critic_only(critic=existing))) == CRITIC
    assert "a critic that is existing needs `model`" in refusal(bench_only(critic={**existing, "model": ""}))


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (critic_only(curation=None), "there is nothing from which the critic could learn (curation)"),
        (bench_only(bench=None), "the configuration describes no stage"),
        (critic_only(curation=None, bench=None, critic=bench_only()["critic"]), "describes no stage"),
        (bench_only(bench={"gate": critic_only()["bench"]["gate"]}), "nothing on which the critic could be measured"),
    ],
)
def test_what_makes_no_run_can_still_be_read_for_a_single_stage(plain: dict[str, Any], words: str) -> None:
    config = parse_config(plain)
    with pytest.raises(UserError) as caught:
        stages_of(config)
    assert words in str(caught.value) and caught.value.exit_code == 2


# ---- what RL demands


@pytest.mark.parametrize("preset", ["gen-shapes", "rl-gen-served"])
@pytest.mark.parametrize("section", ["prompts", "policy", "bench", "auditor"])
def test_rl_demands_what_it_always_has(preset: str, section: str) -> None:
    with pytest.raises(UserError, match=rf"rl needs .*\b{section}\b.*: add what is missing"):
        load_config(preset, [f"{section}=null"])


def test_rl_with_a_critic_that_is_trained_demands_curation() -> None:
    with pytest.raises(UserError, match="rl needs curation"):
        load_config("gen-shapes", ["curation=null", "bench.sources=[]"])


def test_everything_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"rl needs policy and auditor; bench.sources.0 needs policy"):
        load_config("gen-shapes", ["policy=null", "auditor=null"])


def test_gaps_of_the_gate_matter_to_rl_only() -> None:
    rules = "bench.gate.rules=[{metric: coverage, at_least: 0.9}]"
    with pytest.raises(UserError, match="no rule for instruction_following.skill_low.* on images of the policy"):
        load_config("gen-shapes", [rules])
    assert load_config("gen-shapes", [rules, "rl=null"]).rl is None


def test_a_reward_without_rl_says_what_the_critic_is_for() -> None:
    assert load_config("gen-shapes", ["rl=null"]).dimensions == ("instruction_following", "quality")
    with pytest.raises(UserError, match="reward needs .'quality'., for which critic.rubrics has no rubric"):
        load_config("gen-shapes", ["rl=null", "critic.rubrics={instruction_following: short_instruction_following}"])
    assert load_config("gen-shapes", ["reward=null"]) == load_config("gen-shapes"), "with RL it is QMA by default"


GENERATOR = {"kind": "generated", "name": "g", "policy": {"model": "tiny", "resolution": 8}}
STEPS = {"num_images": 4, "num_inference_steps": 1}
CURATION, BENCH = critic_only()["curation"], critic_only()["bench"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curation": {**CURATION, "sources": []}}, "curation.sources is empty"),
        ({"rounds": 2}, "more than one of rounds needs rl"),
        ({"bench": {**BENCH, "sources": [{"kind": "policy", **STEPS}]}}, "bench.sources.0 needs prompts and policy"),
        ({"curation": {**CURATION, "sources": [FUNCTION, GENERATOR | STEPS]}}, "curation.sources.1 needs prompts"),
        (
            {"critic": {"model": "tiny", "rubrics": {"quality": "quality", "instruction_following": "generation"}}},
            "critic.rubrics uses a dimension that curation.dimensions does not have: instruction_following",
        ),
    ],
)
def test_a_part_of_a_configuration_that_lacks_what_it_needs_is_refused(change: dict[str, Any], words: str) -> None:
    assert words in refusal(critic_only(**change))


# ---- what stages are given


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("curation", "curation"), ("bench", "bench"), ("rl", "policy and reward and rl and auditor"), ("evaluate", "rl")],
)
def test_a_stage_says_which_section_it_lacks(stage: Any, missing: str) -> None:
    config = parse_config(bench_only(bench=None) if stage == "bench" else bench_only())
    with pytest.raises(
        UserError, match=rf"the stage {stage} needs .*{missing}.*, which the configuration does not"
    ) as e:
        for_stage(config, stage)
    assert e.value.exit_code == 2 and missing.split()[0] in e.value.where


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_sees_the_same_run(stage: Any) -> None:
    config = load_config("gen-shapes")
    seen = for_stage(config, stage)
    assert seen.model_dump() == config.model_dump() and seen.policy is config.policy
    assert list(type(seen).model_fields) == list(RunConfig.model_fields)


def test_a_job_reads_what_a_step_has_written() -> None:
    config = load_config("gen-shapes")
    assert SteeredRun.model_validate(config.model_dump(mode="json")).model_dump() == config.model_dump()


# ---- leaving out


def test_null_leaves_a_section_of_the_base_out(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": "gen-shapes", "rl": None, "sft": None, "reward": None, "auditor": None}))
    config = load_config(str(child))
    assert (config.rl, config.auditor, config.reward) == (None, None, None)
    assert config.sft == parse_config(critic_only()).sft, "one that has defaults has them again"
    again = RunConfig.model_validate(config.model_dump(mode="json", exclude_none=True))
    assert again == config, "KFP has no null"
    child.write_text(yaml.safe_dump({"base": "gen-shapes", "rl": None, "critic": None}))
    with pytest.raises(UserError, match="critic: Field required"):
        load_config(str(child))
