"""Figures of the report as SVG text: equal numbers give equal bytes, and a colour always means the same thing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from firm.config.reward import REWARD
from firm.records import SCORES
from firm.report.headlines import signed, words

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette and Tol's muted one: distinguishable for colour-blind readers.
CRITIC = "#0072B2"
AUDITOR = "#D55E00"
BASE = "#8A9099"
KEPT = "#00795A"
WARNING = "#E69F00"
SOURCES = ("#44AA99", "#332288", "#DDCC77", "#CC6677", "#88CCEE", "#AA4499", "#117733", "#999933")
TEXT = "#1F2933"
FAINT = "#E4E7EB"
JUDGES = {"critic": CRITIC, "auditor": AUDITOR}
STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, small, in the reader's own font
    "text.parse_math": False,  # a source may be called "a$b"
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA5B1",
    "axes.labelcolor": TEXT,
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "lines.linewidth": 2.2,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def draw(name: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """Paint a figure of a size in inches and return it as an SVG element to be put into a page.

    Args:
        name: Unique in the page: ids inside the element begin with it.
        size: Width and height, which set the aspect ratio and how large text is; the page scales the whole.
        paint: Fills the figure.
    """
    # After a reset, so that a matplotlibrc of this machine changes nothing.
    with matplotlib.style.context({**STYLE, "svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("'DejaVu Sans', sans-serif", _FONTS).replace("'DejaVu Sans'", _FONTS)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head = f'<svg viewBox="0 0 {size[0] * 72:g} {size[1] * 72:g}" style="max-width: {size[0] * 112:g}px" '
    return re.sub(r"<svg [^>]*>", f'{head}aria-hidden="true">', text, count=1).strip()


def audits(rows: Rows, kept: float, stopped: bool) -> str:
    """The reward by the critic and by the auditor over the epochs of RL, with the auditor's band and the kept epoch.

    Args:
        rows: Audits with ``epoch``, ``critic_reward``, ``auditor_reward``, and ``gain_low`` and ``gain_high`` over the
            first one, where they are known.
        kept: The kept epoch.
        stopped: Whether the auditor stopped RL: shades what came after the kept epoch.
    """
    epochs = [row["epoch"] for row in rows]
    first = min(epochs)
    last = max(epochs)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for key, colour, marker, label in (
            ("critic_reward", CRITIC, "o", "by the critic (optimised)"),
            ("auditor_reward", AUDITOR, "s", "by the auditor (not optimised)"),
        ):
            axes.plot(epochs, [row[key] for row in rows], color=colour, marker=marker, label=label)
        axes.set_ylabel("reward")
        axes.margins(y=0.12)
        known = [row for row in rows if row["gain_low"] is not None]
        low, high = ([rows[0]["auditor_reward"] + row[f"gain_{end}"] for row in known] for end in ("low", "high"))
        axes.fill_between([row["epoch"] for row in known], low, high, color=AUDITOR, alpha=0.14, linewidth=0)
        if stopped:
            axes.axvspan(kept, last, color=WARNING, alpha=0.16, linewidth=0)
            _above(axes, last, "over-optimisation", "right", "#8A5A00")
        axes.axvline(kept, color=KEPT, linestyle=(0, (4, 3)), linewidth=1.6)
        early = kept - first < 0.3 * (last - first)
        _above(axes, kept, f"kept: epoch {kept:g}", "left" if early else "right", KEPT)
        axes.set_xlabel("epoch of RL (0 is the policy before RL)")
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axes.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=2)

    return draw("audits", (6.3, 3.7), paint)


def _above(axes: Axes, x: float, text: str, align: str, colour: str) -> None:
    axes.annotate(
        text, (x, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha=align, color=colour
    )


def histogram(dimension: str, rows: Rows) -> str:
    """How often each score was given on one dimension: judged by source, then the train and test examples.

    Args:
        dimension: The dimension, for the name of the figure.
        rows: Rows with ``what`` and a count for each of the scores "1".."5".
    """
    judged = [row for row in rows if str(row["what"]).startswith("judged: ")]
    examples = [row for row in rows if row not in judged]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + len(examples), squeeze=False)[0]
        bottom = [0.0] * len(SCORES)
        for i, row in enumerate(judged):
            counts = [float(row[str(s)]) for s in SCORES]
            name = str(row["what"]).removeprefix("judged: ")
            panels[0].bar(SCORES, counts, bottom=bottom, color=SOURCES[i % len(SOURCES)], label=_plain(name))
            bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
        panels[0].set_title("judged, by source")
        for panel, row in zip(panels[1:], examples, strict=True):
            panel.bar(SCORES, [row[str(s)] for s in SCORES], color=BASE)
            panel.set_title(str(row["what"]))
        for panel in panels:
            panel.set_xticks(SCORES)
            panel.set_xlabel("score")
            panel.grid(axis="y")
            panel.spines["left"].set_visible(False)
            panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
        if judged:
            figure.legend(loc="outside upper center", ncols=4)

    return draw(f"histogram-{dimension}", (6.3, 2.8), paint)


def _plain(label: str) -> str:
    """A label that matplotlib shows: it hides those that begin with an underscore."""
    return label if not label.startswith("_") else f" {label}"


def confusion(dimension: str, rows: Rows) -> str:
    """The reference scores against the critic's on one dimension; shades are shares of a row.

    Args:
        dimension: The dimension, for the name of the figure.
        rows: One row for each (rounded) ``reference`` score with counts ``predicted_1``..``predicted_5``.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        counts = [[int(row[f"predicted_{s}"]) for s in SCORES] for row in rows]
        shares = [[count / max(sum(line), 1) for count in line] for line in counts]
        reference = [row["reference"] for row in rows]
        colours = matplotlib.colormaps["Blues"]
        # Vectors instead of imshow: an image inside an SVG would carry its own metadata.
        axes.pcolormesh(SCORES, reference, shares, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=2)
        for y, line, row_shares in zip(reference, counts, shares, strict=True):
            for x, count, share in zip(SCORES, line, row_shares, strict=True):
                colour = "white" if share > 0.5 else TEXT
                axes.text(x, y, f"{count:,}", ha="center", va="center", color=colour, fontsize=10)
        axes.set(xticks=SCORES, yticks=reference, xlabel="critic's score", ylabel="reference score", aspect="equal")
        axes.spines[:].set_visible(False)

    return draw(f"confusion-{dimension}", (4.2, 3.9), paint)


def errors(dimension: str, rows: Rows) -> str:
    """The critic's mean absolute error with its interval, and what constant answers reach, in all and by source.

    Args:
        dimension: The dimension, for the name of the figure.
        rows: Rows of the agreement table, ``by`` being ``all`` or ``source``.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names = ["all examples" if row["by"] == "all" else str(row["value"]) for row in rows]
        for y, row in enumerate(rows):
            if row["mae"] is None:
                axes.text(0.02, y - 0.16, "no valid judgement", va="center", color=BASE)
            else:
                axes.barh(y - 0.16, row["mae"], height=0.32, color=CRITIC, alpha=0.85)
                _whisker(axes, row["mae_low"], row["mae_high"], y - 0.16, TEXT)
            constants = {score: row[f"constant_{score}_mae"] for score in SCORES}
            for score, error in {**constants, row["constant_score"]: row["constant_mae"]}.items():
                best = score == row["constant_score"]
                look = {"boxstyle": "circle,pad=0.18", "fc": "#3E4C59" if best else "white", "ec": BASE, "lw": 0.8}
                axes.text(
                    error, y + 0.2, f"{score:.3g}", ha="center", va="center", fontsize=9,
                    color="white" if best else "#52606D", bbox=look, zorder=4 if best else 3,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), names)
        widest = max(row[f"constant_{s}_mae"] for row in rows for s in SCORES)
        axes.set(xlim=(0, max(widest, *(row["mae"] or 0 for row in rows)) * 1.06), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xlabel("mean absolute error (0 is perfect)")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    return draw(f"errors-{dimension}", (5.0, 1.2 + 0.68 * len(rows)), paint)


def _whisker(axes: Axes, low: float, high: float, y: float, colour: str) -> None:
    """An interval. Unlike matplotlib's error bars it need not contain the mean, which rounding may put outside."""
    axes.plot([low, high], [y, y], color=colour, marker="|", markersize=8, markeredgewidth=1.6, linewidth=1.6)


def loss(losses: Mapping[str, Any], errors: Mapping[str, Any] | None) -> str:
    """The critic's training loss over its steps.

    Args:
        losses: A curve.
        errors: A curve of the mean absolute error on held-out examples, if it was measured.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _from_zero(axes, losses, "loss", CRITIC)
        axes.set_xlabel("training step")
        axes.grid(axis="y")
        if errors:
            right = axes.twinx()
            _from_zero(right, errors, "error on held-out examples", KEPT)
            right.spines["right"].set_visible(True)
            axes.yaxis.label.set_color(CRITIC)
            right.yaxis.label.set_color(KEPT)

    return draw("loss", (5.0, 2.9), paint)


def _from_zero(axes: Axes, curve: Mapping[str, Any], label: str, colour: str) -> None:
    axes.plot(curve["x"], curve["y"], color=colour, marker="o" if len(curve["x"]) < 3 else "")
    axes.set_ylim(0, max(curve["y"]) * 1.05 or 1)
    axes.set_ylabel(label)


def before_after(rows: Rows) -> str:
    """Means with intervals before and after RL, a line for each judge and measure, with the paired gain.

    Args:
        rows: Rows of the evaluate stage's ``scores``: ``judge``, ``dimension``, ``policy`` (base, final, gain; guided
            if the base was also sampled with guidance), ``mean``, ``low`` and ``high``.
    """
    by = {(str(row["judge"]), str(row["dimension"]), str(row["policy"])): row for row in rows}
    keys = list(dict.fromkeys(key[:2] for key in by))
    panels = [[key for key in keys if (key[1] == REWARD) == of_reward] for of_reward in (True, False)]
    panels = [lines for lines in panels if lines]
    diamond = ", diamond: before RL with guidance" if any(key[2] == "guided" for key in by) else ""

    def paint(figure: Figure) -> None:
        heights = [len(lines) + 0.6 for lines in panels]
        for axes, lines in zip(
            figure.subplots(len(panels), squeeze=False, height_ratios=heights).flat, panels, strict=True
        ):
            what = "mean reward, 0 to 1" if lines[0][1] == REWARD else "mean score, 1 to 5"
            _changes(axes, [{key[2]: row for key, row in by.items() if key[:2] == line} for line in lines])
            axes.set_xlabel(f"{what} (grey: before RL, coloured: after{diamond})")

    return draw("before-after", (6.3, 0.5 + 0.6 * len(panels) + 0.68 * len(keys)), paint)


def _changes(axes: Axes, lines: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """A line for each judge and measure: its rows by policy."""
    for y, line in enumerate(lines):
        base, final, gain = (line[which] for which in ("base", "final", "gain"))
        judge = JUDGES[base["judge"]]
        axes.plot([base["mean"], final["mean"]], [y, y], color=judge, alpha=0.3, linewidth=4)
        for row, colour, shift in ((base, BASE, 0.09), (final, judge, -0.09)):
            axes.plot(row["mean"], y + shift, color=colour, marker="o", markersize=8)
            _whisker(axes, row["low"], row["high"], y + shift, colour)
        if guided := line.get("guided"):
            axes.plot(guided["mean"], y, color=BASE, marker="D", markersize=7, fillstyle="none")
        text = signed(gain["mean"], 3 if base["dimension"] == REWARD else 2)
        axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", color=judge, weight="bold")
    axes.annotate("gain", (1.02, -0.5), xycoords=("axes fraction", "data"), va="bottom", color=TEXT)
    axes.set_yticks(
        range(len(lines)), [f"{ends['base']['judge']}:\n{words(ends['base']['dimension'])}" for ends in lines]
    )
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
