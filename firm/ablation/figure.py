"""The curves of an ablation: every measure over the epochs of RL, a colour for each reward."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from firm.ablation.result import Ablation, Run, mean_curve
from firm.ablation.rewards import BASE_ONLY, COMPARED
from firm.report.figures import SOURCES, draw
from firm.report.terms import SEEN

_MARKERS = "os<>vPX"
"""One more than there are colours for sums, so that looks repeat only after the product of both."""


def looks(rewards: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by reward: alike for a task's own and for the base alone, whatever else is compared."""
    known = {BASE_ONLY: (SOURCES[0], "^"), **dict.fromkeys(COMPARED, (SOURCES[1], "D"))}
    free = zip(cycle(SOURCES[2:]), cycle(_MARKERS), strict=False)
    return {reward: known.get(reward) or next(free) for reward in dict.fromkeys(rewards)}


def curves(ablation: Ablation) -> str:
    """An SVG file: a panel for each measure of the audits; thin lines are seeds, thick ones their means."""
    measures = ablation.measures
    columns = 2 if len(measures) in (2, 4) else 3
    rows = -(-len(measures) // columns)
    look = looks(run.reward for run in ablation.done)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, text) in zip(panels, measures.items(), strict=False):
            for runs in ablation.rewards.values():
                _lines(axes, name, runs, *look[runs[0].reward])
            axes.set_title(f"share of {text} images" if name in SEEN else f"{text}, by the auditor")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
            axes.grid()
            if name in SEEN:
                axes.set_ylim(-0.03, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in list(panels):
            axes.remove()  # of a row that is not full
        figure.supxlabel("epoch of RL (0 is the policy before RL)", fontsize=11)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))

    return _standalone(draw("ablation", (4.2 * columns, 0.9 + 2.9 * rows), paint))


def _lines(axes: Axes, name: str, runs: list[Run], colour: str, marker: str) -> None:
    if len(runs) > 1:
        for run in runs:
            axes.plot(*mean_curve([run], lambda row: row.get(name)), color=colour, alpha=0.35, linewidth=1)
    epochs, means = mean_curve(runs, lambda row: row.get(name))
    axes.plot(epochs, means, color=colour, marker=marker, markersize=4, label=runs[0].label)


def _standalone(svg: str) -> str:
    """A file of its own, on white, of an element that is made for a page."""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, _, rest = svg.replace("<svg ", f"<svg {namespaces} ", 1).partition(">")
    return f'{head}><rect width="100%" height="100%" fill="white"/>{rest}\n'
