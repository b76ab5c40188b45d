import json
import re
from base64 import b64decode
from collections.abc import Mapping
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from firm.bench.gate import judge_gate
from firm.config import RunConfig
from firm.config.loading import load_config, parse_config
from firm.critics.agreement import Expected, Prediction, agreement
from firm.images import encode_image
from firm.records import Assessment, Curve, Invalid, Judgement, Sample, Summary, UserError
from firm.report.headlines import headlines
from firm.report.pairs import choose, pictures
from firm.report.run import ARTIFACTS, STAGE, _duration, run
from firm.storage.artifacts import Output
from firm.storage.files import sha256_file
from firm.storage.shards import ShardWriter

DIMENSIONS = ("instruction_following", "quality")
EVIL = "a <script>alert('x')</script> & a red circle"
INPUTS = {
    "data": (),
    "critic": ("data",),
    "bench": ("data", "critic"),
    "verdict": ("bench",),
    "policy": ("critic", "verdict"),
    "samples": ("critic", "policy"),
}


RATERS = [
    {"source": "<b>people", "dimension": "quality", "whose": "people", "raters": 3, "images": 40, "n": 97, "mae": 0.61,
     "spearman": 0.71, "pairwise": None}
]  # fmt: skip


def curation() -> Summary:
    rows = [
        {"dimension": d, "what": what, **{str(s): size * s for s in range(1, 6)}, "invalid": invalid}
        for d in DIMENSIONS
        for what, size, invalid in (("judged: <b>$x$", 70, 3), ("judged: _base", 30, 0), ("train examples", 50, 0))
    ]
    metrics = {"candidates": 1503.0, "invalid_judgements": 6.0, "train_examples": 1500.0, "test_examples": 240.0}
    return Summary(stage="curation", metrics=metrics, tables={"histogram": rows})


def sft(trained: bool = True) -> Summary:
    if not trained:
        return Summary(stage="sft", notes=["The critic is served at an endpoint: nothing was trained."])
    return Summary(stage="sft", metrics={"loss": 0.5}, curves=[Curve(name="loss", x=[10, 20, 30], y=[3.0, 1.0, 0.5])])


def bench(config: RunConfig) -> Summary:
    predictions = [
        Prediction(
            id=str(i),
            prompt=f"prompt {i}",
            dimension=d,
            difficulty="easy" if i % 2 else "hard",
            source="policy" if i % 3 else "<b>$x$",
            whose="teacher",
            reference=i % 5 + 1,
            outcome=Judgement(score=min(5, i % 5 + 1 + (i % 4 == 0))) if i else Invalid(reason="unparsable"),
        )
        for d in DIMENSIONS
        for i in range(120)
    ]
    expected = [Expected(**p.model_dump(exclude={"outcome"})) for p in predictions]
    result = agreement(predictions, "score", 50, 0, expected)
    auditor = agreement(predictions[:200], "score", 50, 0, judge="auditor")
    checks = [check.model_dump() for check in judge_gate(config.bench.gate, result, DIMENSIONS).checks]
    tables = {name: rows + auditor.tables()[name] for name, rows in result.tables().items()}
    metrics = {"trusted": 1.0, **result.headline()}
    return Summary(stage="bench", metrics=metrics, tables={**tables, "gate": checks, "raters": RATERS})


def rl(stopped: bool = True, kept: int = 20) -> Summary:
    rewards = {0: 0.29, 10: 0.32, 20: 0.35, 30: 0.33, 40: 0.31, 50: 0.3}
    audits = [
        {
            "sample": sample, "epoch": e, "critic_reward": 0.4 + e / 200, "auditor_reward": rewards[e],
            **{f"{who}_{d}": 3 + e / 50 for who in ("critic", "auditor") for d in ("instruction_following", "quality")},
            "agreement": None, "pairwise": 0.7, "invalid": e == 30,
            "gain": rewards[e] - 0.29, "gain_low": rewards[e] - 0.31 if e else None,
            "gain_high": rewards[e] - 0.27 if e else None,
        }
        for sample, epochs in (("check", rewards), ("choice", (0, kept, 50)), ("report", (0, kept)))
        for e in epochs
    ]  # fmt: skip
    fall = {
        "measure": "quality", "since": 20, "until": 50, "auditor_before": 4.2, "auditor_after": 3.9,
        "critic_before": 4.1, "critic_after": 4.3, "at_least": 0.05,
    }  # fmt: skip
    metrics = {
        "epochs": 50.0, "kept_epoch": float(kept), "stopped_by_auditor": float(stopped), "auditor_reward_base": 0.29,
        "auditor_reward_kept": rewards[kept], "gain": 0.06, "gain_low": 0.04, "gain_high": 0.08,
        "invalid_judgements": 2.0,
    }  # fmt: skip
    tables = {"audits": audits, "stop": [fall] if stopped else []}
    return Summary(stage="rl", metrics=metrics, tables=tables, notes=["RL <stopped> at epoch 50."])


def scores(gain: float = 0.48, low: float = 0.38, high: float = 0.58, after: float = 0.61) -> Summary:
    rows = []
    for judge, d in (("critic", "quality"), ("critic", DIMENSIONS[0]), ("auditor", DIMENSIONS[0])):
        for policy, mean, a, b in (
            ("base", 2.97, 2.8, 3.1),
            ("final", 2.97 + gain, 3.3, 3.6),
            ("gain", gain, low, high),
        ):
            row = {"judge": judge, "dimension": d, "policy": policy, "mean": mean, "low": a, "high": b}
            rows.append({**row, "n": 29, "invalid": 1})
    metrics = {f"auditor_{DIMENSIONS[0]}_{row['policy']}": row["mean"] for row in rows[-3:]}
    failed = [{k: r[k] for k in ("judge", "dimension", "policy")} | {"invalid": 1, "of": 30} for r in rows]
    agreed = [
        {"dimension": d, "policy": policy, "pairwise": pairs, "skill": 0.1 if pairs == 0.61 else 0.4, "skill_low": 0.05}
        for d, before, end in ((DIMENSIONS[0], 0.83, after), ("quality", 0.78, 0.76))
        for policy, pairs in (("base", before), ("final", end))
    ]
    tables = {"scores": rows, "invalid": [r for r in failed if r["policy"] != "gain"], "agreement": agreed}
    return Summary(stage="evaluate", metrics=metrics, tables=tables)


def judged(value: int | None) -> Assessment:
    return {DIMENSIONS[0]: Invalid(reason="empty") if value is None else Judgement(score=value)}


def write_samples(folder: Path, auditor: Mapping[int, tuple[int | None, int | None]], side: int = 8) -> Path:
    writer = ShardWriter(folder / "samples", Sample, 16)
    for which, policy in enumerate(("base", "final")):
        for index, values in auditor.items():
            sample = Sample(
                index=index,
                prompt=EVIL if index == 0 else f"prompt {index}",
                seed=index,
                policy=policy,  # type: ignore[arg-type]
                images=[encode_image(Image.new("RGB", (side, side), (index % 256, 200 * which, 90)))],
                scores={
                    "critic": {
                        **judged(3 + which),
                        "quality": Judgement(score=4, distribution=(0, 0, 0.25, 0.5, 0.25)),
                    },
                    "auditor": judged(values[which]),
                },
            )
            writer.write([sample])
    writer.close()
    return folder / "samples"


GAINS = {i: (3, 3 + (i * 7) % 5 - 2) for i in range(30)} | {29: (None, 4)}


def make(
    root: Path,
    config: RunConfig,
    changes: Mapping[str, Summary] | None = None,
    seconds: float | None = 65.0,
    more: Mapping[str, Mapping[str, str]] | None = None,
    **links: Any,
) -> dict[str, Path]:
    """Artifacts of a whole run, committed as the stages do; ``links`` replaces an artifact's inputs, ``more`` adds."""
    gate = Summary(stage="gate", metrics={"trusted": 1.0}, notes=["spearman is 0.93, as demanded at least 0.60"])
    made = {
        "data": curation(),
        "critic": sft(),
        "bench": bench(config),
        "verdict": gate,
        "policy": rl(),
        "samples": scores(),
    }
    hashes: dict[str, str] = {}
    folders = {}
    for name, summary in (made | dict(changes or {})).items():
        out = Output.open(str(root / name))
        (out.folder / "summary.json").write_text(summary.model_dump_json())
        files = ["summary.json"]
        if name == "samples":
            write_samples(out.folder, GAINS)
            files.append("samples")
        inputs = links.get(name, {source: hashes[source] for source in INPUTS[name]}) | dict((more or {}).get(name, {}))
        hashes[name] = out.commit(summary.stage, "key", inputs, {}, files).sha256
        if seconds is not None:
            (out.folder / "timing.json").write_text(json.dumps({"seconds": seconds}))
        folders[name] = out.folder
    return folders


def report(folder: Path, config: RunConfig, inputs: dict[str, Path]) -> tuple[str, str, Summary]:
    """The page, the data file and the stage's summary."""
    summary = run(config, inputs, Output.open(str(folder)))
    return (folder / "report.html").read_text(), (folder / "data.json").read_text(), summary


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("gen-shapes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> tuple[str, str, Summary]:
    root = tmp_path_factory.mktemp("whole")
    return report(root / "report", config, make(root, config))


def without_timings(page: str) -> str:
    return re.sub(r'<section id="timings">.*?</section>', "", page, flags=re.DOTALL)


def test_the_page_says_what_came_out(whole: tuple[str, str, Summary]) -> None:
    page, data, summary = unescape(whole[0]), json.loads(whole[1]), whole[2]
    own = [row for row in data["agreement"] if row["by"] == "source" and row["value"] == "policy"]
    assert [row["dimension"] for row in own] == list(DIMENSIONS)
    errors = " and ".join(f"{r['mae']:.2f} for {r['dimension']} (best constant {r['constant_mae']:.2f})" for r in own)
    for sentence in (
        "The critic is trusted: on the policy's own images its error against the teacher's scores is "
        f"{errors.replace('_', ' ')}.",
        "RL raised the auditor's score on held-out prompts from 2.97 to 3.45 (gain +0.48, 95% CI +0.38 to +0.58).",
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
    assert page.count("6 min 30 s") == 1
    assert "unparsable: 1" in page
    assert summary.metrics["instruction_following_mae"] == own[0]["mae"]
    assert summary.metrics["auditor_gain"] == 0.48
    for part in ("histogram", "errors", "confusion", "audits", "loss", "before-after"):
        assert f'id="{part}' in page


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


def test_equal_runs_give_equal_pages_but_for_timings(
    whole: tuple[str, str, Summary], tmp_path: Path, config: RunConfig
) -> None:
    elsewhere = config.model_copy(update={"store": str(tmp_path)})
    page, data, summary = report(tmp_path / "report", elsewhere, make(tmp_path, config, seconds=3700.0))
    assert (data, summary) == whole[1:]
    assert page != whole[0]
    assert "6 h 10 min" in page
    assert without_timings(page) == without_timings(whole[0])


def test_an_endpoint_critic_without_timings_or_stop(tmp_path: Path, config: RunConfig) -> None:
    changes = {"critic": sft(trained=False), "policy": rl(stopped=False), "samples": scores(-0.02, -0.1, 0.05)}
    page, _, summary = report(tmp_path / "report", config, make(tmp_path, config, changes, seconds=None))
    page = unescape(page)
    assert "The critic was not trained in this run." in page
    assert "nothing was trained" in page
    assert "The times of this run are not known." in page
    assert "No over-optimisation was caught in 50 epochs of RL; kept epoch 20." in summary.notes
    assert "RL did not measurably change" in page
    assert "−0.02" in page
    assert "over-optimisation</text>" not in page  # nothing is shaded


def tables(summaries: Mapping[str, Summary], name: str) -> list[dict[str, Any]]:
    return summaries["bench"].tables[name]


def test_accepted_gaps_are_in_the_headline_and_on_the_page(tmp_path: Path) -> None:
    gaps = ["quality.skill_low", "quality.pairwise"]
    following = [
        {"metric": metric, "source": "policy", "dimension": DIMENSIONS[0], "at_least": bound}
        for metric, bound in (("skill_low", 0), ("pairwise", 0.8))
    ]
    gate = {"rules": following, "accept_gaps": gaps}
    config = load_config("gen-shapes", [f"bench.gate={json.dumps(gate)}"])
    page, data, _ = report(tmp_path / "report", config, make(tmp_path, config))
    headline = json.loads(data)["headlines"][0]
    assert "No rule of the gate looks at quality.skill_low, quality.pairwise" in headline["text"]
    assert headline["tone"] == "note" and "What no rule looks at" in page


def test_headlines_claim_no_more_than_the_numbers(config: RunConfig) -> None:
    summaries = {"bench": bench(config), "samples": scores(-0.5, -0.6, -0.4), "policy": rl(stopped=False, kept=0)}
    _, gain, after, stop = headlines(config, summaries)
    assert gain["title"].startswith("RL lowered the auditor's score")
    assert gain["tone"] == "bad"
    assert "no candidate had a higher reward" in stop["text"] and "caught" in stop["title"]
    assert stop["title"].startswith("No over-optimisation was caught")
    assert after["tone"] == "note" and "is no longer trusted: of two images of one prompt" in after["title"]
    assert "61% for instruction following (before RL: 83%)" in after["title"]
    assert "skill for instruction following (0.10), pairwise for instruction following (0.61): another" in after["text"]
    good = scores(after=0.9)
    assert headlines(config, summaries | {"samples": good})[2]["tone"] == "good"
    rows = [
        {**r, "mae": 1.5, "pairwise": 0.4} if r["dimension"] == "quality" else r for r in tables(summaries, "agreement")
    ]
    worse = summaries["bench"].model_copy(update={"tables": {"agreement": rows}})
    trust, *_ = headlines(config, summaries | {"bench": worse})
    assert "1.50 for quality (best constant 1.20)" in trust["title"] and "40% for quality" in trust["text"]
    assert trust["tone"] == "note"
    whole = [r for r in tables(summaries, "agreement") if r["by"] == "all"]
    trust, *_ = headlines(config, summaries | {"bench": worse.model_copy(update={"tables": {"agreement": whole}})})
    assert "on 120 test examples" in trust["text"] and "on test examples its error" in trust["title"]
    summaries |= {"bench": Summary(stage="bench"), "samples": Summary(stage="evaluate")}
    trust, gain, after, _ = headlines(config, summaries)
    assert "is not known" in after["title"]
    assert trust["title"] == "The critic is not trusted."
    assert "not known" in gain["title"]


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


def test_pairs_are_spread_over_all_gains(tmp_path: Path) -> None:
    gains = {i: (3, 1 + i % 5) for i in range(50)} | {50: (None, 5), 51: (5, None)}
    chosen = choose(write_samples(tmp_path, gains), DIMENSIONS[0], 12)
    found = [item["gain"] for item in chosen["items"]]
    assert found == sorted(found, reverse=True)
    assert {found[0], found[-1]} == {2, -2}
    assert set(found) == {-2, -1, 0, 1, 2}
    counts = {key: chosen[key] for key in ("total", "unrated", "better", "equal", "worse")}
    assert counts == {"total": 52, "unrated": 2, "better": 20, "equal": 10, "worse": 20}
    assert chosen["items"][0]["scores"][2] == {"judge": "critic", "dimension": "quality", "base": 4.0, "final": 4.0}


def test_pairs_are_shown_where_no_judgement_is_valid(tmp_path: Path) -> None:
    chosen = choose(write_samples(tmp_path, {i: (None, None) for i in range(3)}), DIMENSIONS[0], 12)
    assert [item["index"] for item in chosen["items"]] == [0, 1, 2]
    assert chosen["unrated"] == 3


def test_large_images_are_shrunk_and_small_ones_stay_sharp(tmp_path: Path) -> None:
    large = pictures(write_samples(tmp_path / "large", {0: (1, 2), 7: (1, 2)}, side=600), [7])
    assert set(large) == {7}
    assert large[7]["base"].uri.startswith("data:image/jpeg;base64,")
    assert not large[7]["base"].pixelated
    small = pictures(write_samples(tmp_path / "small", {0: (1, 2)}), [0])[0]
    assert small["final"].uri.startswith("data:image/png;base64,")
    assert small["final"].pixelated
    assert small["base"] != small["final"]
    encoded = BytesIO(b64decode(large[7]["base"].uri.split(",")[1]))
    assert Image.open(encoded).size == (384, 384)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "not known"), (0.04, "0.0 s"), (59.96, "1 min 0 s"), (419.9, "7 min 0 s"), (3599.9, "1 h 0 min")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert _duration(seconds) == text


def test_the_artifacts_are_those_of_the_pipeline() -> None:
    assert set(ARTIFACTS) == set(INPUTS)


def test_a_further_round_goes_on_from_the_last(tmp_path: Path, config: RunConfig) -> None:
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

    rounds = json.loads(second(hashes["policy"]))["rounds"]
    assert [row["gain"] for row in rounds] == [0.48, 0.9]
    assert rounds[0]["lineage"] == json.loads((first.folder / "data.json").read_text())["lineage"]
    with pytest.raises(UserError, match="policy was made from last_policy 0000.*, but the last_policy given is"):
        second("0" * 64)
