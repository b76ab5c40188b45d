"""The first step of a pipeline on a cluster, and what is refused before a run is submitted."""

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from firm.cli import app
from firm.config import STAGES
from firm.config.loading import load_config
from firm.launch.k8s.names import GPU_TOLERATION
from firm.submission import execute

KIND = "gen-shapes-kind"
Change = Callable[[dict[str, Any]], None]


def plain(*overrides: str, preset: str = KIND) -> dict[str, Any]:
    return load_config(preset, overrides).model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize(("gpus", "tolerations"), [("0", []), ("1", [GPU_TOLERATION]), ("16", [GPU_TOLERATION])])
def test_steps_tolerate_nodes_with_gpus_where_they_have_some(gpus: str, tolerations: list[Any]) -> None:
    assert execute(plain(), gpus, 1).tolerations == tolerations


def test_secrets_have_the_names_that_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert execute(plain(), "0", 1)[:2] == ("object-store", "firm-endpoints")
    monkeypatch.setenv("FIRM_STORE_SECRET", "seaweedfs-s3")
    monkeypatch.setenv("FIRM_ENDPOINTS_SECRET", "team-keys")
    assert execute(plain(), "0", 1)[:2] == ("seaweedfs-s3", "team-keys")


@pytest.mark.parametrize(
    ("config", "gpus", "rounds", "words"),
    [
        ({**plain(), "rll": {}}, "0", 1, ["rll", "Extra inputs"]),
        (plain(preset="gen-shapes"), "0", 1, ["do not share a folder", "store: runs"]),
        (plain("store=s3://firm/runs", preset="gen-shapes"), "0", 1, ["launch.kind", "pytorchjob"]),
        (plain("rounds=2"), "0", 1, ["the run has 2 round(s), and this pipeline 1", "make pipelines"]),
        (plain(), "0", 2, ["the run has 1 round(s), and this pipeline 2"]),
        (plain(), "one", 1, ["gpus", "'one'"]),
        (plain(), "-1", 1, ["gpus"]),
        (plain(), "²", 1, ["gpus"]),
        (plain("policy.model=/models/none"), "0", 1, ["policy.model", "/models/none"]),
        (plain("policy.family=dall-e"), "0", 1, ["policy.family", "dall-e"]),
        (plain("evaluate.suite=none"), "0", 1, ["evaluate.suite"]),
        (plain("prompts.path=own.jsonl"), "0", 1, ["prompts.path", "firm put own.jsonl s3://firm/data"]),
        (plain("auditor.rubrics.quality=none"), "0", 1, ["none"]),
        (plain("curation.sources.0.function=firm.none:f"), "0", 1, ["curation.sources.0.function", "firm.none"]),
    ],
)
def test_a_mistake_anywhere_costs_the_first_step_alone(
    config: dict[str, Any], gpus: str, rounds: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        execute(config, gpus, rounds)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and not [word for word in words if word not in said], (
        said
    )


def test_what_is_in_s3_is_left_to_a_step_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    config = plain("prompts.path=s3://firm/data/x.jsonl")
    config["curation"]["sources"][0] = {"kind": "files", "name": "rendered", "path": "s3://firm/data/x.jsonl"}
    config["bench"]["sources"].append({"kind": "scores", "name": "people", "path": "s3://firm/data/x.jsonl"})
    assert execute(config, "0", 1)


CRITIC = ["curation", "sft", "bench", "gate", "report"]
LEFT_OUT = (
    "policy=null",
    "rl=null",
    "auditor=null",
    "bench.sources=[]",
    "bench.gate.rules=[{metric: mae, at_most: 1}]",
)


def test_a_run_of_some_stages_has_a_pipeline_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(plain(*LEFT_OUT), "0", 1, CRITIC)
    for config, stages in ((plain(*LEFT_OUT, "bench=null"), CRITIC), (plain(), CRITIC), (plain(*LEFT_OUT), STAGES)):
        with pytest.raises(SystemExit) as ended:
            execute(config, "0", 1, stages)
        assert ended.value.code == 2
    refused = capsys.readouterr().err.split("error: ")[1:]
    assert "the stage bench needs bench" in refused[0]
    described = f"describes {', '.join(STAGES)}, and this pipeline runs {', '.join(CRITIC)}"
    assert described in refused[1] and "make pipelines" in refused[1]
    assert "the stage rl needs policy and rl and auditor" in refused[2]


def test_a_pipeline_of_one_stage_asks_for_what_that_stage_needs(capsys: pytest.CaptureFixture[str]) -> None:
    alone = plain(*LEFT_OUT, "curation=null", "bench=null", "prompts=null")
    assert execute(alone, "0", 0, ["sft"])
    with pytest.raises(SystemExit):
        execute(alone, "0", 0, ["bench", "gate"])
    assert "the stage bench needs bench, which the configuration does not have" in capsys.readouterr().err


def test_a_pipeline_of_one_stage_takes_a_run_of_any_number_of_rounds() -> None:
    assert execute(plain("rounds=2"), "0", 0)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("gen-shapes", (), "do not share a folder"),
        ("gen-shapes", ("store=s3://firm/runs",), "launch.kind"),
        (KIND, ("auditor.rubrics.quality=none",), "none"),
        (KIND, ("auditor.rubrics.quality=instruction_following",), "judges instruction_following, not quality"),
    ],
)
def test_json_for_a_submission_is_refused_where_the_run_would_be(
    preset: str, overrides: tuple[str, ...], words: str
) -> None:
    arguments = ["config", "show", preset, "--json", *(word for one in overrides for word in ("--set", one))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0 and words in str(result.exception) and not result.stdout
