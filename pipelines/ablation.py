"""Runs the runs of an ablation on this machine, one after the other, each with the code of `firm run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from firm.ablation.figure import curves
from firm.ablation.result import Ablation, Run, markdown, of_run
from firm.ablation.rewards import Planned
from firm.records import Summary, UserError
from firm.stage import SUMMARY, read_summary
from firm.storage.files import atomic_write
from firm.storage.inputs import open_input, read_ref
from pipelines.local import StageFailed, newest, run_locally

FIGURE = "ablation.svg"
PAGE = "ablation.md"
NUMBERS = "ablation.json"


def compare(planned: Sequence[Planned], folder: Path, say: Callable[[str], None]) -> Path:
    """Run all of them; what is finished after each run is written at once. Returns the page.

    All runs have one name and store, so what they have in common is found by its key and made once. A run that the gate
    refuses is listed with the gate's words, and the others go on.

    Args:
        planned: The runs.
        folder: Local folder for numbers, page and curves, and for each run's log and report.
        say: Gets a line for each run.

    Raises:
        UserError: A stage failed, or the gate refused every run.
    """
    runs: list[Run] = []
    for i, one in enumerate(planned, 1):
        say(f"run {i} of {len(planned)}: {one.label}, seed {one.config.seed}")
        runs.append(_finished(one, folder / one.folder))
        if runs[-1].refused:
            say(f"the gate refused it: {runs[-1].refused}")
        _write(planned, runs, folder)
    if all(run.refused for run in runs):
        fix = "curate more data or train longer, then run the same command again"
        raise UserError("the gate refused every run, so there is nothing to compare", str(folder / PAGE), fix)
    return folder / PAGE


def _finished(planned: Planned, folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_locally(planned.config, folder)
    except StageFailed as error:
        if error.stage != "gate":
            raise
        return Run(reward=planned.reward, label=planned.label, seed=planned.config.seed, refused=error.message)
    policy = newest(folder, "rl/policy")
    return of_run(planned, _summary(policy), _summary(newest(folder, "evaluate/samples")), read_ref(policy))


def _summary(pointer: Path) -> Summary:
    return read_summary(open_input(read_ref(pointer), only=SUMMARY))


def _write(planned: Sequence[Planned], runs: list[Run], folder: Path) -> None:
    config = planned[0].config
    seeds = list(dict.fromkeys(one.config.seed for one in planned))
    ablation = Ablation(
        name=config.name,
        seeds=seeds,
        dimensions=sorted(config.auditor.rubrics, key=lambda dimension: dimension != config.reward.base),
        images=config.auditor.num_images,
        runs=runs,
    )
    texts = {NUMBERS: ablation.model_dump_json(indent=1) + "\n", PAGE: markdown(ablation, FIGURE)}
    if ablation.done:
        texts[FIGURE] = curves(ablation)
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode())
