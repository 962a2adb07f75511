"""results.json as Markdown, LaTeX and HTML: ours beside the published rows, pass@k, categories.

What the numbers are is decided in results.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hpt_mega.evaluation.journal import GREEDY, SAMPLED
from hpt_mega.evaluation.published import IN_DISTRIBUTION, PUBLISHED, TITLES, column
from hpt_mega.telemetry.page import numbers, page, section, texts

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # head, rows

AVERAGE = "average"
ALIKE = "one of no width says that all questions scored alike, not that the figure is certain"
_LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "→": r"$\to$", "±": r"$\pm$"}


def markdown(results: Result, published: str) -> str:
    """All tables of the results."""
    parts = [f"# {results['model']}", _settings(results)]
    for title, note, (head, rows) in _tables(results, published):
        parts += [f"## {title}", note, _markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def latex(results: Result, published: str) -> str:
    """The table beside the published rows, for booktabs."""
    head, rows = comparison(results, published)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        _latex_row(head),
        r"\midrule",
        *map(_latex_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def html(results: Result, published: str) -> str:
    """A page that needs nothing but itself."""
    head = f"<h1>{escape(results['model'])}</h1>"
    body = [head, f'<p class="subtitle">{escape(_settings(results))}</p>']
    for title, note, (names, rows) in _tables(results, published):
        total = -1 if rows[-1][0].startswith(("all", "this run")) else None
        body.append(section(title, note, numbers(names, rows, total=total)))
    prompts = [[name, found["prompt"]] for name, found in results["benchmarks"].items()]
    body.append(
        section("Prompts", "The first question as it is asked.", texts(["benchmark", "prompt"], prompts))
    )
    return page(f"Evaluation of {results['model']}", "\n".join(body))


def comparison(results: Result, published: str) -> Table:
    """The published rows, then ours: percent, avg@k where sampled, with half the interval's width."""
    parts: Mapping[str, Any] = results["benchmarks"]
    columns = [column(name) for name in parts]  # of two for one column, each keeps its name
    found = {column(name) if columns.count(column(name)) == 1 else name: parts[name] for name in parts}
    theirs = PUBLISHED.get(published, {})
    extra = [name for name in found if name not in TITLES]
    shown = [name for name in TITLES if name in found] + extra
    has_average = all(name in found for name in IN_DISTRIBUTION)  # only then theirs is over the same suites
    head = ["", *(TITLES.get(name, name) for name in shown), *([AVERAGE] if has_average else [])]
    rows = []
    for name, figures in theirs.items():
        known = [figures[c] for c in IN_DISTRIBUTION if c in figures]
        mean = figures.get(AVERAGE, sum(known) / len(known) if known else None)
        cells = [*(figures.get(c) for c in shown), *([mean] if has_average else [])]
        if not any(cells):
            continue  # nothing of theirs is comparable
        rows.append([f"{name} (published)", *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    for mode in (GREEDY, SAMPLED):
        if not any(mode in part for part in found.values()):
            continue
        estimates = {name: _average(part[mode]) for name, part in found.items() if mode in part}
        cells_ours = [_percent(estimates[name]) if name in estimates else "" for name in shown]
        if has_average:
            over = [estimates[name]["value"] for name in IN_DISTRIBUTION if name in estimates]
            cells_ours.append(
                f"{100 * sum(over) / len(over):.1f}" if len(over) == len(IN_DISTRIBUTION) else ""
            )
        rows.append([f"this run, {mode}", *cells_ours])
    return head, rows


def _tables(results: Result, published: str) -> list[tuple[str, str, Table]]:
    level = f"{100 * results['level']:g} % bootstrap interval over questions"
    accuracy = comparison(results, published)
    has_published = any("(published)" in row[0] for row in accuracy[1])
    beside = " beside the rows that arXiv 2509.04419 published" if has_published else ""
    tables = [
        ("Accuracy", f"Percent right{beside}; ours with its {level}.", accuracy),
        ("Sampling", f"avg@k and unbiased pass@k, percent, {level}; {ALIKE}.", _sampling(results)),
    ]
    for name, found in results["benchmarks"].items():
        mode = SAMPLED if SAMPLED in found else GREEDY
        if found[mode]["categories"]:
            tables.append(
                (f"{name} by category", f"avg@{found[mode]['samples']}, {level}.", _by_category(found[mode]))
            )
    contamination = results["contamination"]
    if contamination is not None:
        rows = [
            [name, str(len(part["overlapping"])), ", ".join(list(part["overlapping"])[:8])]
            for name, part in contamination.items()
        ]
        note = "Questions that share a run of 13 words with a training prompt."
        tables.append(("Contamination", note, (["benchmark", "questions", "which"], rows)))
    return tables


def _sampling(results: Result) -> Table:
    head = ["benchmark", "mode", "questions", "avg@k", "pass@k", "mean tokens", "finished", "no answer"]
    rows = []
    for name, found in results["benchmarks"].items():
        for mode in (GREEDY, SAMPLED):
            if mode not in found:
                continue
            part = found[mode]
            passes = ", ".join(f"{k}: {100 * one['value']:.1f}" for k, one in part["pass@k"].items())
            rows.append(
                [
                    name,
                    mode,
                    str(found["questions"]),
                    f"@{part['samples']} {_bounds(_average(part))}",
                    passes,
                    f"{part['mean_tokens']:.0f}",
                    f"{100 * part['finished']:.0f} %",
                    f"{100 * part['without_answer']:.0f} %",
                ]
            )
    return head, rows


def _by_category(part: Result) -> Table:
    rows = [[name, str(one["questions"]), _bounds(one)] for name, one in part["categories"].items()]
    rows.append(["all", str(_average(part)["questions"]), _bounds(_average(part))])
    return ["category", "questions", "percent right"], rows


def _average(part: Result) -> Result:
    estimate: Result = part[f"avg@{part['samples']}"]
    return estimate


def _percent(estimate: Result) -> str:
    return f"{100 * estimate['value']:.1f} ± {50 * (estimate['high'] - estimate['low']):.1f}"


def _bounds(estimate: Result) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _settings(results: Result) -> str:
    return (
        f"Sampled at temperature {results['temperature']:g}, top-p {results['top_p']:g}, at most "
        f"{results['max_new_tokens']} tokens, seed {results['seed']}, template {results['template']}, "
        f"engine {results['engine']}."
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
