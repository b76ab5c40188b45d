"""Headlines: a run's numbers in sentences that claim no more than the numbers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firm.config import MeasuredRun, RunConfig, SteeredRun
from firm.config.bench import SCORES_OF
from firm.config.reward import NAMED, REWARD
from firm.records import Summary
from firm.report.terms import GENERATION, Terms

Headline = dict[str, str]
"""``tone`` (good, note or bad), ``title`` (one sentence) and ``text`` (what it means)."""
UNMEASURED = {
    "tone": "note",
    "title": "Whether the critic can be trusted is not known.",
    "text": "It was not measured: the configuration has no bench.",
}


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number for readers: a typographic minus, but not on a rounded zero, and a dash for None."""
    if value is None:
        return "–"
    text = f"{value:{sign},.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def signed(value: float, digits: int = 2) -> str:
    """A number that always has its sign, but for zero."""
    return number(value, digits, "+")


def share(value: float | None) -> str:
    """A share in per cent; a dash where no pair shows it."""
    return "–" if value is None else f"{value:.0%}"


def words(name: str) -> str:
    """``instruction_following`` as words."""
    return name.replace("_", " ")


def headlines(
    config: RunConfig, summaries: Mapping[str, Summary], number: int = 1, terms: Terms = GENERATION
) -> list[Headline]:
    """Whether the critic is trusted, what RL gained, what is left of the trust, whether RL went too far or had alarms.

    Args:
        config: Of the round.
        summaries: Of those of its stages that ran.
        number: The round: what evaluation compares with is the policy before the first.
        terms: What things are called.
    """
    before = "before RL" if number == 1 else "before the first round"
    said = [UNMEASURED]
    if "bench" in summaries:
        said = [_trust(config.having(MeasuredRun, "the report"), summaries["bench"], terms)]
    if "samples" in summaries:
        steered = config.having(SteeredRun, "the report")
        said += [
            _gain(steered, summaries["samples"], before, terms),
            _trust_after(steered, summaries["samples"], before, terms),
            _stop(summaries["policy"], steered.auditor.stops, terms),
        ]
    return said


def trust_rows(config: MeasuredRun, bench: Summary) -> dict[str, dict[str, Any]]:
    """The critic's agreement by dimension that it is for: on the policy's own images where the bench has them."""
    rows = [row for row in bench.tables.get("agreement", []) if row["judge"] == "critic"]
    whole = {row["dimension"]: row for row in rows if row["by"] == "all"}
    sources = config.bench.policy_sources
    own = {row["dimension"]: row for row in rows if row["by"] == "source" and row["value"] in sources}
    return {d: row for d in config.dimensions if (row := own.get(d, whole.get(d)))}


def _trust(config: MeasuredRun, bench: Summary, terms: Terms) -> Headline:
    trusted = bool(bench.metrics.get("trusted"))
    head = "The critic is trusted" if trusted else "The critic is not trusted"
    rows = {d: row for d, row in trust_rows(config, bench).items() if row["mae"] is not None}
    gaps = config.bench.gate.accept_gaps
    accepted = f" No rule of the gate looks at {', '.join(gaps)}: the configuration accepts that." if gaps else ""
    missing = config.bench.open_gaps(config.dimensions)  # only of a run without RL
    if missing:
        accepted += f" No rule looks at {', '.join(missing)} on images of a policy, so rl refuses this critic."
    if not rows:
        text = f"Its error on {words(config.dimensions[0])} is not known: there are no such judgements.{accepted}"
        return {"tone": "note", "title": f"{head}.", "text": text}
    own = all(row["by"] == "source" for row in rows.values())
    whose = " and ".join(dict.fromkeys(SCORES_OF[row["whose"]] for row in rows.values()))
    errors = [f"{row['mae']:.2f} for {words(d)} (best constant {row['constant_mae']:.2f})" for d, row in rows.items()]
    where = f"the policy's own {terms.image}s" if own else "test examples"
    title = f"{head}: on {where} its error against {whose} is {' and '.join(errors)}."
    started = f"{terms.image}s of the policy that RL started from, of held-out {terms.prompt}s"
    images = started if own else "test examples"
    number_of = max(row["n"] for row in rows.values())
    text = f"Measured on {number_of:,.0f} {images}, in points on a scale from 1 to 5."
    if pairs := [f"{row['pairwise']:.0%} for {words(d)}" for d, row in rows.items() if row["pairwise"] is not None]:
        text += f" Of two {terms.image}s of one {terms.group} it ranks rightly: {', '.join(pairs)} (chance: 50%)."
    better = all(row["mae"] < row["constant_mae"] for row in rows.values())
    tone = ("good" if better and not gaps and not missing else "note") if trusted else "bad"
    return {"tone": tone, "title": title, "text": text + accepted}


def gains(config: SteeredRun, evaluation: Summary) -> dict[str, dict[str, dict[str, Any]]]:
    """The auditor's rows of the held-out images by policy: of the reward, then of each of its dimensions."""
    found: dict[str, dict[str, dict[str, Any]]] = {measure: {} for measure in (REWARD, *config.reward.dimensions)}
    for row in evaluation.tables.get("scores", []):
        if row["judge"] == "auditor" and row["dimension"] in found:
            found[row["dimension"]][row["policy"]] = row
    return {measure: rows for measure, rows in found.items() if rows}


def _gain(config: SteeredRun, evaluation: Summary, before: str, terms: Terms) -> Headline:
    """What became of the reward; a dimension that fell is named, and the gain is then no plain one."""
    measured = gains(config, evaluation)
    rows = measured.pop(REWARD, {})
    if not rows:
        title = "RL's effect is not known: the auditor gave no valid judgement."
        return {"tone": "bad", "title": title, "text": "See the failed judgements below."}
    gain = rows["gain"]
    formula = f" ({config.reward.formula.upper()})" if config.reward.formula in NAMED else ""
    where = f"the reward{formula} by the auditor's scores on held-out {terms.prompt}s"
    of_each = " and ".join(f"{signed(each['gain']['mean'])} for {words(d)}" for d, each in measured.items())
    fallen = [words(d) for d, each in measured.items() if each["gain"]["high"] < 0]
    if gain["low"] > 0:
        tone = "note" if fallen else "good"
        title = f"RL raised {where} {_from_to(rows, 3)}"
    elif gain["high"] < 0:
        tone = "bad"
        title = f"RL lowered {where} {_from_to(rows, 3)}"
    else:
        tone = "note"
        title = f"RL did not measurably change {where}: {_from_to(rows, 3)}"
    text = (
        f"The auditor is a judge that RL does not optimise. It compared {gain['n']:,} pairs of {terms.image}s of "
        f"{terms.prompt}s that RL never saw, each pair from the same noise. The reward, from 0 to 1, is what the "
        "formula makes of its scores, from 1 to 5: "
    )
    text += "; ".join(f"{words(d)} went {_from_to(each, 2)}" for d, each in measured.items()) + "."
    if fallen and gain["low"] > 0:
        text += f" The gain was paid for with {' and '.join(fallen)}."
    for d in measured:
        full = {w: evaluation.metrics.get(f"auditor_{d}_full_marks_{w}") for w in ("base", "final")}
        if full["base"] is not None and full["final"] is not None:
            text += f" Full marks for {words(d)}: {full['base']:.0%} before, {full['final']:.0%} after."
    if guided := rows.get("guided"):
        text += f" The policy {before}, but sampled with guidance as users do, has a reward of {guided['mean']:.3f}."
    return {"tone": tone, "title": f"{title}; in points {of_each}.", "text": text}


def _from_to(rows: Mapping[str, Mapping[str, Any]], digits: int) -> str:
    """Means before and after with the gain and its interval."""
    gain = rows["gain"]
    low, high = (signed(gain[end], digits) for end in ("low", "high"))
    means = " to ".join(number(rows[policy]["mean"], digits) for policy in ("base", "final"))
    return f"from {means} (gain {signed(gain['mean'], digits)}, 95% CI {low} to {high})"


def _trust_after(config: SteeredRun, evaluation: Summary, before: str, terms: Terms) -> Headline:
    """Whether the critic would still keep the gate's rules for the policy's own images on those of the final policy."""
    rows = {(row["policy"], row["dimension"]): row for row in evaluation.tables.get("agreement", [])}
    base, final = (
        {d: row for d in config.reward.dimensions if (row := rows.get((which, d)))} for which in ("base", "final")
    )
    unknown = "What RL has left of the critic's accuracy is not known."
    if not len(base) == len(final) == len(config.reward.dimensions):
        return {"tone": "note", "title": unknown, "text": "Critic and auditor have too few valid judgements in common."}
    if all(row["pairwise"] is None for row in (*base.values(), *final.values())):
        text = f"No two {terms.image}s of one {terms.group} were scored differently: raise evaluate.num_images."
        return {"tone": "note", "title": unknown, "text": text}
    rules = [rule for rule in config.bench.gate.rules if rule.source in config.bench.policy_sources]
    broken = [
        f"{rule.metric} for {words(d)} ({number(row[rule.metric])})"
        for rule in rules
        for d, row in final.items()
        if rule.dimension in (None, d) and not rule.holds(row[rule.metric])
    ]
    pairs = [
        f"{share(row['pairwise'])} for {words(d)} ({before}: {share(base[d]['pairwise'])})" for d, row in final.items()
    ]
    ranks = f"of two {terms.image}s of one {terms.group} it ranks like the auditor {' and '.join(pairs)}"
    text = (
        "RL uses up what the critic cannot see. This measures it again, against the auditor's scores, on "
        f"{terms.image}s of held-out {terms.prompt}s from {before} and after RL."
    )
    if not broken:
        covered = not config.bench.gaps(config.reward.dimensions)
        what = "the critic keeps the gate's rules" if covered else "no rule of the gate judges all of the critic"
        return {
            "tone": "good" if covered else "note",
            "title": f"On the final policy's {terms.image}s {what}: {ranks}.",
            "text": text,
        }
    title = f"On the final policy's {terms.image}s the critic is not trusted: {ranks}."
    what = ", ".join(broken)
    text += f" There it would break the gate's rules on {what}: another round trains it on such {terms.image}s."
    return {"tone": "note", "title": title, "text": text}


def _stop(rl: Summary, stops: bool, terms: Terms) -> Headline:
    m = rl.metrics
    kept = f"{m['kept_epoch']:.0f}"
    interval = f", 95% CI {signed(m['gain_low'], 3)} to {signed(m['gain_high'], 3)}" if "gain_low" in m else ""
    text = (
        f"On freshly drawn {terms.prompt}s and noise, which had no part in the choice, the reward by the auditor's own "
        f"scores went from {m['auditor_reward_base']:.3f} before RL to {m['auditor_reward_kept']:.3f} at epoch {kept}"
        f"{interval}."
    )
    if m["kept_epoch"] == 0:
        text = (
            f"On freshly drawn {terms.prompt}s and noise no candidate had a higher reward by the auditor's scores than "
            "the base."
        )
    alarms = [row["sentence"] for row in rl.tables.get("alarms", [])]
    went_on = [] if stops else ["The auditor did not stop RL, by configuration (auditor.stops)."]
    text = " ".join([text, *went_on, *alarms])
    for fall in rl.tables.get("stop", []):
        what = words(fall["measure"])
        title = (
            f"Over-optimisation was caught at epoch {fall['until']}: {what} fell for the auditor, not for the critic."
        )
        digits = 3 if what == "reward" else 2
        by_judge = {
            who: f"{fall[f'{who}_before']:.{digits}f} to {fall[f'{who}_after']:.{digits}f}"
            for who in ("auditor", "critic")
        }
        text = (
            f"From the checks up to epoch {fall['since']} to the last ones the auditor's mean went from "
            f"{by_judge['auditor']}; the interval that holds at every check excludes no fall. The critic's went from "
            f"{by_judge['critic']}. Epoch {kept} was kept. {text}"
        )
        return {"tone": "note", "title": title, "text": text}
    title = f"No over-optimisation was caught in {m['epochs']:.0f} epochs of RL; kept epoch {kept}."
    good = m.get("gain_low", 0) > 0 and stops and not alarms
    return {"tone": "good" if good else "note", "title": title, "text": text}
