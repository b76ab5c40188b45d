import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from unit.report.made import DIMENSIONS, GAPS, INPUTS, make, report, rl, scores, sft

from firm.config import RunConfig
from firm.config.loading import load_config, parse_config
from firm.records import Summary, UserError
from firm.report.run import ARTIFACTS, STAGE, run
from firm.storage.artifacts import Output
from firm.storage.files import sha256_file


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("gen-shapes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> tuple[str, str, Summary]:
    root = tmp_path_factory.mktemp("whole")
    return report(root / "report", config, make(root, config))


def test_the_page_says_what_came_out(whole: tuple[str, str, Summary]) -> None:
    page, data, summary = unescape(whole[0]), json.loads(whole[1]), whole[2]
    own = [row for row in data["agreement"] if row["by"] == "source" and row["value"] == "policy"]
    assert [row["dimension"] for row in own] == list(DIMENSIONS)
    errors = " and ".join(f"{r['mae']:.2f} for {r['dimension']} (best constant {r['constant_mae']:.2f})" for r in own)
    for sentence in (
        "The critic is trusted: on the policy's own images its error against the teacher's scores is "
        f"{errors.replace('_', ' ')}.",
        "RL raised the reward (QMA) by the auditor's scores on held-out prompts from 0.400 to 0.480 (gain +0.080, "
        "95% CI +0.063 to +0.097); in points +0.48 for instruction following.",
        "Over-optimisation was caught at epoch 50: quality fell for the auditor, not for the critic.",
    ):
        assert sentence in page
        assert sentence in summary.notes
        assert sentence in [headline["title"] for headline in data["headlines"]]
    assert "12 of 30 pairs" in page
    assert "1 pair without the auditor's judgement" in page
    assert "19 judgements failed" in page  # 6 of the teacher, 4 of the bench, 3 of RL and its audits, 6 of evaluate
    trust = data["headlines"][0]["text"]
    assert "Measured on 80 images of the policy that RL started from" in trust
    assert "it ranks" not in trust, "no prompt has two images"
    assert "people's scores" in page and "0.61" in page and "&lt;b&gt;people" in whole[0]
    assert "unparsable: 1" in page
    assert summary.metrics["instruction_following_mae"] == own[0]["mae"]
    assert summary.metrics["auditor_reward_gain"] == pytest.approx(0.08)
    assert summary.metrics["auditor_instruction_following_gain"] == 0.48
    assert [row["dimension"] for row in data["scores"][::3]] == ["reward", *DIMENSIONS[:1], *DIMENSIONS]
    assert data["held_out"]["y"] == [1.2, 0.7] and "error on held-out examples" in page and "in points" in page
    for part in ("histogram", "errors", "confusion", "audits", "loss", "before-after"):
        assert f'id="{part}' in page


@pytest.mark.parametrize("edits", [False, True])
def test_a_film_shows_audits_at_equal_distances(tmp_path: Path, config: RunConfig, edits: bool) -> None:
    page, _, _ = report(tmp_path / "report", config, make(tmp_path, config, edits=edits))
    film = page.split('<table class="film">')[1].split("</table>")[0]
    assert re.findall(r"<th>([^<]+)", film) == [
        *(["source"] if edits else []),
        "base",
        *(f"epoch {epoch}" for epoch in (5, 15, 20, 30, 35, 45, 50)),
    ]
    pictures = re.findall(r'src="(data:[^"]+)"', film)
    assert len(pictures) == len(set(pictures)) == 8 + edits
    assert "<script>" not in film


def test_a_film_shows_the_prompts_that_all_its_audits_have(tmp_path: Path, config: RunConfig) -> None:
    """It went on with more processes, so that the first had a smaller share."""
    inputs = make(tmp_path, config)
    path = inputs["policy"] / "film.jsonl"
    first, *others = map(json.loads, path.read_text().splitlines())
    first["shots"] *= 3
    path.write_text("\n".join(map(json.dumps, [first, *others])))
    page, _, _ = report(tmp_path / "report", config, inputs)
    assert page.split('<table class="film">')[1].split("</table>")[0].count("<img") == 8


@pytest.mark.parametrize("film", [None, '{"epoch": 0, "shots": []}\n'])
def test_a_policy_without_pictures_has_no_film_on_the_page(tmp_path: Path, config: RunConfig, film: str | None) -> None:
    inputs = make(tmp_path, config)
    (inputs["policy"] / "film.jsonl").unlink()
    if film:
        (inputs["policy"] / "film.jsonl").write_text(film)
    assert 'class="film"' not in report(tmp_path / "report", config, inputs)[0]


def test_the_page_says_what_was_rewritten(whole: tuple[str, str, Summary]) -> None:
    page, _, _ = whole
    assert "the prompts of 40 images were rewritten" in page and "5 → –" in page and "&lt;i&gt;no circle" in page


def test_all_dimensions_together_are_a_row_of_each_judge_and_source(whole: tuple[str, str, Summary]) -> None:
    page, data = whole[0], json.loads(whole[1])
    assert [(row["judge"], row["value"]) for row in data["overall"]] == [
        (judge, value) for judge in ("critic", "auditor") for value in ("all", "<b>$x$", "policy")
    ]
    mine = [row for row in data["agreement"] if row["by"] == "all"]
    weighted = sum(row["num_valid"] * row["mae"] for row in mine) / sum(row["num_valid"] for row in mine)
    assert data["overall"][0]["mae"] == pytest.approx(weighted) and "All dimensions together" in page


def test_the_page_of_a_run_of_edits_speaks_of_edits(tmp_path: Path, config: RunConfig) -> None:
    page, data, summary = report(tmp_path / "report", config, make(tmp_path, config, edits=True))
    articles = re.findall(r'<article class="pair">.*?</article>', page, re.DOTALL)
    assert len(articles) == 12 and json.loads(data)["pairs"]["edits"] and '<div class="pairs edits">' in page
    assert "0% and 20% are untouched; 0% and 0% are empty." in unescape(page)
    for article in articles:
        assert re.findall("<figcaption>(.*?)</figcaption>", article) == ["source", "before", "after"]
        assert len(set(re.findall(r'src="(.*?)"', article))) == 3
        assert {"critic", "auditor"} == set(re.findall(r'<b class="(\w+)">', article))
    own_words = re.sub(
        r"<style>.*?</style>|<details><summary>Show the configuration.*?</details>", "", page, flags=re.DOTALL
    )
    found = re.findall(r"[^.>]*\b(?:prompts?|generators?|drew|draws?)\b[^.<]*", own_words)
    assert not found
    assert "FIRM improves an image editor" in page and "of two edits of one source and instruction" in unescape(page)
    assert any("scores on held-out instructions from" in note for note in summary.notes)


def test_the_page_needs_nothing_else(whole: tuple[str, str, Summary]) -> None:
    page = whole[0]
    targets = re.findall(r"""\b(?:src|href|srcset|action|poster|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert not [t for t in targets if not t.startswith(("data:", "#"))]
    assert not [u for u in re.findall(r"url\(([^)]*)\)", page) if not u.startswith("#")]
    assert "@import" not in page
    assert not re.search(r"<(script|iframe|object|embed)\b", page)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {t[1:] for t in targets if t.startswith("#")} <= set(identifiers)


def test_texts_of_others_are_escaped(whole: tuple[str, str, Summary]) -> None:
    page = whole[0]
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;$x$" in page  # a source's name, in a figure as well as in tables
    assert "<b>$x$" not in page
    assert "RL &lt;stopped&gt;" in page


def test_the_whole_configuration_is_shown_but_the_store(whole: tuple[str, str, Summary], config: RunConfig) -> None:
    assert set(STAGE.sections) == set(RunConfig.model_fields) - {"store"}
    text = unescape(whole[0].split("<pre>")[1].split("</pre>")[0])
    shown = yaml.safe_load(text)
    assert "store" not in shown
    assert parse_config(shown).model_dump(exclude={"store"}) == config.model_dump(exclude={"store"})


def test_equal_runs_give_equal_pages_however_long_they_took(
    whole: tuple[str, str, Summary], tmp_path: Path, config: RunConfig
) -> None:
    elsewhere = config.model_copy(update={"store": str(tmp_path)})
    page, data, summary = report(tmp_path / "report", elsewhere, make(tmp_path, config, seconds=3700.0))
    assert (page, data, summary) == whole


def test_an_endpoint_critic_without_a_stop(tmp_path: Path, config: RunConfig) -> None:
    changes = {"critic": sft(trained=False), "policy": rl(stopped=False), "samples": scores(-0.02, -0.1, 0.05)}
    page, _, summary = report(tmp_path / "report", config, make(tmp_path, config, changes))
    page = unescape(page)
    assert "The critic was not trained in this run." in page
    assert "nothing was trained" in page
    assert "No over-optimisation was caught in 50 epochs of RL; kept epoch 20." in summary.notes
    assert "RL did not measurably change" in page
    assert "−0.02" in page
    assert "over-optimisation</text>" not in page  # nothing is shaded


@pytest.mark.parametrize("name", ["critic", "bench", "policy"])
def test_a_broken_chain_is_an_error(tmp_path: Path, config: RunConfig, name: str) -> None:
    inputs = make(tmp_path, config)
    manifest = inputs[name] / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(
        UserError, match=f"chain of artifacts is broken: .* was made from {name} .{{12}}, but the {name} given is"
    ):
        run(config, inputs, Output.open(str(tmp_path / "report")))
    assert not (tmp_path / "report" / "report.html").exists()


def test_artifacts_that_lead_nowhere_are_an_error(tmp_path: Path, config: RunConfig) -> None:
    inputs = make(tmp_path / "a", config, samples={})
    with pytest.raises(UserError, match="was made from bench, critic, data, policy, verdict"):
        run(config, inputs, Output.open(str(tmp_path / "report")))
    inputs = make(tmp_path / "b", config, policy={"teacher": "0" * 64})
    with pytest.raises(UserError, match="policy was made from teacher 000000000000, but no teacher was given"):
        run(config, inputs, Output.open(str(tmp_path / "report")))


@pytest.mark.parametrize("file", ["manifest.json", "summary.json"])
@pytest.mark.parametrize("content", [None, "{}"])
def test_incomplete_artifacts_are_named(tmp_path: Path, config: RunConfig, file: str, content: str | None) -> None:
    inputs = make(tmp_path, config)
    if content is None:
        (inputs["bench"] / file).unlink()
    else:
        (inputs["bench"] / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(inputs["bench"]))):
        run(config, inputs, Output.open(str(tmp_path / "report")))


def test_the_artifacts_are_those_of_the_pipeline() -> None:
    assert set(ARTIFACTS) == set(INPUTS)


def test_a_further_round_goes_on_from_the_last(tmp_path: Path) -> None:
    only_later = {"rules": [{"metric": "coverage", "at_least": 0.5}], "accept_gaps": GAPS}
    config = load_config("gen-shapes", ["rounds=2", f"further_rounds.bench.gate={json.dumps(only_later)}"])
    inputs = make(tmp_path / "a", config)
    first = Output.open(str(tmp_path / "first"))
    run(config, inputs, first)
    hashes = {name: sha256_file(folder / "manifest.json") for name, folder in inputs.items()}
    first.commit("report", "key", hashes, {}, ["data.json"])

    def second(policy: str) -> str:
        """The data of a round whose RL started from a policy."""
        last = {"critic": {"last_critic": hashes["critic"]}, "policy": {"last_policy": policy}}
        made = make(tmp_path / policy[:4], config, {"samples": scores(0.9, 0.7, 1.1)}, more=last)
        return report(tmp_path / f"report-{policy[:4]}", config, made | {"last_report": first.folder})[1]

    data = json.loads(second(hashes["policy"]))
    assert data["accepted_gaps"] == GAPS and "No rule of the gate looks at" in data["headlines"][0]["text"]
    assert data["config"] == config.model_dump(mode="json", exclude={"store"}, exclude_none=True)
    rounds = data["rounds"]
    assert [row["gain"] for row in rounds] == pytest.approx([0.08, 0.15])
    assert [row["gains"] for row in rounds] == [dict(zip(DIMENSIONS, (x, None), strict=True)) for x in (0.48, 0.9)]
    agreement = Summary.model_validate_json((inputs["bench"] / "summary.json").read_text()).tables["agreement"]
    own = {r["dimension"]: r["pairwise"] for r in agreement if (r["judge"], r["value"]) == ("critic", "policy")}
    for row in rounds:
        assert {d: pairs["start"] for d, pairs in row["pairwise"].items()} == own
    assert rounds[0]["lineage"] == json.loads((first.folder / "data.json").read_text())["lineage"]
    with pytest.raises(UserError, match="policy was made from last_policy 0000.*, but the last_policy given is"):
        second("0" * 64)


def test_the_auditor_is_named_as_the_teacher_however_it_is_asked(tmp_path: Path) -> None:
    judge = "{{kind: endpoint, base_url: 'http://localhost:{}/v1', model: {}, concurrency: {}}}"
    evaluator = f"curation.evaluator={judge.format(1, 'big', 2)}"
    for name, model in (("same", "big"), ("other", "another")):
        config = load_config("gen-shapes", [evaluator, f"auditor.judge={judge.format(2, model, 4)}"])
        page, data, _ = report(tmp_path / f"report-{name}", config, make(tmp_path / name, config))
        assert json.loads(data)["auditor_is_teacher"] == (name == "same")
        assert ("the auditor is the judge that was also the teacher" in page) == (name == "same")
