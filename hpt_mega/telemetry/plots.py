"""The figures of a report, from the records of metrics.jsonl.

The page around them is made in report.py; those of many runs are in comparison_plots.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hpt_mega.telemetry.records import Record
from hpt_mega.telemetry.summary import ACCURACY, PHASES, STANDARD_ERROR

WINDOW = 5  # steps in a running mean

INK, MUTED, GRID, LINE = "#1f2933", "#616e7c", "#e4e7eb", "#2f6fde"
PHASE_COLOURS = {
    "rollout": "#2f6fde",
    "reward": "#8a63d2",
    "train": "#e07a3f",
    "sync": "#d64f7f",
    "eval": "#2a9d8f",
    "checkpoint": "#d9a520",
    "other": "#a3adb8",
}
# The page redefines these in dark mode; the PNG files keep the colours above.
CSS_NAMES = {INK: "--ink", MUTED: "--muted", GRID: "--line", LINE: "--accent"}

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text in the reader's font
}


@dataclass(frozen=True)
class Plot:
    """A figure in RUN_DIR/plots/{name}.png and, to embed, as an SVG element in the page's colours."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Curve:
    key: str  # of the records
    title: str
    unit: str
    caption: str
    is_share: bool = False


SMALL, LARGE = (3.7, 2.5), (4.6, 3.0)  # inches: three abreast on the page, or beside a table

_CURVES = (
    _Curve("reward", "Reward", "mean reward", "Should rise; flat means that nothing is learned."),
    _Curve(
        "pass_rate",
        "Pass rate",
        "rollouts that are right",
        "What the gate reads, question by question. Near 0 or 1 the rollouts teach little.",
        is_share=True,
    ),
    _Curve(
        "sft_fraction",
        "Questions sent to SFT",
        "share of questions",
        "Should fall as more questions are solved by the policy itself.",
        is_share=True,
    ),
    _Curve(
        "entropy",
        "Entropy",
        "nats per token",
        "A slow decline is normal; near zero the policy no longer explores.",
    ),
    _Curve(
        "response_length",
        "Response length",
        "tokens per response",
        "Growth up to the limit points to rambling, a collapse to answers without work.",
    ),
    _Curve(
        "grad_norm",
        "Gradient norm",
        "norm before clipping",
        "Spikes come before trouble: a lower learning rate, or clipping, calms them.",
    ),
)


def draw(records: Sequence[Record], folder: Path) -> list[Plot]:
    """Draw what the records have data for, replacing the PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    plots = []
    with rc_context(STYLE):
        evaluations = [record for record in records if ACCURACY in record]
        if len(evaluations) > 1:
            plots.append(_accuracy(evaluations, folder))
        steps = [record for record in records if record["step"] > 0]
        known = set.intersection(*(set(record) for record in steps)) if steps else set()
        plots += [_curve(curve, steps, folder) for curve in _CURVES if curve.key in known]
        timed = [record for record in records if "timing" in record]
        if timed:
            plots.append(_time_by_phase(timed, folder))
    return plots


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _curve(curve: _Curve, steps: Sequence[Record], folder: Path) -> Plot:
    def paint(axes: Axes) -> None:
        x = [record["step"] for record in steps]
        y = [record[curve.key] for record in steps]
        axes.plot(x, y, "o", color=LINE, alpha=0.4, markersize=3.5, markeredgewidth=0)
        axes.plot(x, running_mean(y), color=LINE, linewidth=2, solid_capstyle="round")
        if curve.is_share:
            _as_percent(axes, max(y))

    return _plot(curve.key, curve.title, curve.unit, curve.caption, folder, SMALL, paint)


def _accuracy(evaluations: Sequence[Record], folder: Path) -> Plot:
    def paint(axes: Axes) -> None:
        x = [record["step"] for record in evaluations]
        y = [record[ACCURACY] for record in evaluations]
        error = [record[STANDARD_ERROR] for record in evaluations]
        axes.errorbar(x, y, yerr=error, color=LINE, marker="o", markersize=5, linewidth=2, capsize=3)
        _as_percent(axes, max(value + bar for value, bar in zip(y, error, strict=True)))

    caption = "± one standard error of each evaluation alone; the questions are the same."
    return _plot("accuracy", "Held-out accuracy", "questions answered", caption, folder, LARGE, paint)


def _time_by_phase(timed: Sequence[Record], folder: Path) -> Plot:
    def paint(axes: Axes) -> None:
        edges = [timed[0]["step"] - 0.5, *(record["step"] + 0.5 for record in timed)]
        lower = [0.0] * len(timed)
        for phase, seconds in _phase_rows(timed).items():
            upper = [below + part for below, part in zip(lower, seconds, strict=True)]
            colour = PHASE_COLOURS.get(phase, PHASE_COLOURS["other"])
            axes.stairs(upper, edges, baseline=lower, fill=True, color=colour, linewidth=0, label=phase)
            lower = upper
        axes.grid(visible=False, axis="x")
        axes.figure.legend(loc="outside lower center", ncols=4, handlelength=0.9, columnspacing=1.2)

    caption = "The tallest band is what to make faster first."
    return _plot("time_by_phase", "Time by phase", "seconds", caption, folder, LARGE, paint)


def _phase_rows(timed: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds by step for each phase that took any, and "other" for what lies between the phases."""
    timings = [record["timing"] for record in timed]
    names = [name for name in PHASES if any(timing.get(name) for timing in timings)]
    rows = {name: [timing.get(name, 0.0) for timing in timings] for name in names}
    spent = [sum(column) for column in zip(*rows.values(), strict=True)] or [0.0] * len(timed)
    rows["other"] = [max(0.0, timing["step"] - part) for timing, part in zip(timings, spent, strict=True)]
    return rows


def _as_percent(axes: Axes, highest: float) -> None:
    axes.set_ylim(0, min(1.0, highest) * 1.08 or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _plot(
    name: str,
    title: str,
    unit: str,
    caption: str,
    folder: Path,
    size: tuple[float, float],
    paint: Callable[[Axes], None],
) -> Plot:
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)  # whatever backend the environment asks for
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    paint(axes)
    figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white")
    svg = as_svg(figure, title)
    return Plot(name, caption, svg)


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an element to put into HTML, its colours as variables of the page's style sheet."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|legend)_\d+"', "", svg)
    for colour, name in CSS_NAMES.items():
        svg = svg.replace(colour, f"var({name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
