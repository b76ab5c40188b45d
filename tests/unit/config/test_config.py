"""A mistake in a configuration is found before anything runs, and its message names the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from firm.config import RunConfig, fingerprint
from firm.config.loading import load_config, of_round, parse_config, preset_names
from firm.records import UserError

GAPS = [f"{d}.{what}" for d in ("instruction_following", "quality") for what in ("skill_low", "pairwise")]


@pytest.fixture
def plain() -> dict[str, Any]:
    """The smallest configuration: only what has no default."""
    judge = {"kind": "python", "target": "somewhere:Judge"}
    policy = {"model": "tiny", "resolution": 32}
    source = {"kind": "generated", "name": "base", "policy": policy, "num_images": 4, "num_inference_steps": 2}
    rubrics = {"instruction_following": "generation", "quality": "generation"}
    return {
        "name": "test",
        "prompts": {"function": "somewhere:prompts"},
        "policy": policy,
        "curation": {
            "planner": judge,
            "evaluator": judge,
            "sources": [source],
            "dimensions": {"instruction_following": {"rubric": "evaluate"}, "quality": {"rubric": "quality"}},
        },
        "critic": {"model": "tiny", "rubrics": rubrics},
        "bench": {"gate": {"rules": [{"metric": "mae", "at_most": 0.6}], "accept_gaps": GAPS}},
        "rl": {"prompts_per_epoch": 2, "group_size": 4, "max_epochs": 3},
        "auditor": {"judge": judge, "rubrics": {"instruction_following": "evaluate", "quality": "quality"}},
    }


@pytest.fixture
def file(plain: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    data[last] = value


def mistake(name: str | Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(str(name), overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_the_smallest_configuration_loads(file: Path) -> None:
    assert load_config(str(file)).rl.group_size == 4


@pytest.mark.parametrize("key", ["rl.group_sise", "typo", "critic.modell", "curation.sources.0.nam"])
def test_unknown_key_is_refused_with_its_path(plain: dict[str, Any], key: str) -> None:
    put(plain, key, 1)
    with pytest.raises(UserError) as caught:
        parse_config(plain, "mine.yaml")
    assert caught.value.exit_code == 2
    assert caught.value.where == "mine.yaml"
    *parents, last = key.split(".")
    assert last in str(caught.value)
    assert ".".join(parents) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "Not A Name"),
        ("seed", -1),
        ("prompts.path", "both.txt"),
        ("policy.resolution", 0),
        ("policy.dtype", "float16"),
        ("curation.planner.kind", "telepathy"),
        ("curation.sources", []),
        ("curation.dimensions.quality.target", {6: 1}),
        ("curation.dimensions.quality.target", {1: 0, 2: 0}),
        ("curation.dimensions", {"instruction_following": {"rubric": "evaluate"}}),
        ("critic.kind", "endpoint"),
        ("critic.model", ""),
        ("critic.rubrics", {"instruction_following": "generation"}),
        ("sft.learning_rate", float("inf")),
        ("sft.learning_rate", float("nan")),
        ("bench.gate.rules", []),
        ("bench.gate.rules", [{"metric": "mae"}]),
        ("bench.gate.rules", [{"metric": "maee", "at_most": 1}]),
        ("bench.gate.rules", [{"metric": "mae", "at_most": 1, "source": "elsewhere"}]),
        ("bench.gate.rules", [{"metric": "mae", "at_most": 1, "dimension": "beauty"}]),
        ("bench.gate.accept_gaps", [*GAPS, "quality.mae"]),
        ("bench.sources", [{"kind": "scores", "name": "base", "path": "scores.jsonl"}]),
        ("reward.weights", [0.4, 0.7]),
        ("reward.weights", [0.4, 0.3, 0.3]),
        ("reward.bonuses", []),
        ("reward.formula", ["qma"]),
        ("reward", {"formula": "cme", "base": "instruction_following", "bonuses": ["quality"]}),
        ("auditor.rubrics", {"instruction_following": "evaluate", "quality": "quality", "reward": "quality"}),
        ("rl.group_size", 1),
        ("rl.timestep_fraction", 1.5),
        ("rl.max_epochs", "many"),
        ("launch.num_workers", 0),
    ],
)
def test_impossible_value_is_refused_naming_its_section(plain: dict[str, Any], key: str, value: Any) -> None:
    put(plain, key, value)
    with pytest.raises(UserError) as caught:
        parse_config(plain)
    assert caught.value.exit_code == 2
    assert key.split(".")[0] in str(caught.value)


def test_soft_scores_need_a_critic_with_distributions(plain: dict[str, Any]) -> None:
    put(plain, "critic.kind", "endpoint")
    put(plain, "critic.endpoint", {"base_url": "http://localhost/v1", "model": "m"})
    put(plain, "critic.answer_style", "reason_first")
    endpoint = parse_config(plain).critic.endpoint
    assert endpoint is not None and endpoint.logprobs
    put(plain, "critic.endpoint.logprobs", False)
    with pytest.raises(UserError, match="or reward.soft to false and bench.point_estimate to score"):
        parse_config(plain)
    put(plain, "critic.num_samples", 3)
    parse_config(plain)
    put(plain, "critic.num_samples", 1)
    put(plain, "reward.soft", False)
    with pytest.raises(UserError, match="gives whole scores"):
        parse_config({**plain, "bench": {**plain["bench"], "point_estimate": "median"}})
    put(plain, "bench.point_estimate", "score")
    assert parse_config(plain).critic.kind == "endpoint"


def test_a_score_first_critic_is_asked_once(plain: dict[str, Any]) -> None:
    put(plain, "critic.answer_style", "score_first")
    put(plain, "critic.num_samples", 2)
    with pytest.raises(UserError, match="set num_samples to 1"):
        parse_config(plain)


def test_every_mistake_is_reported_at_once(file: Path) -> None:
    message = str(mistake(file, "rl.group_size=1", "seed=-1"))
    assert "rl.group_size" in message
    assert "seed" in message


def test_overrides_are_yaml_values_at_key_paths(file: Path) -> None:
    overrides = [
        "rl.group_size=8",
        "sft.learning_rate=1e-5",  # YAML 1.1 reads this as text, and the model still as a number
        "sft.lora={rank: 4, alpha: 8}",
        "curation.sources.0.name=other",
        "auditor.judge.target=a:B=C",
    ]
    config = load_config(str(file), overrides)
    assert config.rl.group_size == 8
    assert config.sft.learning_rate == 1e-5
    assert config.sft.lora is not None and config.sft.lora.rank == 4
    assert config.curation.sources[0].name == "other"
    assert config.auditor.judge.target == "a:B=C"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rl.group_size", "key=value"),
        ("=3", "key=value"),
        ("rl.group_size=[1", "rl.group_size"),
        ("rl.group_sise=3", "rl.group_sise"),
        ("name.first=x", "name"),
        ("curation.sources.first.name=x", "curation.sources"),
        ("curation.sources.first=x", "curation.sources"),
        ("curation.sources.7.name=x", "curation.sources"),
        ("curation.sources.7=x", "curation.sources"),
    ],
)
def test_a_wrong_override_is_refused(file: Path, override: str, named: str) -> None:
    assert named in str(mistake(file, override))


def test_an_override_of_an_alias_leaves_what_it_is_an_alias_of() -> None:
    """In gen-shapes one teacher is planner, evaluator and auditor, written once."""
    plain = load_config("gen-shapes")
    config = load_config("gen-shapes", ["auditor.judge.target=mine:Judge", "policy.resolution=64"])
    assert config.auditor.judge.target == "mine:Judge"  # type: ignore[union-attr]
    assert config.curation == plain.curation and config.policy.resolution == 64


def test_a_file_gives_differences_from_its_base(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": str(file), "name": "child", "rl": {"group_size": 6}}))
    config = load_config(str(child), ["rl.max_epochs=9"])
    assert (config.name, config.rl.group_size, config.rl.prompts_per_epoch) == ("child", 6, 2)
    assert config.rl.max_epochs == 9


ENDPOINT = {"kind": "endpoint", "base_url": "http://localhost:8000/v1", "model": "m"}


def test_a_section_whose_kind_changes_is_replaced(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    change = {"base": str(file), "curation": {"attempts": 7, "evaluator": ENDPOINT}, "auditor": {"judge": ENDPOINT}}
    child.write_text(yaml.safe_dump(change))
    config = load_config(str(child))
    for judge in (config.curation.evaluator, config.auditor.judge):
        assert judge.model_dump() | ENDPOINT == judge.model_dump()
    assert (config.curation.attempts, config.curation.planner) == (7, load_config(str(file)).curation.planner)
    same = tmp_path / "same.yaml"
    same.write_text(yaml.safe_dump({"base": str(child), "auditor": {"judge": {"kind": "endpoint", "model": "n"}}}))
    judge = load_config(str(same)).auditor.judge
    assert (judge.base_url, judge.model) == (ENDPOINT["base_url"], "n")  # type: ignore[union-attr]


@pytest.mark.parametrize("backwards", [False, True])
def test_an_override_of_a_kind_replaces_the_section_whatever_the_order(file: Path, backwards: bool) -> None:
    overrides = [f"auditor.judge.{key}={value}" for key, value in ENDPOINT.items()]
    config = load_config(str(file), reversed(overrides) if backwards else overrides)
    assert config.auditor.judge.model_dump() | ENDPOINT == config.auditor.judge.model_dump()


@pytest.mark.parametrize(("key", "other"), [("path", "function"), ("function", "path")])
def test_one_source_of_prompts_takes_the_place_of_the_other(file: Path, tmp_path: Path, key: str, other: str) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text(yaml.safe_dump({"base": str(file), "prompts": {other: "there", "limit": 9}}))
    child.write_text(yaml.safe_dump({"base": str(base), "prompts": {key: "mine"}}))
    for config in (load_config(str(child)), load_config(str(base), [f"prompts.{key}=mine"])):
        prompts = config.prompts.model_dump()
        assert (prompts[key], prompts[other], prompts["limit"]) == ("mine", None, 9)
    assert load_config(str(base), [f"prompts.{key}=null"]) == load_config(str(base)), "nothing takes no place"
    child.write_text(yaml.safe_dump({"base": str(base), "prompts": {key: "mine", other: "too"}}))
    assert "either path or function" in str(mistake(child))


def test_a_base_that_leads_back_to_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "circle.yaml"
    path.write_text(yaml.safe_dump({"base": str(path)}))
    mistake(path)


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert "broken.yaml" in str(mistake(path))


def test_unknown_preset_lists_the_known_ones() -> None:
    message = str(mistake("gen-shapez"))
    assert "gen-shapez" in message
    assert preset_names()
    for known in preset_names():
        assert known in message


def test_fingerprint_is_independent_of_the_order_of_keys(plain: dict[str, Any]) -> None:
    backwards = dict(reversed(plain.items()))
    assert fingerprint(RunConfig.model_validate(plain)) == fingerprint(RunConfig.model_validate(backwards))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_fingerprint_sees_every_difference(plain: dict[str, Any]) -> None:
    before = RunConfig.model_validate(plain)
    put(plain, "rl.group_size", 5)
    assert fingerprint(before) != fingerprint(RunConfig.model_validate(plain))
    assert fingerprint(before.sft) == fingerprint(RunConfig.model_validate(plain).sft)


def test_a_configuration_survives_json(plain: dict[str, Any]) -> None:
    config = RunConfig.model_validate(plain)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_the_order_of_keys_does_not_matter() -> None:
    """KFP passes dicts through protobuf maps, which come back in any order."""
    config = load_config("gen-shapes")
    plain = config.model_dump(mode="json")
    dimensions = plain["curation"]["dimensions"]
    plain["curation"]["dimensions"] = dict(reversed(dimensions.items()))
    assert list(RunConfig.model_validate(plain).curation.dimensions) == list(config.curation.dimensions)


def test_a_further_round_is_the_same_run_with_its_changes_and_other_draws(file: Path) -> None:
    more = ["rounds=2", "further_rounds.sft.max_steps=7", "further_rounds.rl.max_epochs=9"]
    config = load_config(str(file), more)
    second = of_round(config, 2)
    assert of_round(config, 1) is config and (config.sft.max_steps, config.rl.max_epochs) == (None, 3)
    assert (second.sft.max_steps, second.rl.max_epochs, second.rl.group_size) == (7, 9, 4)
    assert second.seed != config.seed and (second.prompts, second.evaluate) == (config.prompts, config.evaluate)
    assert of_round(load_config(str(file), ["rounds=3"]), 3).seed not in (config.seed, second.seed)
    with pytest.raises(UserError, match="there is no round 3: the run has 2"):
        of_round(config, 3)


def test_changes_of_further_rounds_are_checked_when_the_configuration_is_read(file: Path) -> None:
    assert "further_rounds.policy" in str(mistake(file, "further_rounds.policy.model=other"))
    error = mistake(file, "rounds=2", "further_rounds.rl.group_size=1")
    assert "(further_rounds)" in str(error) and "rl.group_size" in str(error)


def covering(source: str = "policy", **changes: Any) -> dict[str, Any]:
    """A bench without gaps."""
    skill = {"metric": "skill_low", "source": source, "at_least": 0}
    pairs = {"metric": "pairwise", "source": source, "at_least": 0.6}
    policy = {"kind": "policy", "name": "policy", "num_images": 8, "num_inference_steps": 2}
    return {"sources": [policy], "gate": {"rules": [skill, pairs]}, **changes}


def test_a_gate_that_covers_the_reward_on_the_policy_s_own_images(plain: dict[str, Any]) -> None:
    assert parse_config({**plain, "bench": covering()}).bench.gate.accept_gaps == []
    people = {"kind": "scores", "name": "people", "path": "scores.jsonl"}
    own = {**people, "of_policy": True}
    assert parse_config({**plain, "bench": covering("people", sources=[own])})
    with pytest.raises(UserError, match="instruction_following.skill_low, instruction_following.pairwise"):
        parse_config({**plain, "bench": covering("people", sources=[people])})
    with pytest.raises(UserError, match="no rule for .*quality.pairwise on images of the policy"):
        parse_config({**plain, "bench": covering("base")})


@pytest.mark.parametrize(
    ("number", "change", "gaps"),
    [
        (0, {"dimension": "quality"}, ["instruction_following.skill_low"]),
        (0, {"at_least": -0.1}, GAPS[::2]),
        (0, {"at_least": float("nan")}, GAPS[::2]),
        (0, {"at_least": None, "at_most": 1}, GAPS[::2]),
        (0, {"metric": "skill"}, GAPS[::2]),
        (1, {"metric": "pairwise_low"}, []),
        (1, {"at_least": 0.5}, GAPS[1::2]),
        (1, {"metric": "pairwise_high"}, GAPS[1::2]),
        (1, {"dimension": "instruction_following"}, ["quality.pairwise"]),
        (1, {"source": None}, GAPS[1::2]),
    ],
)
def test_a_gap_is_refused_unless_it_is_accepted(
    plain: dict[str, Any], number: int, change: dict[str, Any], gaps: list[str]
) -> None:
    bench = covering()
    bench["gate"]["rules"][number] |= change
    if gaps:
        with pytest.raises(UserError, match=f"no rule for {', '.join(gaps)} on"):
            parse_config({**plain, "bench": bench})
    bench["gate"]["accept_gaps"] = gaps
    assert parse_config({**plain, "bench": bench}).bench.gate.accept_gaps == gaps


def test_a_rule_on_scores_that_the_teacher_does_not_give_is_refused(plain: dict[str, Any]) -> None:
    endpoint = {"base_url": "http://localhost:8000/v1", "model": "m"}
    served = {**plain["critic"], "kind": "endpoint", "endpoint": endpoint}
    dimensions = {"instruction_following": plain["curation"]["dimensions"]["instruction_following"]}
    data = {**plain, "critic": served, "curation": {**plain["curation"], "dimensions": dimensions}, "bench": covering()}
    with pytest.raises(UserError, match="rules.0.source: the teacher judges policy, but not its quality"):
        parse_config(data)


def test_only_dimensions_of_the_reward_need_rules(plain: dict[str, Any]) -> None:
    bench = covering()
    bench["gate"]["rules"] = [{**rule, "dimension": "instruction_following"} for rule in bench["gate"]["rules"]]
    assert parse_config({**plain, "bench": bench, "reward": {"formula": "base_only", "base": "instruction_following"}})
