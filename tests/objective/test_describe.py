"""docs/algorithms.md is what the table says now, and the options it lists are those the config gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpt_mega.cli import main
from hpt_mega.config import compose
from hpt_mega.objective import Row, rows
from hpt_mega.objective.describe import _READS, markdown, options_of

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "--markdown"]) == 0
    again = "run: hpt algorithms --markdown > docs/algorithms.md"
    assert capsys.readouterr().out == PAGE.read_text() == markdown(), again


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_page_and_the_config_give_a_row_the_same_options(row: Row) -> None:
    parts = ("advantage", "reference", "stabilizer", "likelihood")
    names = {"aggregation", *parts, *(f"offline_{part}" for part in parts)}
    given = {k: v for k, v in compose([f"algorithm={row.name}"]).algorithm.options.items() if k not in names}
    known = {name: value for name, value in options_of(row).items() if value is not None}
    assert given == known


def test_the_page_has_every_row_with_its_paper_formula_and_parts() -> None:
    page = PAGE.read_text()
    for row in rows():
        section = page.split(f"### {row.name}\n")[1].split("\n##")[0]
        assert row.paper in section and row.aggregation in section
        assert all(part in section for part in row.formula.split(";  "))
    assert all(f"**{name}**" in page for name in _READS)
