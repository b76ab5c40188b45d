"""What is seen in the runs of an ablation, and the tables of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from firm.ablation.rewards import Planned
from firm.config.reward import REWARD
from firm.records import ArtifactRef, Curve, Record, Summary
from firm.report.headlines import number, signed, words
from firm.report.terms import SEEN

BEFORE, LAST, KEPT = "before RL", "last epoch", "kept policy"
FRESH = "before RL, on fresh prompts"
Row = Mapping[str, Any]


class Run(Record):
    """One run. A run that the gate refused has no numbers.

    Attributes:
        reward, label, seed: What it is.
        refused: The gate's words, if it let no critic pass.
        policy: Artifact of its RL.
        epochs: Epochs of RL.
        kept_epoch: Epoch of the policy that was kept.
        caught: Epoch at which the auditor would have stopped RL.
        audits: Rows of RL's audits.
        curves: RL's numbers by epoch, such as ``copies``.
        alarms: Sentences of RL's monitors.
        held_out: Evaluation's rows of scores: the kept policy on held-out prompts.
    """

    reward: str
    label: str
    seed: int
    refused: str = ""
    policy: ArtifactRef | None = None
    epochs: int = 0
    kept_epoch: int = 0
    caught: int | None = None
    audits: list[dict[str, Any]] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    alarms: list[str] = Field(default_factory=list)
    held_out: list[dict[str, Any]] = Field(default_factory=list)

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The audits over the epochs, all on the same prompts and noise."""
        return [row for row in self.audits if row["sample"] == "check"]

    def at(self, when: str) -> Row:
        """The audit of the base or of the last epoch, or of base or kept policy on fresh prompts and noise."""
        if when in (KEPT, FRESH):
            return [row for row in self.audits if row["sample"] == "report"][0 if when == FRESH else -1]
        return self.checks[0 if when == BEFORE else -1]


class Ablation(Record):
    """The runs so far.

    Attributes:
        name: Of the configuration.
        seeds: Of all runs.
        dimensions: The auditor's, the rewards' base first.
        images: Of an audit.
        runs: Finished ones.
    """

    name: str
    seeds: list[int]
    dimensions: list[str]
    images: int
    runs: list[Run]

    @property
    def done(self) -> list[Run]:
        """The runs that have numbers."""
        return [run for run in self.runs if not run.refused]

    @property
    def rewards(self) -> dict[str, list[Run]]:
        """Label -> its runs."""
        labels = dict.fromkeys(run.label for run in self.done)
        return {label: [run for run in self.done if run.label == label] for label in labels}

    @property
    def measures(self) -> dict[str, str]:
        """Columns of an audit that are compared, in words: scores and what is seen; a formula's reward is its own."""
        seen = {name: text for name, text in SEEN.items() if name in self.done[0].audits[0]}
        return {f"auditor_{dimension}": words(dimension) for dimension in self.dimensions} | seen


def of_run(planned: Planned, rl: Summary, evaluation: Summary, policy: ArtifactRef) -> Run:
    """A finished run from what its stages have to say."""
    caught = [row["until"] for row in rl.tables["stop"]]
    return Run(
        reward=planned.reward,
        label=planned.label,
        seed=planned.config.seed,
        policy=policy,
        epochs=int(rl.metrics["epochs"]),
        kept_epoch=int(rl.metrics["kept_epoch"]),
        caught=caught[0] if caught else None,
        audits=rl.tables["audits"],
        curves=rl.curves,
        alarms=[row["sentence"] for row in rl.tables["alarms"]],
        held_out=evaluation.tables["scores"],
    )


def shown(name: str, value: float | None) -> str:
    """A number of a measure: a share in per cent, a score with two digits."""
    if value is None:
        return number(None)
    return f"{value:.0%}" if name in SEEN else number(value)


def markdown(ablation: Ablation, figure: str) -> str:
    """The page: what was run, the curves in the file ``figure``, a table of all seeds and one of each run."""
    lines = [f"# Rewards compared: {ablation.name}"]
    if ablation.done:
        lines += ["", *_intro(ablation), "", f"![Curves]({figure})", ""]
        lines += [*_means(ablation), "", "## Each run", "", *_each(ablation)]
        lines += ["", "## Held-out prompts", "", *_held_out(ablation)]
    alarms = [f"- {_of(run)}: {text}" for run in ablation.done for text in run.alarms]
    refused = [f"- {_of(run)}: {run.refused}" for run in ablation.runs if run.refused]
    for title, items in (("Alarms", alarms), ("Refused by the gate", refused)):
        lines += ["", f"## {title}", "", *items] if items else []
    return "\n".join(lines) + "\n"


def _of(run: Run) -> str:
    return f"{run.label}, seed {run.seed}"


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _intro(ablation: Ablation) -> Iterator[str]:
    epochs = " or ".join(str(n) for n in sorted({run.epochs for run in ablation.done}))
    yield (
        f"RL with each reward from the same policy, on a seed with the same critic, for {epochs} epochs. By "
        "configuration (`auditor.stops: false`) the auditor did not stop it. Scores are the auditor's, from 1 to 5, "
        f"and shares are of the images: means of the {ablation.images} of an audit. "
        f'The rows "{BEFORE}" and "{LAST}" are on the same prompts and noise; "{KEPT}" is the one that was chosen by '
        f'the auditor\'s scores, on fresh ones: compare it with "{FRESH}".'
    )
    several = f"The mean of {_listed(ablation.seeds)} is given, and in brackets the lowest and the highest."
    yield several if len(ablation.seeds) > 1 else f"There is one seed, {ablation.seeds[0]}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _means(ablation: Ablation) -> Iterator[str]:
    first = list({run.seed: run for run in reversed(ablation.done)}.values())  # before RL all rewards are alike
    rows = [(when, first, when) for when in (BEFORE, FRESH)]
    for label, runs in ablation.rewards.items():
        missing = {run.seed for run in first} - {run.seed for run in runs}
        only = f" ({_listed([run.seed for run in runs])} only)" if missing else ""
        rows += [(f"{label}{only}, {when}", runs, when) for when in (LAST, KEPT)]
    cells = [[what, *(_cell(name, runs, when) for name in ablation.measures)] for what, runs, when in rows]
    return _table(["policy", *ablation.measures.values()], cells)


def _cell(name: str, runs: Sequence[Run], when: str) -> str:
    values = [value for run in runs if (value := run.at(when).get(name)) is not None]
    if not values:
        return shown(name, None)
    mean = shown(name, sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({shown(name, min(values))} to {shown(name, max(values))})"


def _each(ablation: Ablation) -> Iterator[str]:
    measures = ablation.measures
    head = ["reward", "seed", *(f"{text}, {BEFORE} → {LAST}" for text in measures.values())]
    rows = [
        [
            run.label,
            str(run.seed),
            *(" → ".join(shown(name, run.at(when).get(name)) for when in (BEFORE, LAST)) for name in measures),
            str(run.kept_epoch),
            "no" if run.caught is None else f"at epoch {run.caught}",
        ]
        for run in ablation.done
    ]
    return _table([*head, "kept epoch", "the auditor would have stopped it"], rows)


def _held_out(ablation: Ablation) -> Iterator[str]:
    """The kept policy of each run against the policy before RL, as its evaluation has it."""
    yield (
        "The policy before RL → the kept one, by the auditor, on prompts that RL never saw, with the same noise; in "
        "brackets the mean of the paired differences with its 95% interval. The reward, from 0 to 1, is each run's own."
    )
    yield ""
    measures = (REWARD, *ablation.dimensions)
    rows = [
        [run.label, str(run.seed), *(_change(run.held_out, measure) for measure in measures)] for run in ablation.done
    ]
    yield from _table(["reward", "seed", *map(words, measures)], rows)


def _change(rows: Sequence[Row], measure: str) -> str:
    mine = {row["policy"]: row for row in rows if (row["judge"], row["dimension"]) == ("auditor", measure)}
    if not mine:
        return number(None)
    digits = 3 if measure == REWARD else 2
    before, after = (number(mine[policy]["mean"], digits) for policy in ("base", "final"))
    gain, low, high = (signed(mine["gain"][key], digits) for key in ("mean", "low", "high"))
    return f"{before} → {after} ({gain}, {low} to {high})"


def mean_curve(runs: Sequence[Run], value: Callable[[Row], float | None]) -> tuple[list[int], list[float]]:
    """Epochs and the mean over runs of what the audits show, where any of them knows it."""
    by_epoch: dict[int, list[float]] = {}
    for run in runs:
        for row in run.checks:
            if (known := value(row)) is not None:
                by_epoch.setdefault(row["epoch"], []).append(known)
    return list(by_epoch), [sum(values) / len(values) for values in by_epoch.values()]
