"""The report: whole, self-contained, safe to open, and true to the records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.cli import main
from hpt_mega.config import Config, ConfigError
from hpt_mega.telemetry.plots import running_mean
from hpt_mega.telemetry.report import write_report
from hpt_mega.telemetry.run import RunLog
from tests.telemetry.conftest import QUESTIONS, VERDICTS, final, initial, log_whole_run, trained

OpenLog = Callable[..., RunLog]
CURVES = {"reward", "pass_rate", "sft_fraction", "entropy", "response_length", "grad_norm", "time_by_phase"}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags nest; collects tags, references to elsewhere, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def plots(cfg: Config) -> set[str]:
    for path in (Path(cfg.run_dir) / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    return {path.stem for path in (Path(cfg.run_dir) / "plots").iterdir()}


def test_a_whole_run_has_every_plot_on_the_page_and_as_a_file(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    page = parse(Path(cfg.run_dir) / "report.html")
    assert plots(cfg) == CURVES | {"accuracy"}
    assert page.tags.count("svg") == len(CURVES) + 1


def test_the_page_needs_nothing_from_elsewhere(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    page = parse(Path(cfg.run_dir) / "report.html")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    html = (Path(cfg.run_dir) / "report.html").read_text()
    assert "http" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))


def test_ids_on_the_page_are_unique(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    ids = re.findall(r'\sid="([^"]*)"', (Path(cfg.run_dir) / "report.html").read_text())
    assert len(ids) == len(set(ids))


def test_the_headline_is_the_accuracy_before_and_after(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    text = parse(Path(cfg.run_dir) / "report.html").text
    assert "hpt on tiny-model" in text
    assert "3 processes: tensor 1 × pipeline 3 × data 1" in text
    assert "20.0 % → 50.0 %" in text and "+30.0 points, +6.0 standard errors" in text
    assert "± 4.0 % → ± 3.0 % on 100 questions" in text
    assert "unfinished" not in text
    assert "megatron-core 0.16.1" in text and "questions_per_step: 16" in text


def test_text_of_the_model_cannot_become_markup(cfg: Config, open_log: OpenLog) -> None:
    hostile = "</div></table><script>alert('x')</script>\"><img src=x onerror=alert(1)> & \x00"
    cfg.model.path = "models/<b>tiny"
    cfg.algorithm.name = "<i>hpt"
    with open_log() as log:
        log.record(0, initial() | {"eval/accuracy/<u>task": 0.5})
        log.samples(1, QUESTIONS[:1], [hostile, ""], VERDICTS)
        log.record(1, trained(1, **final(), **{"eval/accuracy/<u>task": 0.5}))
        (Path(cfg.run_dir) / "config.yaml").write_text(
            "algorithm: {name: <i>hpt}\nmodel: {path: m/<b>tiny}\n"
        )
        log.finish({})
    page = parse(Path(cfg.run_dir) / "report.html")
    assert not {"script", "img", "i", "u"} & set(page.tags)
    assert hostile[:-1] in page.text and "(empty)" in page.text
    assert "<i>hpt on <b>tiny" in page.text and "<u>task" in page.text


def test_samples_come_from_the_first_and_last_step_once_a_reward(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    text = parse(Path(cfg.run_dir) / "report.html").text
    # rewards by question: 0, 1 and 0, 0; the third question's samples are not kept
    shown = {(step, i) for step in (1, 2, 3) for i in range(6) if f"step {step}, response {i}" in text}
    assert shown == {(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2)}


def test_an_unfinished_run_has_a_report(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.record(0, initial())
        log.record(1, trained(1))
    with (Path(cfg.run_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    page = parse(write_report(Path(cfg.run_dir)))
    assert "unfinished: 1 of 3 steps" in page.text
    assert plots(cfg) == CURVES
    assert not (Path(cfg.run_dir) / "summary.json").exists()


def test_a_pass_rate_that_fell_is_told_above_the_curves(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        for step in range(1, 41):
            log.record(step, trained(step, pass_rate=0.5 if step <= 20 else 0.1))
    assert "the pass rate has fallen from 50.0 %" in parse(write_report(Path(cfg.run_dir))).text


def test_a_run_without_steps_has_a_report(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.record(0, initial())
        log.finish({})
    page = parse(Path(cfg.run_dir) / "report.html")
    assert "No step has been trained yet" in page.text and "20.0 % → 20.0 %" in page.text
    assert plots(cfg) == set()


def test_a_run_killed_before_its_first_record_has_a_report(cfg: Config, open_log: OpenLog) -> None:
    with open_log():
        pass
    assert "not evaluated yet" in parse(write_report(Path(cfg.run_dir))).text


def test_plots_of_an_earlier_report_do_not_stay(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    with open_log() as log:
        log.record(0, initial())
    write_report(Path(cfg.run_dir))
    assert plots(cfg) == set()


def test_start_up_seconds_of_the_summary_are_in_the_table(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.record(0, initial() | {"timing": {"eval": 7.0, "step": 10.0}})
        log.record(1, trained(1))
        log.finish({"export": 4.0, "step": 4.0})
    cells = re.findall(r"<td>([^<]*)</td>", (Path(cfg.run_dir) / "report.html").read_text())
    by_phase = {cells[i]: cells[i + 1] for i in range(len(cells) - 1)}
    assert (by_phase["eval"], by_phase["export"], by_phase["total"]) == ("7.0", "4.0", "20.5")


def test_a_report_lies_where_it_is_asked_for_and_names_a_damaged_file(
    cfg: Config, open_log: OpenLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_whole_run(open_log())
    run, out = Path(cfg.run_dir), tmp_path / "elsewhere" / "report"
    (run / "report.html").unlink()
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert (out / "report.html").is_file() and any((out / "plots").iterdir())
    assert not (run / "report.html").exists()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("{", "", 1))
    capsys.readouterr()
    for said in ("metrics.jsonl, line 1: ", "summary.json holds no "):
        assert main(["report", str(run)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
        metrics.write_text("")
        (run / "summary.json").write_text("{}")


@pytest.mark.parametrize(("name", "key"), [("metrics.jsonl", "step"), ("samples.jsonl", "question")])
def test_a_line_that_lacks_what_the_report_needs_is_named(
    name: str, key: str, cfg: Config, open_log: OpenLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log_whole_run(open_log())
    path = Path(cfg.run_dir) / name
    path.write_text(path.read_text().replace(f'"{key}": ', '"other": ', 1))
    capsys.readouterr()
    assert main(["report", cfg.run_dir]) == 1
    assert f"{name}, line 1 holds no {key}; expected" in capsys.readouterr().err


def test_a_folder_without_its_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(initial()) + "\n")
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist"):
        write_report(tmp_path)


@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.integers(1, 7))
def test_a_running_mean_looks_back_only(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-9, atol=1e-9)
