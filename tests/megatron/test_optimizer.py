"""The learning rate by hand, and one step of Adam beside torch's own, clipping and weight decay included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hpt_mega.config import OptimizerConfig, ParallelConfig
from tests.megatron.tiny import build_policy, config, given_gradient, leave_job, load_llama, save_llama
from tests.ranks import run_ranks

STEPS = 3
ADAM = OptimizerConfig(lr=3e-3, weight_decay=0.1, beta1=0.8, beta2=0.9, clip_grad=2.5)
LAYOUTS = {
    "tp1": ParallelConfig(1, 1, 1),
    "tp2": ParallelConfig(2, 1, 1),
    "pp2": ParallelConfig(1, 2, 1),
    "dp2 distributed": ParallelConfig(1, 1, 2, distributed_optimizer=True),
}


def rates(schedule: str, warmup: int, steps: int) -> list[float]:
    from hpt_mega.megatron.optimizer import learning_rate

    cfg = OptimizerConfig(lr=2.0, warmup_steps=warmup, schedule=schedule, min_lr_ratio=0.1)
    return [learning_rate(cfg, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("constant", 0, 3, [2.0, 2.0, 2.0]),
        ("constant", 3, 5, [2 / 3, 4 / 3, 2.0, 2.0, 2.0]),
        ("linear", 0, 4, [2.0, 1.4, 0.8, 0.2]),
        ("linear", 2, 6, [1.0, 2.0, 2.0, 1.4, 0.8, 0.2]),
        ("cosine", 0, 5, [2.0, 0.2 + 0.9 * (1 + math.sqrt(0.5)), 1.1, 0.2 + 0.9 * (1 - math.sqrt(0.5)), 0.2]),
        ("cosine", 1, 4, [2.0, 2.0, 1.1, 0.2]),
        ("cosine", 0, 1, [2.0]),
        ("linear", 5, 3, [0.4, 0.8, 1.2]),
    ],
)
def test_learning_rate_at_every_step_is_the_one_by_hand(
    schedule: str, warmup: int, steps: int, expected: list[float]
) -> None:
    assert rates(schedule, warmup, steps) == pytest.approx(expected)


def steps_on_given_gradients(layouts: list[str], folder: Path) -> dict[str, Any]:
    """The weights of this rank after STEPS updates, and every norm, by layout."""
    from hpt_mega.megatron.optimizer import set_learning_rate
    from hpt_mega.megatron.step import update

    results: dict[str, Any] = {}
    for layout in layouts:
        policy = build_policy(folder, config(LAYOUTS[layout], optimizer=ADAM))
        norms = []
        for step in range(STEPS):
            policy.wrapped.zero_grad_buffer()
            policy.optimizer.zero_grad()
            policy.set_gradients(seed=step)
            set_learning_rate(policy.optimizer, ADAM.lr / (step + 1))
            norms.append(update(policy.optimizer))
        results[layout] = {"norms": norms, "weights": policy.weights()}
        before = policy.weights()
        policy.set_gradients(seed=9)
        if policy.layout.rank == policy.layout.world_size - 1 or policy.layout.dp_size > 1:
            policy.entries()[-1][1].main_grad.view(-1)[-1] = math.nan
        try:
            update(policy.optimizer)
        except FloatingPointError as error:
            results[layout]["error"] = str(error)
        after = policy.weights()
        results[layout]["kept"] = all(torch.equal(before[name], after[name]) for name in before)
        leave_job()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tied=False)


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for size in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        job = run_ranks(steps_on_given_gradients, size, tmp_path_factory.mktemp("job"), names, folder)
        found |= {name: [rank[name] for rank in job] for name in names}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_torch_adamw_on_the_same_gradients(
    layout: str, ranks: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    model = load_llama(folder)
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]  # norms: no weight decay
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(ADAM.beta1, ADAM.beta2),
    )
    norms = []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = given_gradient(name, parameter.shape, step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), ADAM.clip_grad)))
        for group in adam.param_groups:
            group["lr"] = ADAM.lr / (step + 1)
        adam.step()
    weights = {name: weight for rank in ranks[layout] for name, weight in rank["weights"].items()}
    assert set(weights) == set(named)
    largest = max(float((weights[name] - named[name].detach()).abs().max()) for name in named)
    print(f"{layout}: largest weight difference {largest:.1e}")
    assert largest < 1e-6
    for rank in ranks[layout]:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_with_nan_raises_on_every_rank_and_leaves_the_weights(
    layout: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in ranks[layout]:
        assert rank["error"].startswith("the gradient's norm is nan")
        assert rank["kept"]
