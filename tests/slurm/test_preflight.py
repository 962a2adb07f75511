"""The checks of a job's nodes: what is missing, unequal, short or unseen is named with its node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.slurm.preflight import compare, read_nodes, write_node

VERSIONS = {"torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.16.0", "math-verify": "0.9.0"}


def node(name: str, gpus: int = 8, free: float = 900.0, **versions: str | None) -> dict[str, Any]:
    found = VERSIONS | {"transformer-engine": "2.20.2"}
    found |= {key.replace("_", "-"): value for key, value in versions.items()}
    return {
        "node": name,
        "gpus_given": 8,
        "gpus": ["H100"] * gpus,
        "free_gib": free,
        "python": "3.11.9",
        "packages": [{"name": k, "version": v, "install": f"pip install {k}"} for k, v in found.items()],
    }


def test_equal_nodes_with_all_that_is_needed_pass() -> None:
    assert compare([node("a"), node("b"), node("c")], 3, 50) == []


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (node("c", gpus=7), "c: Slurm gives 8 GPUs and torch sees 7"),
        (node("c", free=12.4), "c: 12 GiB are free for the run, 50 wanted"),
        (node("c", torch="2.12.1"), "c: torch is 2.12.1, on the other nodes 2.13.0"),
        (node("c", transformer_engine=None), "c: transformer-engine is missing (pip install"),
    ],
)
def test_a_node_that_is_not_as_the_others_is_named(odd: dict[str, Any], expected: str) -> None:
    problems = compare([node("a"), node("b"), odd], 3, 50)
    assert any(expected in problem for problem in problems)
    assert all(problem.startswith("c: ") for problem in problems)


def test_a_node_that_did_not_report_is_missed() -> None:
    (problem,) = compare([node("a"), node("b")], 3, 50)
    assert problem.startswith("2 of 3 nodes reported (a, b)")


def test_what_a_node_writes_can_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    write_node(tmp_path, tmp_path / "run")
    (found,) = read_nodes(tmp_path)
    assert json.loads((tmp_path / "here.json").read_text()) == found
    assert any("here: Slurm gives 8 GPUs" in problem for problem in compare([found], 1, 0))
