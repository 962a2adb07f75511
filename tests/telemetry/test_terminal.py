"""What is shown while a run goes on and at its end."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hpt_mega.config import Config
from hpt_mega.telemetry.run import RunLog
from hpt_mega.telemetry.terminal import Terminal, duration
from tests.telemetry.conftest import initial, log_whole_run, trained


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_step_is_one_plain_line(
    open_log: Callable[..., RunLog], capsys: pytest.CaptureFixture[str]
) -> None:
    log_whole_run(open_log())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    shown = out.splitlines()
    assert shown[0] == "before training: 20.0 % of 100 held-out questions (± 4.0 %)"
    # 1000 sampled and 300 trained tokens in 6.5 s; two more steps of 6.5 s
    assert shown[1] == "step 1/3  reward 0.125  pass 10 %  SFT 50 %  200 tok/s  elapsed 0:00  left 0:13"
    assert shown[2].startswith("step 2/3  reward 0.250  pass 20 %  SFT 25 %  400 tok/s")
    assert shown[4] == "after step 3: 50.0 % of 100 held-out questions (± 3.0 %)"


def test_the_closing_tables_tell_what_was_gained_and_where_time_went(
    cfg: Config, open_log: Callable[..., RunLog], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(cfg.run_dir) / "hf").mkdir()
    log_whole_run(open_log())
    out = capsys.readouterr().out
    rows = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in out.splitlines()]
    assert "all 100 questions 20.0 % ± 4.0 % 50.0 % ± 3.0 % +30.0" in rows
    assert "sum 30.0 % 90.0 % +60.0" in rows
    assert "word problem 10.0 % 5.0 % -5.0" in rows
    assert "rollout 12.0 62 %" in rows  # of 19.5 s
    assert "total 19.5 100 %" in rows
    assert "tokens/s: 500 in rollout, 300 in training" in out
    assert f"report: {cfg.run_dir}/report.html\n" in out  # on one line, to be clicked on
    assert f"model:  {cfg.run_dir}/hf\n" in out


def test_no_model_is_promised_where_none_was_exported(
    open_log: Callable[..., RunLog], capsys: pytest.CaptureFixture[str]
) -> None:
    log_whole_run(open_log())
    assert "model:" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_gets_a_bar_of_one_line(width: int) -> None:
    file = Tty()
    terminal = Terminal(30, 192, done=0, console=Console(file=file, width=width, force_terminal=True))
    terminal.start()
    terminal.evaluated(0, initial())
    terminal.stepped(12, trained(1, reward=0.987, tokens_rollout=123456.0))
    terminal.stop()
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue())
    assert "before training: 20.0 %" in plain
    last = re.split(r"[\r\n]+", plain.strip())[-1]
    assert len(last) <= width
    for part in ("step 12/30", "reward 0.987", "pass 10 %", "SFT 50 %", "19,039 tok/s", "left 1:57 0:00:00"):
        assert part in last


def test_a_killed_run_leaves_the_cursor_visible() -> None:
    file = Tty()
    terminal = Terminal(30, 192, done=0, console=Console(file=file, width=80, force_terminal=True))
    terminal.start()
    shown, hidden = file.getvalue().rfind("\x1b[?25h"), file.getvalue().rfind("\x1b[?25l")
    terminal.stop()
    assert shown > hidden


def test_a_resumed_bar_begins_where_the_checkpoint_was() -> None:
    file = Tty()
    terminal = Terminal(30, 192, done=20, console=Console(file=file, width=100, force_terminal=True))
    terminal.start()
    terminal.stop()
    assert "step 20/30" in re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue())


def test_time_left_is_not_led_astray_by_one_slow_step() -> None:
    file = io.StringIO()
    terminal = Terminal(10, 192, done=0, console=Console(file=file))
    for step, wall in enumerate([100.0, 10.0, 10.0], start=1):
        terminal.stepped(step, trained(step, timing={"step": wall}))
    assert file.getvalue().splitlines()[-1].endswith("left 1:10")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3599.7, "1:00:00"), (3787, "1:03:07")]
)
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
