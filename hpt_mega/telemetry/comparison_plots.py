"""The figures of a comparison: one panel a model, one line a method, bands over seeds.

Their look is that of plots.py; the page around them is comparison.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hpt_mega.evaluation.statistics import pass_at_k, powers_of_two
from hpt_mega.telemetry.plots import STYLE, WINDOW, Plot, as_svg, running_mean
from hpt_mega.telemetry.runs import Counts, Finished
from hpt_mega.telemetry.summary import ACCURACY

# Okabe and Ito's colours, which colour-blind readers tell apart; the first is for the method of the house.
COLOURS = ("#2f6fde", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#b8a800")
PANEL = (3.1, 2.7)  # inches
FIRST = "hpt"

Curve = dict[float, float]  # of one run


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    unit: str
    caption: str
    curve: Callable[[Finished], Curve]
    is_share: bool = True
    x: str = "step"
    powers: bool = False  # of 2, on the x axis


def draw(runs: Sequence[Finished], folder: Path) -> list[Plot]:
    """Draw what the runs have data for into folder/*.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        return [_draw(one, runs, folder) for one in _FIGURES if any(one.curve(run) for run in runs)]


def methods(runs: Sequence[Finished]) -> list[str]:
    """The methods: first what the others are tested against, by a lab's labels or HPT; the rest by name."""
    labelled = {run.method for run in runs if run.is_reference}
    names = sorted({run.method for run in runs})
    return sorted(names, key=lambda name: (name not in labelled, name != FIRST))


def solved_at(counts: Counts, k: int) -> float:
    """Mean pass@k over the questions."""
    return float(pass_at_k(counts.samples, list(counts.correct.values()), k).mean())


def _course(key: str, window: int = WINDOW) -> Callable[[Finished], Curve]:
    def curve(run: Finished) -> Curve:
        points = [(record["step"], record[key]) for record in run.measured(key)]
        smooth = running_mean([value for _, value in points], window)
        return dict(zip([step for step, _ in points], smooth, strict=True))

    return curve


def _pass_curve(run: Finished) -> Curve:
    counts = run.counts
    return {k: solved_at(counts, k) for k in powers_of_two(counts.samples)} if counts else {}


_FIGURES = (
    _Figure(
        "accuracy",
        "Held-out accuracy",
        "share of samples",
        "Over all held-out questions, while training.",
        _course(ACCURACY, window=1),
    ),
    _Figure(
        "sft_fraction",
        "Questions with a demonstration",
        "share of questions",
        "Whose demonstration is trained on; HPT's should fall as the policy learns to solve them itself.",
        _course("sft_fraction"),
    ),
    _Figure(
        "pass_rate",
        "Pass rate of rollouts",
        "right rollouts",
        "On the training questions of each step.",
        _course("pass_rate"),
    ),
    _Figure(
        "pass_at_k",
        "pass@k after training",
        "questions solved",
        "Where one line crosses below another to the right, exploration was lost.",
        _pass_curve,
        x="k, samples a question",
        powers=True,
    ),
    _Figure(
        "entropy",
        "Entropy",
        "nats per token",
        "Of the tokens trained on; near zero nothing is explored.",
        _course("entropy"),
        is_share=False,
    ),
    _Figure(
        "response_length",
        "Response length",
        "tokens",
        "Of the rollouts.",
        _course("response_length"),
        is_share=False,
    ),
)


def _draw(what: _Figure, runs: Sequence[Finished], folder: Path) -> Plot:
    cells = sorted({run.cell for run in runs})
    figure = Figure(figsize=(PANEL[0] * max(2, len(cells)), PANEL[1] + 0.5))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, cell in zip(panels, cells, strict=True):
        for number, method in enumerate(methods(runs)):
            curves = [what.curve(run) for run in runs if run.cell == cell and run.method == method]
            _line(axes, curves, number, method)
        axes.set_title(cell)
        axes.set_xlabel(what.x)
        _scale(axes, what)
    panels[0].set_ylim(bottom=0)  # the panels share it; once set, it no longer follows what is drawn
    panels[0].set_ylabel(what.unit)
    drawn = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    lines = {label: line for line, label in chain.from_iterable(drawn)}  # a method may be of one model alone
    figure.suptitle(what.title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    handles, labels = list(lines.values()), list(lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), columnspacing=1.4)
    figure.savefig(folder / f"{what.name}.png", dpi=160, facecolor="white")
    return Plot(what.name, what.caption, as_svg(figure, what.title))


def _scale(axes: Axes, what: _Figure) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if what.powers:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    if what.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _line(axes: Axes, curves: Sequence[Curve], number: int, label: str) -> None:
    """The mean of the seeds at each x that all of them have, in a band of one standard error."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not shared:
        return
    values = np.array([[curve[x] for x in shared] for curve in curves])
    centre = values.mean(0)
    colour = COLOURS[number % len(COLOURS)]
    width, order = (1.5, 2) if number else (2.4, 3)
    axes.plot(shared, centre, color=colour, linewidth=width, label=label, zorder=order)
    if len(curves) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(curves))
        axes.fill_between(shared, centre - error, centre + error, color=colour, alpha=0.15, linewidth=0)
