"""The report stage: one page for people and one file of its numbers, from every stage's summary and manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from pydantic import ValidationError

from firm.config import MeasuredRun, RunConfig, SteeredRun
from firm.config.bench import SCORES_OF
from firm.config.loading import of_round
from firm.config.reward import REWARD
from firm.critics.rubrics import load_rubric
from firm.film import FILM, Frame, read_film
from firm.records import Stage, Summary, UserError
from firm.report import figures
from firm.report.headlines import headlines, number, share, signed, trust_rows, words
from firm.report.lineage import trace
from firm.report.pairs import choose, pictures, spread
from firm.report.rounds import DATA, earlier_rounds, this_round
from firm.report.terms import EDITING, GENERATION, SEEN
from firm.storage.artifacts import Output
from firm.storage.files import atomic_write

PAGE = "report.html"
SUMMARY = "summary.json"
ARTIFACTS = ("data", "critic", "bench", "verdict", "policy", "samples")
STAGE = Stage(
    name="report",
    sections=tuple(name for name in RunConfig.model_fields if name != "store"),
    reads={
        **{name: SUMMARY for name in ARTIFACTS if name != "samples"},
        "policy": (SUMMARY, FILM),
        "last_report": DATA,
    },
    compares=True,
)
NUM_PAIRS = 12
NUM_FRAMES = 8
Rows = list[dict[str, Any]]


def run(config: RunConfig, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Write the page of a run, the same in equal runs: how long stages took is in the ``timing.json`` of each.

    Args:
        config: The run.
        inputs: Folders of those artifacts named in `ARTIFACTS` that the run has, and of the last round's
            ``last_report``, if any.
        out: Where ``report.html`` and ``data.json`` go.

    Raises:
        UserError: An artifact is not complete, or was not made from the others.
    """
    summaries = {name: _summary(inputs[name]) for name in ARTIFACTS if name in inputs}
    every = {name: Summary(stage=name) for name in ARTIFACTS} | summaries
    last = inputs.get("last_report")
    lineage = trace({name: inputs[name] for name in summaries}, last)
    samples = inputs["samples"] / "samples" if "samples" in summaries else None
    pairs = choose(samples, config.dimensions[0], NUM_PAIRS) if samples else None
    earlier = earlier_rounds(last)
    number = len(earlier) + 1
    round_config = of_round(config, number)
    edits = pairs["edits"] if pairs else load_rubric(next(iter(config.critic.rubrics.values()))).images > 1
    terms = EDITING if edits else GENERATION
    data = _data(round_config, every, pairs, lineage)
    data["headlines"] = headlines(round_config, summaries, number, terms)
    data["rounds"] = [*earlier, *_round(summaries, round_config, lineage)]
    data["config"] = config.model_dump(mode="json", exclude={"store"}, exclude_none=True)
    with atomic_write(out.folder / DATA) as file:
        file.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    page = (
        _environment()
        .from_string(resources.files("firm.report").joinpath("template.html").read_text())
        .render(
            data=data,
            terms=terms,
            figures=_figures(data),
            film=_film(inputs["policy"] / FILM) if "policy" in summaries else [],
            pictures=pictures(samples, (item["index"] for item in pairs["items"])) if samples and pairs else {},
            config=yaml.safe_dump(data["config"], sort_keys=False, allow_unicode=True),
        )
    )
    with atomic_write(out.folder / PAGE) as file:
        file.write(page.encode())
    return _own_summary(round_config, data, every)


def _summary(folder: Path) -> Summary:
    path = folder / SUMMARY
    try:
        return Summary.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        fix = "delete the artifact and run its stage again"
        raise UserError("the stage left no summary that can be read", str(path), fix) from error


def _film(path: Path) -> list[Frame]:
    """Frames at equal distances, the first and the last among them, with the prompts that all have.

    With another number of processes the first one has had another share of an audit, which may be none.
    """
    frames = [frame for frame in read_film(path) if frame.shots] if path.exists() else []
    common = min((len(frame.shots) for frame in frames), default=0)
    return [frame.model_copy(update={"shots": frame.shots[:common]}) for frame in spread(frames, NUM_FRAMES)]


def _round(summaries: Mapping[str, Summary], config: RunConfig, lineage: Rows) -> Rows:
    """The row of this round, which is about RL."""
    if "policy" not in summaries:
        return []
    return [this_round(summaries, config.having(SteeredRun, "the report"), lineage)]


def _data(
    config: RunConfig, summaries: Mapping[str, Summary], pairs: dict[str, Any] | None, lineage: Rows
) -> dict[str, Any]:
    """All that the page of a round shows but headlines, images and the whole run's configuration and rounds.

    The summary of a stage that the run has not is empty.
    """
    curation, sft, bench, rl, evaluation = (summaries[n] for n in ("data", "critic", "bench", "policy", "samples"))
    measured, auditor, reward = config.bench, config.auditor, config.reward
    teacher = config.curation.evaluator if config.curation else None
    curves = {curve.name: curve.model_dump(mode="json") for curve in sft.curves if curve.x}
    agreement = _ordered(bench, "agreement", config)
    critic = [row for row in agreement if row["judge"] == "critic"]
    return {
        "run": config.name,
        "audited": config.dimensions[0],
        "auditor_stops": bool(auditor and auditor.stops),
        "auditor_is_teacher": bool(auditor and teacher and auditor.judge.who == teacher.who),
        "reward": {**reward.model_dump(mode="json"), "dimensions": list(reward.dimensions)} if reward else None,
        "scores": _ordered(evaluation, "scores", config),
        "pairs": pairs,
        "audits": (audits := rl.tables.get("audits", [])),
        "seen": {name: text for name, text in SEEN.items() if any(name in row for row in audits)},
        "rl": rl.metrics,
        "gate": bench.tables.get("gate", []),
        "accepted_gaps": measured.gate.accept_gaps if measured else [],
        "shows_policy": bool(measured and measured.policy_sources),
        "dimensions": list(dict.fromkeys(str(row["dimension"]) for row in critic)),
        "agreement": critic,
        "auditor_agreement": [row for row in agreement if row["judge"] == "auditor"],
        "overall": bench.tables.get("overall", []),
        "raters": bench.tables.get("raters", []),
        "confusion": [row for row in _ordered(bench, "confusion", config) if row["judge"] == "critic"],
        "curation": curation.metrics,
        "histogram": _ordered(curation, "histogram", config),
        "rewritten": _ordered(curation, "rewritten", config),
        "rewritings": curation.tables.get("rewritings", []),
        "loss": curves.get("loss"),
        "held_out": curves.get("eval/mae"),
        "invalid": _invalid(summaries),
        "notes": {s.stage: s.notes for s in summaries.values() if s.notes},
        "lineage": lineage,
    }


def _ordered(summary: Summary, table: str, config: RunConfig) -> Rows:
    """A table with the auditor's rows first, and of each judge's those of the reward, then of the first dimension."""
    first = (REWARD, config.dimensions[0])
    rows = summary.tables.get(table, [])
    return sorted(rows, key=lambda row: (row.get("judge") == "critic", *(row["dimension"] != d for d in first)))


def _invalid(summaries: Mapping[str, Summary]) -> Rows:
    """Failed judgements by stage; ``of`` is None where the stage does not count all of them."""
    curation, bench, rl, evaluation = (summaries[name] for name in ("data", "bench", "policy", "samples"))
    judged = [r for r in curation.tables.get("histogram", []) if str(r["what"]).startswith("judged: ")]
    rows = [
        _failed("curation", f"teacher, {r['dimension']}, {str(r['what'])[len('judged: ') :]}", r["invalid"], _total(r))
        for r in judged
    ]
    for r in curation.tables.get("failed", []):
        what = f"teacher, {r['material']}: {r['reason']}"
        rows.append(_failed("curation", what, r["count"], curation.metrics["candidates"]))
    failures = bench.tables.get("invalid", [])
    for whole in (r for r in bench.tables.get("agreement", []) if r["by"] == "all"):
        mine = [r for r in failures if (r["judge"], r["dimension"]) == (whole["judge"], whole["dimension"])]
        reasons = "".join(f", {r['reason']}: {r['count']}" for r in mine)
        count = sum(r["count"] for r in mine)
        rows.append(_failed("bench", f"{whole['judge']}, {whole['dimension']}{reasons}", count, whole["n"]))
    for r in (r for r in failures if r["judge"] == "teacher"):
        rows.append(_failed("bench", f"teacher, {r['dimension']}: {r['reason']}", r["count"], None))
    if rl.metrics:
        rows.append(_failed("rl", "critic, rewards", rl.metrics.get("invalid_judgements", 0), None))
        audits = rl.tables.get("audits", [])
        rows.append(_failed("rl", "critic or auditor, audits", sum(r["invalid"] for r in audits), None))
    for r in evaluation.tables.get("invalid", []):
        rows.append(_failed("evaluate", f"{r['judge']}, {r['dimension']}, {r['policy']} policy", r["invalid"], r["of"]))
    return rows


def _failed(stage: str, what: str, count: float, of: float | None) -> dict[str, Any]:
    return {"stage": stage, "what": words(what), "count": int(count), "of": None if of is None else int(of)}


def _total(row: Mapping[str, Any]) -> int:
    return sum(int(row[key]) for key in ("1", "2", "3", "4", "5", "invalid"))


def _figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """SVG by figure; those of a dimension by figure and dimension. A stage without numbers has no figure."""

    def of(table: str, dimension: str, by: Iterable[str] = ()) -> Rows:
        rows = [row for row in data[table] if row["dimension"] == dimension]
        return [row for row in rows if row["by"] in by] if by else rows

    loss, held_out = data["loss"], data["held_out"]
    rl = data["rl"]
    checks = [row for row in data["audits"] if row["sample"] == "check"]
    judged = dict.fromkeys(str(row["dimension"]) for row in data["histogram"])
    return {
        "before_after": figures.before_after(data["scores"]) if data["scores"] else "",
        "audits": figures.audits(checks, rl["kept_epoch"], bool(rl["stopped_by_auditor"])) if checks else "",
        "loss": figures.loss(loss, held_out) if loss else "",
        "histogram": {d: figures.histogram(d, of("histogram", d)) for d in judged},
        "errors": {d: figures.errors(d, of("agreement", d, ("all", "source"))) for d in data["dimensions"]},
        "confusion": {d: figures.confusion(d, of("confusion", d)) for d in data["dimensions"]},
    }


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "num": number,
        "signed": signed,
        "words": words,
        "scores_of": SCORES_OF.__getitem__,
        "bytes": _bytes,
        "share": share,
    }
    return environment


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _own_summary(config: RunConfig, data: Mapping[str, Any], summaries: Mapping[str, Summary]) -> Summary:
    """The headlines and their numbers."""
    bench, rl, evaluation = (summaries[name].metrics for name in ("bench", "policy", "samples"))
    measured = trust_rows(config.having(MeasuredRun, "the report"), summaries["bench"]) if config.bench else {}
    candidates = {
        "trusted": bench.get("trusted"),
        **{f"{d}_{name}": row[name] for d, row in measured.items() for name in ("mae", "constant_mae", "pairwise")},
        **{
            name: evaluation.get(name)
            for measure in (REWARD, *config.dimensions)
            for which in ("base", "final", "gain")
            for name in [f"auditor_{measure}_{which}"]
        },
        "stopped_by_auditor": rl.get("stopped_by_auditor"),
        "kept_epoch": rl.get("kept_epoch"),
        "invalid_judgements": float(sum(row["count"] for row in data["invalid"])),
    }
    return Summary(
        stage="report",
        metrics={name: value for name, value in candidates.items() if value is not None},
        notes=[headline["title"] for headline in data["headlines"]],
    )
