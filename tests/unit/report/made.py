"""Artifacts of a run as the stages leave them, for the tests of its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from firm.bench.gate import judge_gate
from firm.config import RunConfig
from firm.critics.agreement import Expected, Prediction, agreement
from firm.film import FILM, Film
from firm.images import encode_image
from firm.records import Assessment, Curve, Invalid, Judgement, Prompt, Sample, Summary
from firm.report.run import run
from firm.storage.artifacts import Output
from firm.storage.shards import ShardWriter

DIMENSIONS = ("instruction_following", "quality")
GAPS = [f"{d}.{what}" for d in DIMENSIONS for what in ("skill_low", "pairwise")]
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
    metrics["rewritten"] = 40.0
    rewritten = [
        {"source": "<b>$x$", "dimension": "quality", "when": when, **dict.fromkeys("12345", 8), "invalid": 2}
        for when in ("before", "after")
    ]
    shown = {
        "before": "a red square",
        "after": EVIL,
        "reason": "<i>no circle",
        "quality_before": 5,
        "quality_after": None,
    }
    scores = {f"{DIMENSIONS[0]}_{when}": 3 for when in ("before", "after")}
    tables = {"histogram": rows, "rewritten": rewritten, "rewritings": [{**shown, **scores}]}
    return Summary(stage="curation", metrics=metrics, tables=tables)


def sft(trained: bool = True) -> Summary:
    if not trained:
        return Summary(stage="sft", notes=["The critic is served at an endpoint: nothing was trained."])
    curves = [Curve(name="loss", x=[10, 20, 30], y=[3.0, 1.0, 0.5]), Curve(name="eval/mae", x=[10, 30], y=[1.2, 0.7])]
    return Summary(stage="sft", metrics={"loss": 0.5}, curves=curves)


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
            "copies": e / 100, "blanks": 0.0, "agreement": None, "pairwise": 0.7, "invalid": e == 30,
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
    """Evaluation in which the auditor's and the critic's scores gained so much, and the reward a sixth of it."""
    rows = []
    for judge, d in (
        ("critic", "quality"), ("critic", DIMENSIONS[0]), ("auditor", DIMENSIONS[0]), ("auditor", "reward"),
    ):  # fmt: skip
        unit, base = (1 / 6, 0.4) if d == "reward" else (1.0, 2.97)
        for policy, mean, a, b in (
            ("base", base, base - 0.2 * unit, base + 0.1 * unit),
            ("final", base + gain * unit, base + 0.3 * unit, base + 0.6 * unit),
            ("gain", gain * unit, low * unit, high * unit),
        ):
            row = {"judge": judge, "dimension": d, "policy": policy, "mean": mean, "low": a, "high": b}
            rows.append({**row, "n": 29, "invalid": 1})
    metrics = {f"auditor_{row['dimension']}_{row['policy']}": row["mean"] for row in rows[-6:]}
    failed = [{k: r[k] for k in ("judge", "dimension", "policy")} | {"invalid": 1, "of": 30} for r in rows[:-3]]
    agreed = [
        {"dimension": d, "policy": policy, "pairwise": pairs, "skill": 0.1 if pairs == 0.61 else 0.4, "skill_low": 0.05}
        for d, before, end in ((DIMENSIONS[0], 0.83, after), ("quality", 0.78, 0.76))
        for policy, pairs in (("base", before), ("final", end))
    ]
    tables = {"scores": rows, "invalid": [r for r in failed if r["policy"] != "gain"], "agreement": agreed}
    return Summary(stage="evaluate", metrics=metrics, tables=tables)


def judged(value: int | None) -> Assessment:
    return {DIMENSIONS[0]: Invalid(reason="empty") if value is None else Judgement(score=value)}


def write_samples(
    folder: Path, auditor: Mapping[int, tuple[int | None, int | None]], side: int = 8, edits: bool = False
) -> Path:
    """Pairs of images, for edits behind a source of their own each."""
    writer = ShardWriter(folder / "samples", Sample, 16)
    for which, policy in enumerate(("base", "final")):
        for index, values in auditor.items():
            text = EVIL if index == 0 else f"picture {index}"
            colours = [(9, 9, index % 256)] * edits + [(index % 256, 200 * which, 90)]
            sample = Sample(
                index=index,
                prompt=Prompt(text=text, image=f"{index}.png" if edits else None),
                seed=index,
                policy=policy,  # type: ignore[arg-type]
                images=[encode_image(Image.new("RGB", (side, side), colour)) for colour in colours],
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
    edits: bool = False,
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
        if name == "policy":
            source = [encode_image(Image.new("RGB", (4, 4), "green"))] if edits else []
            film = Film(out.folder / FILM, 0)
            for epoch in range(0, 55, 5):
                film.add(epoch, [(Prompt(text=EVIL), [*source, encode_image(Image.new("RGB", (4, 4), (epoch, 0, 0)))])])
            files.append(FILM)
        if name == "samples":
            write_samples(out.folder, GAINS, edits=edits)
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
