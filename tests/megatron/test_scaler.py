"""fp16's loss scale moves and skips as torch.amp.GradScaler's, and is saved; the loss follows fp32's.

The gradients of the steps are given, with an infinity in some; those of the curves are computed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpt_mega.config import Config, OptimizerConfig, ParallelConfig
from tests.megatron.test_layouts import LENGTH, trajectories
from tests.megatron.tiny import (
    VOCABULARY,
    build_policy,
    config,
    given_gradient,
    leave_job,
    load_llama,
    save_llama,
    save_mixture,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

BAD = (1, 2, 6)  # steps with an infinity
STEPS, SAVED = 9, 4
WINDOW = 2
FIRST = 1024.0
ADAM = OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_grad=0.0)
LAYOUTS = {
    "tp1": ParallelConfig(1, 1, 1),
    "pp2": ParallelConfig(1, 2, 1),
    "dp2": ParallelConfig(1, 1, 2, distributed_optimizer=True),
    "ep2": ParallelConfig(1, 1, 2, ep=2),
}


def fp16(layout: str) -> Config:
    cfg = config(LAYOUTS[layout], dtype="fp16", optimizer=ADAM)
    cfg.precision = replace(cfg.precision, loss_scale=FIRST, loss_scale_window=WINDOW)
    return cfg


def step(policy: Any, number: int) -> dict[str, Any]:
    """An update on the given gradients, as a scaled loss leaves them; in bad steps one has an infinity.

    In a mixture only an expert's gradient is bad, which the dense weights' part does not see.
    """
    from hpt_mega.megatron.optimizer import set_learning_rate, zero_gradients
    from hpt_mega.megatron.step import describe_update, update

    zero_gradients(policy.wrapped, policy.optimizer)
    policy.set_gradients(number)
    scale = float(policy.optimizer.get_loss_scale())
    for _, parameter in policy.entries():
        parameter.main_grad.mul_(scale)
    last = policy.layout.rank == policy.layout.world_size - 1
    mixture = policy.shape.experts is not None
    if number in BAD and (last or (policy.layout.dp_size > 1 and not mixture)):
        bad = [parameter for entry, parameter in policy.entries() if (entry.expert is not None) == mixture]
        bad[-1].main_grad.view(-1)[-1] = math.inf
    set_learning_rate(policy.optimizer, ADAM.lr)
    done = describe_update(policy.optimizer, update(policy.optimizer))
    return {
        "before": scale,
        **done,
        "scales": [float(p.get_loss_scale()) for p in policy.optimizer.chained_optimizers],
    }


def run(layouts: list[str], folders: dict[str, Path], states: Path) -> dict[str, Any]:
    from hpt_mega.megatron.state import load_state

    found: dict[str, Any] = {}
    for layout in layouts:
        folder = folders["experts" if layout == "ep2" else "llama"]
        policy = build_policy(folder, fp16(layout))
        steps = []
        for number in range(STEPS):
            if number == SAVED:
                place = states / layout
                place.mkdir(exist_ok=True)
                policy.save(place)
            steps.append(step(policy, number))
        found[layout] = {"steps": steps, "weights": policy.weights()}
        leave_job()
        policy = build_policy(folder, fp16(layout))
        load_state(place, policy.model, policy.optimizer, policy.layout, policy.cfg)
        found[layout]["resumed"] = [step(policy, number) for number in range(SAVED, STEPS)]
        found[layout]["again"] = policy.weights()
        leave_job()
    return found


def curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Five steps on the same trajectories in each precision."""
    from hpt_mega.megatron.learner import Learner
    from hpt_mega.objective import algorithm

    found = {}
    for dtype in ("fp32", "fp16", "bf16"):
        cfg = config(ParallelConfig(1, 1, 1), dtype=dtype, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0))
        policy = build_policy(folder, cfg)
        estimator = algorithm("hpt", length=LENGTH)
        learner = Learner(cfg, policy.layout, policy.wrapped, policy.optimizer, estimator, VOCABULARY)
        # with old log-probabilities the ratio is not 1, and the loss moves with the weights
        mine = [replace(t, old_logp=t.rollout_logp) for t in trajectories()]
        found[dtype] = [learner.learn(mine, number) for number in range(5)]
        leave_job()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "llama": save_llama(tmp_path_factory.mktemp("llama"), tied=False),
        "experts": save_mixture(tmp_path_factory.mktemp("experts")),
    }


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for size in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        states = tmp_path_factory.mktemp("states")
        job = run_ranks(run, size, tmp_path_factory.mktemp("job"), names, folders, states)
        found |= {name: [rank[name] for rank in job] for name in names}
    return found


def amp_steps(named: dict[str, torch.Tensor]) -> list[tuple[float, bool]]:
    """torch.amp's own steps on fp32 master weights: the scale before each, and whether it was skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST, growth_interval=WINDOW)
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=ADAM.lr,
        betas=(ADAM.beta1, ADAM.beta2),
    )
    found = []
    for number in range(STEPS):
        scale = float(scaler.scale(torch.ones(())))
        for name, parameter in named.items():
            parameter.grad = given_gradient(name, parameter.shape, number) * scale
        if number in BAD:
            matrices[0].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        before = matrices[0].detach().clone()
        scaler.step(adam)
        scaler.update()
        found.append((scale, torch.equal(before, matrices[0])))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scale_and_the_skipped_steps_are_those_of_torch_amp(
    layout: str, ranks: dict[str, list[Any]], folders: dict[str, Path]
) -> None:
    named = {
        name: p.detach().half().float().requires_grad_()
        for name, p in load_llama(folders["llama"]).named_parameters()
    }
    expected = amp_steps(named)
    assert [number for number, (_, skipped) in enumerate(expected) if skipped] == list(BAD)
    for rank in ranks[layout]:
        found = [(done["before"], bool(done["skipped"])) for done in rank["steps"]]
        assert found == expected
        assert all(scale == done["loss_scale"] for done in rank["steps"] for scale in done["scales"])
        assert all(("grad_norm" in done) != bool(done["skipped"]) for done in rank["steps"])
    if layout != "ep2":
        weights = {name: weight for rank in ranks[layout] for name, weight in rank["weights"].items()}
        largest = max(
            float((weights[name].float() - p.detach().half().float()).abs().max())
            for name, p in named.items()
        )
        print(f"{layout}: largest weight difference {largest:.1e}")
        assert largest < 1e-3  # a unit in the last place of fp16 at 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_and_counts_go_on_after_a_load(layout: str, ranks: dict[str, list[Any]]) -> None:
    for rank in ranks[layout]:
        assert rank["resumed"] == rank["steps"][SAVED:]
        assert all(torch.equal(weight, rank["again"][name]) for name, weight in rank["weights"].items())


def test_an_overflow_at_the_lowest_scale_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    assert run_ranks(lowest, 1, tmp_path, folders["llama"]) == [
        "a gradient is not finite at a loss scale of 1.0"
    ]


def lowest(folder: Path) -> str:
    cfg = fp16("tp1")
    cfg.precision.loss_scale = 2.0
    policy = build_policy(folder, cfg)
    step(policy, BAD[0])
    with pytest.raises(FloatingPointError) as error:
        step(policy, BAD[1])
    return str(error.value).partition(",")[0]


def test_five_steps_in_fp16_follow_fp32_closer_than_bf16_does(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A rounding is at most 2**-11 in fp16 and 2**-8 in bf16; some forty of them lie between a token and its
    log-probability, and add up like a random walk: 2**-11 * sqrt(40) = 3e-3, three times that is allowed."""
    (found,) = run_ranks(curves, 1, tmp_path, folders["llama"])
    assert [done["skipped"] for done in found["fp16"]] == [0.0] * 5
    apart = {
        dtype: max(
            abs(mine[name] - theirs[name]) / abs(theirs[name])
            for mine, theirs in zip(found[dtype], found["fp32"], strict=True)
            for name in ("loss", "entropy", "grad_norm")
        )
        for dtype in ("fp16", "bf16")
    }
    print(f"largest relative difference from fp32: {apart}")
    assert 1e-6 < apart["fp16"] < 9e-3
    assert apart["fp16"] < apart["bf16"]
