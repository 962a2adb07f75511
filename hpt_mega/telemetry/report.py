"""A run's report: one HTML file that explains a run to somebody who was not there.

Its figures are drawn in plots.py, its numbers added up in summary.py, its look is in page.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hpt_mega.config import Config, load
from hpt_mega.files import write_atomically
from hpt_mega.telemetry import page, plots
from hpt_mega.telemetry.decline import declines
from hpt_mega.telemetry.records import Record, read
from hpt_mega.telemetry.summary import Summary, summarise
from hpt_mega.telemetry.terminal import duration, percent, points

SHOWN = ("step", "question", "response", "answer", "reward")  # of a sample


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write report.html and plots/ from what the run left so far, into RUN_DIR or `out`; returns the page.

    Raises ConfigError where config.yaml does not fit, DamagedFileError where another file is damaged.
    """
    config_path = run_dir / "config.yaml"
    cfg = load(config_path)
    records = read(run_dir / "metrics.jsonl", "step")
    summary_path = run_dir / "summary.json"
    finished = summary_path.is_file()
    summary = Summary.load(summary_path) if finished else summarise(records, cfg)
    drawn = {plot.name: plot for plot in plots.draw(records, (out or run_dir) / "plots")}
    accuracy, time_by_phase = (drawn.pop(name, None) for name in ("accuracy", "time_by_phase"))
    parts = [
        _header(cfg, summary, finished),
        _tiles(cfg, summary),
        _accuracy(summary, accuracy),
        _curves(list(drawn.values()), declines(records)),
        _time(summary, time_by_phase),
        _samples(read(run_dir / "samples.jsonl", *SHOWN)),
        _config(config_path.read_text(encoding="utf-8"), summary if finished else None),
    ]
    path = (out or run_dir) / "report.html"
    write_atomically(path, page.page(_title(cfg), "\n".join(parts)))
    return path


def _title(cfg: Config) -> str:
    return f"{cfg.algorithm.name} on {Path(cfg.model.path).name}"


def _header(cfg: Config, summary: Summary, finished: bool) -> str:
    layout = cfg.parallel
    ranks = "process" if layout.world_size == 1 else "processes"
    facts = [
        f"{layout.world_size} {ranks}: tensor {layout.tp} × pipeline {layout.pp} × data {layout.dp}",
        f"{cfg.precision.dtype}{f', fp8 {cfg.precision.fp8.recipe}' if cfg.precision.fp8.recipe else ''}",
        f"gate {cfg.gate.name}",
        f"{cfg.trainer.questions_per_step} questions × {cfg.rollout.rollouts_per_question} rollouts a step",
        f"seed {cfg.seed}",
        cfg.run_dir,
    ]
    unfinished = f"unfinished: {summary.steps} of {cfg.trainer.steps} steps"
    badge = "" if finished else f'<span class="badge">{unfinished}</span>'
    return f'<h1>{escape(_title(cfg))}{badge}</h1><p class="subtitle">{escape(" · ".join(facts))}</p>'


def _tiles(cfg: Config, summary: Summary) -> str:
    rates, tokens, seconds = summary.tokens_per_s, summary.tokens, summary.seconds["total"]
    done = "all done" if summary.steps == cfg.trainer.steps else f"of {cfg.trainer.steps}"
    per_step = f"{seconds / summary.steps:,.1f} s a step" if summary.steps else "no step yet"
    tiles = [
        _accuracy_tile(summary),
        page.tile("Steps", f"{summary.steps:,}", done),
        page.tile("Time", duration(seconds), per_step),
        page.tile("Rollout tokens/s", f"{rates['rollout']:,.0f}", f"{tokens['rollout']:,} sampled"),
        page.tile("Train tokens/s", f"{rates['train']:,.0f}", f"{tokens['trained']:,} trained"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _accuracy_tile(summary: Summary) -> str:
    before, after, gain = summary.initial_accuracy, summary.final_accuracy, summary.gain
    if before is None or after is None or gain is None:
        return page.tile("Held-out accuracy", "–", "not evaluated yet", wide=True)
    in_errors = summary.gain_in_standard_errors
    how_sure = "" if in_errors is None else f", {in_errors:+.1f} standard errors"
    kind = "good" if gain > 0 else "bad" if gain < 0 else ""
    errors = " → ".join(
        f"± {percent(error or 0.0)}"
        for error in (summary.initial_standard_error, summary.final_standard_error)
    )
    note = (
        f'<span class="{kind}">{points(gain)} points</span>{how_sure}<br>'
        f"{errors} on {summary.heldout_questions:,} questions"
    )
    return page.tile("Held-out accuracy", f"{percent(before)} → {percent(after)}", note, wide=True)


def _accuracy(summary: Summary, plot: plots.Plot | None) -> str:
    if summary.initial_accuracy is None or summary.final_accuracy is None:
        return ""
    pairs = [("all questions", summary.initial_accuracy, summary.final_accuracy)]
    pairs += [(task, both["initial"], both["final"]) for task, both in summary.accuracy_by_task.items()]
    rows = [(name, percent(before), percent(after), points(after - before)) for name, before, after in pairs]
    table = page.numbers(("task", "before", "after", "change"), rows, total=0)
    asked = summary.config["evaluation"]
    how = (
        f"{asked['samples']} samples at temperature {asked['temperature']:g}"
        if asked["temperature"]
        else "Greedy"
    )
    note = f"{how} answers to questions that are not trained on; changes are in percentage points."
    return page.section("Accuracy by task", note, _beside(plot, table))


def _curves(drawn: Sequence[plots.Plot], warnings: Sequence[str]) -> str:
    if not drawn:
        return page.section("Course of training", "No step has been trained yet.", "")
    figures = "".join(page.figure(plot.svg, plot.caption) for plot in drawn)
    note = f"Dots are single steps, lines the mean of the last {plots.WINDOW}."
    told = "".join(f'<p class="bad">{escape(warning)}</p>' for warning in warnings)
    return page.section("Course of training", note, f'{told}<div class="plots">{figures}</div>')


def _time(summary: Summary, plot: plots.Plot | None) -> str:
    rows = [(name, f"{seconds:,.1f}", percent(share)) for name, seconds, share in summary.phases()]
    table = page.numbers(("phase", "seconds", "share"), rows, total=-1)
    note = "“other” is start-up and what lies between the phases."
    return page.section("Where the time went", note, _beside(plot, table))


def _beside(plot: plots.Plot | None, table: str) -> str:
    return page.pair(page.figure(plot.svg, plot.caption), table) if plot else table


def _samples(samples: Sequence[Record]) -> str:
    if not samples:
        return ""
    rows = [
        (
            str(sample["step"]),
            sample["question"],
            sample["response"] or "(empty)",
            sample["answer"],
            f"{sample['reward']:g}",
        )
        for sample in _telling(samples)
    ]
    return page.section(
        "Samples",
        "From the first and the last step: for each question one response of every reward it got.",
        page.texts(SHOWN, rows),
    )


def _telling(samples: Sequence[Record]) -> list[Record]:
    """Of the first and last step, the first response to each question with each reward."""
    ends = (samples[0]["step"], samples[-1]["step"])
    chosen: dict[tuple[int, str, float], Record] = {}
    for sample in samples:
        if sample["step"] in ends:
            chosen.setdefault((sample["step"], sample["question"], sample["reward"]), sample)
    return list(chosen.values())


def _config(config: str, summary: Summary | None) -> str:
    """The config, and of a finished run the versions it was made with, for those who want to run it again."""
    made_with = ""
    if summary:
        listed = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
        made_with = f'<p class="note">{escape(listed)}</p>'
    return f'<details><summary>Config</summary><pre class="card">{escape(config)}</pre></details>{made_with}'
