"""Saved batches come back with the same bits; a file that is none is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.replay import append_batch, read_batches
from hpt_mega.trajectory import Source, Trajectory

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=5).map(tuple)
FLOATS = st.lists(st.floats(-1e4, 0), max_size=5).map(tuple)
TRAJECTORIES = st.builds(
    Trajectory,
    prompt_tokens=TOKENS,
    response_tokens=TOKENS,
    group=st.integers(0, 99),
    source=st.sampled_from(Source),
    policy_version=st.integers(0, 9),
    rollout_logp=FLOATS,
    reward=st.floats(0, 1),
    weight=st.floats(0, 1),
    pair=st.integers(-1, 9),
)


@given(batches=st.lists(st.lists(TRAJECTORIES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_batches_come_back_with_the_same_bits(
    batches: list[list[Trajectory]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("replay") / "batches.jsonl"
    for step, batch in enumerate(batches, start=1):
        append_batch(file, step, batch)
    assert read_batches(file) == dict(enumerate(batches, start=1))


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 1}', '{"step": 1, "text": "no trajectory"}'])
def test_another_file_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    append_batch(file, 1, [Trajectory((1,), (2,), 0, Source.ONLINE, 0)])
    with file.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2: no trajectory of debug\.save"):
        read_batches(file)
