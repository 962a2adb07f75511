"""The diagnosis of gradients: which rows are unbiased is known, and a measured bias tells it apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hpt_mega.cli import main
from hpt_mega.objective import rows
from hpt_mega.objective.diagnosis import World, diagnose_gradient

torch.set_num_threads(1)


def test_all_sequences_are_known_and_their_probabilities_sum_to_one() -> None:
    world = World(questions=3, staleness=0.3, seed=0)
    assert len(world.words_ST) == 1 + 3 + 9 + 27 * 4
    for probability_QS in (world.old_QS, world.logp(world.theta).sum(2).exp()):
        torch.testing.assert_close(probability_QS.sum(1), torch.ones(3, dtype=torch.float64))
    rates = (world.logp(world.theta).sum(2).exp() * world.reward_QS).sum(1)
    assert (world.reward_QS.sum(1) > 0).all() and (rates <= 0.5).all() and rates[0] > 0.3 > rates[-1]


def test_the_true_gradient_is_that_of_finite_differences() -> None:
    world = World(questions=2, staleness=0.0, seed=1)
    direction = torch.randn(world.theta.shape, dtype=torch.float64, generator=world.generator)

    def expected_reward(step: float) -> float:
        probability_QS = world.logp(world.theta + step * direction).sum(2).exp()
        return (probability_QS * world.reward_QS).sum(1).mean().item()

    slope = (expected_reward(1e-5) - expected_reward(-1e-5)) / 2e-5
    assert float(world.true_gradient() @ direction.flatten()) == pytest.approx(slope, rel=1e-6)


def test_the_bias_measured_of_an_unbiased_row_shrinks_as_one_over_root_n() -> None:
    sizes = (25, 100, 400)
    bias = {
        n: math.sqrt(
            sum(
                diagnose_gradient(["reinforce"], questions=3, rollouts=4, resamplings=n, seed=seed)[0].bias
                ** 2
                for seed in range(6)
            )
        )
        for n in sizes
    }
    for fewer, more in ((25, 100), (100, 400)):
        assert 1.4 < bias[fewer] / bias[more] < 2.9  # 2 but for chance


def test_reinforce_rloo_and_ppo_with_a_true_critic_are_unbiased_and_sft_is_not() -> None:
    found = {
        f.row: f
        for f in diagnose_gradient(
            ["reinforce", "rloo", "ppo", "sft"], questions=3, rollouts=4, resamplings=300
        )
    }
    for name in ("reinforce", "rloo", "ppo"):
        assert found[name].bias < 1.6 * found[name].noise
        assert found[name].cosine > 0.9
    assert found["sft"].bias > 4 * found["sft"].noise
    assert found["rloo"].variance < found["reinforce"].variance


def test_a_group_mean_that_counts_the_rollout_itself_shrinks_the_gradient_by_one_nth() -> None:
    (found,) = diagnose_gradient(["dr_grpo"], questions=2, rollouts=2, resamplings=400, seed=3)
    assert abs(found.bias - 0.5) < 3 * found.noise
    assert found.cosine > 0.9


def test_a_row_is_judged_alike_alone_and_among_others() -> None:
    alone = diagnose_gradient(["grpo"], questions=2, resamplings=3)[0]
    assert diagnose_gradient(["luffy", "grpo"], questions=2, resamplings=3)[1] == alone


@pytest.mark.parametrize("own_normaliser", [False, True])
def test_every_row_is_diagnosed(own_normaliser: bool) -> None:
    names = [row.name for row in rows()]
    found = diagnose_gradient(names, questions=2, resamplings=4, staleness=0.2, own_normaliser=own_normaliser)
    assert [f.row for f in found] == names
    assert all(math.isfinite(f.bias) and math.isfinite(f.noise) for f in found)


def test_the_command_writes_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gradient"
    arguments = [
        "diagnose-gradient",
        "--rows",
        "grpo",
        "rloo",
        "--resamplings",
        "9",
        "--staleness",
        "0",
        "0.3",
    ]
    assert main([*arguments, "--questions", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    assert printed.count("| grpo |") == printed.count("| rloo |") == 2
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value"), [("--rows", "gprp"), ("--rollouts", "1"), ("--resamplings", "0")]
)
def test_a_wrong_option_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose-gradient", "--rows", "grpo", option, value]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["diagnose-gradient", "--help"])
    assert end.value.code == 0
    assert "example: hpt diagnose-gradient" in capsys.readouterr().out
