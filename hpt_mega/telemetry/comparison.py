"""The comparison of many runs: methods by cells (models) and seeds, as one HTML page and as Markdown.

What a run is lives in runs.py, the tests in significance.py, the figures in comparison_plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from hpt_mega.evaluation.statistics import powers_of_two
from hpt_mega.files import write_atomically
from hpt_mega.telemetry import comparison_plots, page
from hpt_mega.telemetry.runs import Finished, alike, comparable, find, newest, unfinished, unnamed
from hpt_mega.telemetry.significance import Mean, holm, mean

Score = Callable[[Finished], float | None]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write OUT/comparison.html, .md and plots/ on all finished runs below the folders; returns the page.

    Raises ConfigError where there are none.
    """
    every = find(folders)
    found = newest(every)
    kept = comparable(found)
    runs = alike(kept)
    evaluated = sum(before.counts is not after.counts for before, after in zip(kept, runs, strict=True))
    unmeasured = sum(accuracy(run) is None for run in runs)
    tables = _tables(runs)
    drawn = comparison_plots.draw(runs, out / "plots")
    title = f"{len(_methods(runs))} methods, {len(runs)} runs"
    subtitle = " · ".join(
        [
            f"models: {', '.join(_cells(runs))}",
            f"seeds: {', '.join(map(str, sorted({run.seed for run in runs})))}",
            _steps(runs),
            *(f"{key} differs too" for key in unnamed(runs)),
            *_left_out(unfinished(folders), "unfinished"),
            *_left_out(len(every) - len(found), "made again"),
            *_left_out(len(found) - len(kept), "without a partner in every method"),
            *([f"left out: the evaluations of {evaluated}, which others lack"] if evaluated else []),
            *([f"without a held-out accuracy: {unmeasured}"] if unmeasured else []),
        ]
    )
    figures = "".join(page.figure(plot.svg, plot.caption) for plot in drawn)
    parts = [f'<h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>']
    parts += [_html(tables[0])]
    arranged = f'<div class="{"pair" if len(_cells(runs)) < 3 else "wide"}">{figures}</div>'
    parts += [page.section("Curves", "Means over seeds, bands ± one standard error.", arranged)]
    parts += [_html(table) for table in tables[1:]]
    write_atomically(out / "comparison.md", _markdown(title, subtitle, tables))
    path = out / "comparison.html"
    write_atomically(path, page.page(title, "\n".join(parts)))
    return path


def _steps(runs: Sequence[Finished]) -> str:
    taken = sorted({run.records[-1]["step"] for run in runs})
    return f"{taken[0]} steps each" if len(taken) == 1 else f"{taken[0]} to {taken[-1]} steps"


def _left_out(runs: int, why: str) -> list[str]:
    return [f"left out: {runs} run{'s' if runs > 1 else ''} {why}"] if runs else []


def _tables(runs: Sequence[Finished]) -> list[Table]:
    tables = [_overall(runs), _by_cell(runs)]
    if any(run.counts for run in runs):
        tables += [_pass_at_k(runs), _by_task(runs)]
    return [*tables, _course(runs)]


# What a run scored; None where it was not measured.


def accuracy(run: Finished) -> float | None:
    """Mean share of right samples over all held-out questions: by the final evaluation, or the run's last."""
    if run.counts:
        return _share(run, list(run.counts.correct))
    return run.summary["final_accuracy"]


def inside(run: Finished) -> float | None:
    return _of_tasks(run, lambda task: task not in run.outside)


def outside(run: Finished) -> float | None:
    return _of_tasks(run, lambda task: task in run.outside)


def greedy(run: Finished) -> float | None:
    return fmean(run.counts.greedy.values()) if run.counts and run.counts.greedy else None


def never_solved(run: Finished) -> float | None:
    """The accuracy on the questions that the base model solved in none of its samples."""
    return _share(run, run.base.never_solved()) if run.base else None


def _of_tasks(run: Finished, wanted: Callable[[str], bool]) -> float | None:
    if not run.counts or not run.outside:
        return None
    return _share(run, [question for question, task in run.counts.task.items() if wanted(task)])


def _share(run: Finished, questions: Sequence[str]) -> float | None:
    if not run.counts or not questions:
        return None
    return fmean(run.counts.correct[question] / run.counts.samples for question in questions)


SCORES: tuple[tuple[str, Score], ...] = (
    ("all questions", accuracy),
    ("of trained kinds", inside),
    ("of other kinds", outside),
    ("never solved by the base", never_solved),
    ("greedy", greedy),
)


def _overall(runs: Sequence[Finished]) -> Table:
    measured = [(name, score) for name, score in SCORES if all(score(run) is not None for run in runs)]
    reference, *others = _methods(runs)
    tests = [_test(_differences(runs, method).values()) for method in others]
    columns = [["", "", ""]] + [
        [_signed(test), _p(test.p), _p(adjusted)]
        for test, adjusted in zip(tests, holm([test.p for test in tests]), strict=True)
    ]
    rows = [
        [method, *(_mean(_of(runs, method), score) for _, score in measured), *compared]
        for method, compared in zip([reference, *others], columns, strict=True)
    ]
    return Table(
        "Held-out accuracy after training",
        "Percent; mean over models and seeds ± half the 95 % interval that seeds give to these models. The "
        f"last columns pair {reference} with each method on the same model and seed, over all questions: "
        "difference in points; p of the two-sided t-test alone, and by Holm's method as one of all of them. "
        f"{_base_note(runs)}",
        ["method", *(name for name, _ in measured), f"{reference} − method", "p", "p of all"],
        rows,
    )


def _base_note(runs: Sequence[Finished]) -> str:
    bases = {run.cell: run.base for run in runs if run.base}
    said = [
        f"{cell} {100 * fmean(c / base.samples for c in base.correct.values()):.1f} % "
        f"({len(base.never_solved())} of {len(base.correct)} never solved in {base.samples} samples)"
        for cell, base in bases.items()
    ]
    return f"Before training: {'; '.join(said)}." if said else ""


def _differences(runs: Sequence[Finished], method: str) -> dict[str, list[float]]:
    """By model, the reference's accuracy less the method's on each seed that both were measured on."""
    reference = {(run.cell, run.seed): accuracy(run) for run in _of(runs, _methods(runs)[0])}
    found: dict[str, list[float]] = {}
    for run in _of(runs, method):
        against, own = reference.get((run.cell, run.seed)), accuracy(run)
        if against is not None and own is not None:
            found.setdefault(run.cell, []).append(against - own)
    return found


def _test(differences: Iterable[Sequence[float]]) -> Mean:
    cells = list(differences)
    return mean(cells) if cells else Mean(math.nan, math.nan, math.nan)


def _by_cell(runs: Sequence[Finished]) -> Table:
    reference, cells, rows = _methods(runs)[0], _cells(runs), []
    for method in _methods(runs):
        differences = {} if method == reference else _differences(runs, method)
        row = [method]
        for cell in cells:
            row.append(_mean([run for run in _of(runs, method) if run.cell == cell], accuracy))
            row.append(_signed(mean([differences[cell]])) if cell in differences else "")
        rows.append(row)
    return Table(
        "By model",
        f"Held-out accuracy on all questions, percent; {reference} less the method on each seed, in points.",
        ["method", *(name for cell in cells for name in (cell, f"{reference} − method"))],
        rows,
    )


def _pass_at_k(runs: Sequence[Finished]) -> Table:
    samples = min(run.counts.samples for run in runs if run.counts)
    ks = powers_of_two(samples)
    rows = [
        [method, *(_mean(_of(runs, method), lambda run, k=k: _solved_at(run, k)) for k in ks)]  # type: ignore[misc]
        for method in _methods(runs)
    ]
    note = "Questions that at least one of k samples at temperature 1 answers, percent."
    return Table("pass@k", note, ["method", *(f"k = {k}" for k in ks)], rows)


def _solved_at(run: Finished, k: int) -> float | None:
    return comparison_plots.solved_at(run.counts, k) if run.counts else None


def _by_task(runs: Sequence[Finished]) -> Table:
    tasks = sorted({task for run in runs if run.counts for task in run.counts.task.values()})
    rows = []
    for task in tasks:
        row = [f"{task} (other kind)" if task in runs[0].outside else task]
        for method in _methods(runs):
            shares = [_of_task(run, task) for run in _of(runs, method)]
            known = [share for share in shares if share is not None]
            row.append(_percent(fmean(known)) if known else "–")
        rows.append(row)
    return Table("By kind of question", "Mean accuracy, percent.", ["kind", *_methods(runs)], rows)


def _of_task(run: Finished, task: str) -> float | None:
    """None where the run was not asked any of the task."""
    return _share(run, [q for q, of in run.counts.task.items() if of == task]) if run.counts else None


def _course(runs: Sequence[Finished]) -> Table:
    """How steps, rollouts and what the methods did of their own differ: first and last tenth of training."""
    rows = []
    for method in _methods(runs):
        own = _of(runs, method)
        row = [method]
        for key, as_text in (
            ("sft_fraction", _percent), ("objective/offline_gradient_share", _percent),
            ("entropy", "{:.3f}".format), ("response_length", "{:.1f}".format),
        ):  # fmt: skip
            row.append(" → ".join(as_text(value) for value in _ends(own, key)) or "–")
        seconds = fmean(run.summary["seconds"]["total"] for run in own)
        rows.append([*row, f"{seconds:.0f}"])
    return Table(
        "Course of training",
        "First → last tenth of the steps, means over runs: share of questions (percent) whose demonstration "
        "is trained on, the demonstrations' share of the gradient (percent of Σ |d loss / d log π|), entropy "
        "of the trained tokens (nats), length of rollouts (tokens). Seconds of the last stage.",
        ["method", "SFT share", "of the gradient", "entropy", "length", "seconds"],
        rows,
    )


def _ends(runs: Sequence[Finished], key: str) -> list[float]:
    """Means of a metric over the first and the last tenth of the steps; empty where it is not measured."""
    ends: tuple[list[float], list[float]] = ([], [])
    for run in runs:
        values = [record[key] for record in run.measured(key)]
        tenth = max(1, len(values) // 10)
        if values:
            ends[0].append(fmean(values[:tenth]))
            ends[1].append(fmean(values[-tenth:]))
    return [fmean(end) for end in ends if end]


def _methods(runs: Sequence[Finished]) -> list[str]:
    return comparison_plots.methods(runs)


def _cells(runs: Sequence[Finished]) -> list[str]:
    return sorted({run.cell for run in runs})


def _of(runs: Sequence[Finished], method: str) -> list[Finished]:
    return [run for run in runs if run.method == method]


def _mean(runs: Sequence[Finished], score: Score) -> str:
    """A dash where there is no run, or one that was not measured: the others are on other seeds."""
    known = [(run.cell, value) for run in runs if (value := score(run)) is not None]
    if not runs or len(known) < len(runs):
        return "–"
    cells = [[value for at, value in known if at == cell] for cell in _cells(runs)]
    return _with_width(_percent, mean(cells))


def _with_width(as_text: Callable[[float], str], found: Mean) -> str:
    width = "" if math.isnan(found.half_width) else f" ± {_percent(found.half_width)}"
    return as_text(found.value) + width


def _signed(found: Mean) -> str:
    if math.isnan(found.value):
        return "–"
    return _with_width(lambda value: f"{100 * value:+.1f}", found)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(p: float) -> str:
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _html(table: Table) -> str:
    return page.section(table.title, table.note, page.numbers(table.head, table.rows, total=None))


def _markdown(title: str, subtitle: str, tables: Sequence[Table]) -> str:
    lines = [f"# {title}", "", subtitle, ""]
    for table in tables:
        lines += [f"## {table.title}", "", table.note, "", f"| {' | '.join(table.head)} |"]
        lines += ["|" + "---|" * len(table.head), *(f"| {' | '.join(row)} |" for row in table.rows), ""]
    return "\n".join(lines)
