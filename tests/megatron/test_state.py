"""A saved state goes on with the same bits, in the layout that wrote it and in others.

The gradients are given, and not clipped: then a step is elementwise, and layouts can agree to the last bit.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpt_mega.config import AlgorithmConfig, Config, OptimizerConfig, ParallelConfig
from tests.checkpoint.families import save_model
from tests.megatron.tiny import Policy, build_policy, config, leave_job, save_llama, save_mixture
from tests.ranks import run_ranks

LAYOUTS = {
    "tp1": ParallelConfig(1, 1, 1),
    "pp2": ParallelConfig(1, 2, 1),
    "tp2": ParallelConfig(2, 1, 1),
    "dp2": ParallelConfig(1, 1, 2, distributed_optimizer=True),
    "vpp3": ParallelConfig(1, 2, 1, vpp=3),
    "cp2": ParallelConfig(1, 1, 1, cp=2, distributed_optimizer=True),
    "dp1": ParallelConfig(1, 1, 1, distributed_optimizer=True),
    "tp2sharded": ParallelConfig(2, 1, 1, distributed_optimizer=True),
    "any dp2": ParallelConfig(1, 1, 2, distributed_optimizer=True),
    "any tp2": ParallelConfig(2, 1, 1, distributed_optimizer=True),
    "ep2": ParallelConfig(1, 1, 2, ep=2),
    "etp2": ParallelConfig(1, 1, 2, etp=2),
    "ep2sharded": ParallelConfig(1, 1, 2, ep=2, distributed_optimizer=True),
}
ANY = "any "  # saved as fully_reshardable, otherwise as dp_reshardable
IN_BACKGROUND = "bf16 tied"  # saved with trainer.async_save, and written after the next step only
ADAM = OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_grad=0.0)
MOVES = [  # saved in, loaded into
    ("tp1", "tp1"),
    ("pp2", "pp2"),
    ("tp2", "tp2"),
    ("dp2", "dp2"),
    ("pp2", "tp2"),
    ("tp2", "pp2"),
    ("pp2", "tp1"),
    ("tp1", "tp2"),
    ("tp1", "vpp3"),
    ("vpp3", "pp2"),
    ("vpp3", "vpp3"),
    ("cp2", "cp2"),
    ("cp2", "dp2"),
    ("dp2", "dp1"),
    ("dp1", "dp2"),
    ("tp2sharded", "tp2sharded"),
    ("any dp2", "dp1"),
    ("any dp2", "tp2sharded"),
    ("any tp2", "dp2"),
]
REFUSED = [  # saved in, loaded into, what is said
    ("dp2", "tp2sharded", "with parallel.tp=1; now they are parallel.tp=2"),
    ("tp2sharded", "dp1", "trainer.checkpoint_format=fully_reshardable"),
    ("dp2", "tp2", "distributed_optimizer=True"),
    ("tp1", "dp2", "distributed_optimizer=False"),
]
MOVES_OF_EXPERTS = [
    ("tp1", "tp1"),
    ("ep2", "ep2"),
    ("ep2", "tp1"),
    ("tp1", "ep2"),
    ("ep2", "etp2"),
    ("etp2", "tp1"),
    ("ep2sharded", "ep2sharded"),
]
VARIANTS = {"fp32 untied": MOVES, "bf16 tied": MOVES, "fp32 experts": MOVES_OF_EXPERTS}
CASES = [(*move, variant) for variant, moves in VARIANTS.items() for move in moves]

Folders = dict[str, Path]  # by variant


def policy_in(layout: str, variant: str, folders: Folders) -> Policy:
    return build_policy(folders[variant], config_of(layout, variant))


def config_of(layout: str, variant: str) -> Config:
    cfg = config(LAYOUTS[layout], dtype=variant.split()[0], optimizer=ADAM)
    cfg.trainer.async_save = variant == IN_BACKGROUND
    if layout.startswith(ANY):
        cfg.trainer.checkpoint_format = "fully_reshardable"
    return cfg


def step(policy: Policy, seed: int) -> None:
    from hpt_mega.megatron.optimizer import set_learning_rate, zero_gradients
    from hpt_mega.megatron.step import update

    zero_gradients(policy.wrapped, policy.optimizer)
    policy.set_gradients(seed)
    set_learning_rate(policy.optimizer, ADAM.lr / (1 + seed))
    update(policy.optimizer)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def save(layouts: list[str], folders: Folders, states: Path) -> dict[str, Any]:
    """Two steps, save, one step more: the weights then, and the draws that follow the save."""
    from hpt_mega.megatron.state import begin_save

    found: dict[str, Any] = {}
    for variant, moves in VARIANTS.items():
        for layout in (name for name in layouts if any(name == source for source, _ in moves)):
            policy = policy_in(layout, variant, folders)
            step(policy, 0)
            step(policy, 1)
            random.seed(3 + policy.layout.rank)
            np.random.seed(4 + policy.layout.rank)
            torch.manual_seed(5 + policy.layout.rank)
            draws()
            target = states / f"{layout}-{variant}"
            target.mkdir(exist_ok=True)
            common = {"step": 2, "name": layout}
            writer = begin_save(target, policy.model, policy.optimizer, common, policy.layout, policy.cfg)
            if variant != IN_BACKGROUND:
                writer.write()
            saved = policy.weights()
            drawn = draws()
            step(policy, 2)
            if variant == IN_BACKGROUND:
                writer.write()
            writer.complete()
            found[f"{layout}-{variant}"] = {"saved": saved, "draws": drawn, "next": policy.weights()}
            leave_job()
    return found


def load(size: int, folders: Folders, states: Path) -> dict[str, Any]:
    """The same after loading into a model whose weights, optimizer and random numbers were others."""
    from hpt_mega.megatron.state import StateError, load_state

    found: dict[str, Any] = {}
    for source, target, variant in CASES:
        if LAYOUTS[target].world_size == size:
            policy = policy_in(target, variant, folders)
            if source != target:  # otherwise as in a new process, where the optimizer has no state yet
                step(policy, 7)
            place = states / f"{source}-{variant}"
            common = load_state(place, policy.model, policy.optimizer, policy.layout, policy.cfg)
            loaded = policy.weights()
            drawn = draws()
            step(policy, 2)
            found[f"{source}-{target}-{variant}"] = {
                "saved": loaded,
                "draws": drawn,
                "next": policy.weights(),
                "common": common,
            }
            leave_job()
    for source, target, _ in REFUSED:
        if LAYOUTS[target].world_size == size:
            policy = policy_in(target, "fp32 untied", folders)
            before = policy.weights()
            place = states / f"{source}-fp32 untied"
            with pytest.raises(StateError) as error:
                load_state(place, policy.model, policy.optimizer, policy.layout, policy.cfg)
            kept = all(torch.equal(before[name], tensor) for name, tensor in policy.weights().items())
            found[f"{source}-{target} refused"] = {"error": str(error.value), "kept": kept}
            leave_job()
    return found


Found = tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def saved_and_loaded(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folders = {
        "fp32 untied": save_llama(tmp_path_factory.mktemp("untied"), tied=False),
        "bf16 tied": save_llama(tmp_path_factory.mktemp("tied"), tied=True),
        "fp32 experts": save_mixture(tmp_path_factory.mktemp("experts")),
    }
    states = tmp_path_factory.mktemp("states")
    saved: dict[str, list[dict[str, Any]]] = {}
    loaded: dict[str, list[dict[str, Any]]] = {}
    for size in (1, 2):
        layouts = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        job = run_ranks(save, size, tmp_path_factory.mktemp("job"), layouts, folders, states)
        saved |= {key: [rank[key] for rank in job] for key in job[0]}
    for size in (1, 2):
        job = run_ranks(load, size, tmp_path_factory.mktemp("job"), size, folders, states)
        loaded |= {key: [rank[key] for rank in job] for key in job[0]}
    return saved, loaded


def whole(ranks: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """All stages' weights; where two ranks hold one, they agree."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor in rank[key].items():
            assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("source", "target", "variant"), CASES)
def test_a_loaded_state_has_the_saved_weights_and_takes_the_same_next_step(
    source: str, target: str, variant: str, saved_and_loaded: Found
) -> None:
    saved, loaded = saved_and_loaded
    before, after = saved[f"{source}-{variant}"], loaded[f"{source}-{target}-{variant}"]
    for key in ("saved", "next"):
        expected, found = whole(before, key), whole(after, key)
        assert set(found) == set(expected)
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, key
    assert not all(
        torch.equal(tensor, whole(before, "next")[name]) for name, tensor in whole(before, "saved").items()
    )
    for rank in after:
        assert rank["common"] == {"step": 2, "name": source}


@pytest.mark.parametrize(("source", "target", "expected"), REFUSED)
def test_a_state_that_the_layout_cannot_load_is_refused_with_the_saved_one_named(
    source: str, target: str, expected: str, saved_and_loaded: Found
) -> None:
    for rank in saved_and_loaded[1][f"{source}-{target} refused"]:
        assert expected in rank["error"]
        assert rank["kept"]


@pytest.mark.parametrize("layout", ["tp1", "pp2", "tp2", "dp2", "vpp3", "cp2"])
def test_random_numbers_go_on_on_every_rank(layout: str, saved_and_loaded: Found) -> None:
    saved, loaded = saved_and_loaded
    before, after = saved[f"{layout}-bf16 tied"], loaded[f"{layout}-{layout}-bf16 tied"]
    assert [rank["draws"] for rank in after] == [rank["draws"] for rank in before]
    assert len({tuple(rank["draws"]) for rank in before}) == len(before)


ALONE = ParallelConfig(1, 1, 1)
SHARDED = ParallelConfig(1, 1, 1, distributed_optimizer=True)
DENSE = ["embedding", "output_layer", "*layernorm", "*.self_attention", "*.router"]
ONE_EXPERT = ["decoder.layers.1.mlp.experts.local_experts.2"]
ODD = {  # layout, dtype, frozen, format
    "all steps were skipped": (ALONE, "fp16", [], "dp_reshardable"),
    "experts alone are trained": (ALONE, "fp32", DENSE, "dp_reshardable"),
    "experts alone, sharded": (SHARDED, "bf16", DENSE, "dp_reshardable"),
    "an expert is frozen": (ALONE, "fp32", ONE_EXPERT, "dp_reshardable"),
    "an expert is frozen, sharded": (SHARDED, "fp32", ONE_EXPERT, "fully_reshardable"),
}


def save_and_load_what_is_odd(folder: Path, states: Path) -> dict[str, bool]:
    """By case whether a loaded state's next step is that of the one that was saved."""
    from hpt_mega.megatron.optimizer import zero_gradients
    from hpt_mega.megatron.state import load_state
    from hpt_mega.megatron.step import update

    found = {}
    for name, (layout, dtype, frozen, form) in ODD.items():
        cfg = config(layout, dtype=dtype, optimizer=OptimizerConfig(lr=3e-3, clip_grad=0.0, frozen=frozen))
        cfg.trainer.checkpoint_format = form
        policy = build_policy(folder, cfg)
        if name == "all steps were skipped":
            zero_gradients(policy.wrapped, policy.optimizer)
            policy.entries()[0][1].main_grad.fill_(float("inf"))
            assert update(policy.optimizer) is None
        else:
            step(policy, 0)
        (states / name).mkdir()
        policy.save(states / name)
        before = policy.weights()
        step(policy, 1)
        expected = policy.weights()
        leave_job()
        policy = build_policy(folder, cfg)
        load_state(states / name, policy.model, policy.optimizer, policy.layout, cfg)
        step(policy, 1)
        after = policy.weights()
        moved = any(not torch.equal(before[key], tensor) for key, tensor in expected.items())
        found[name] = moved and all(torch.equal(after[key], tensor) for key, tensor in expected.items())
        leave_job()
    return found


def test_a_state_with_few_moments_or_none_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = save_mixture(tmp_path / "model")
    (found,) = run_ranks(save_and_load_what_is_odd, 1, tmp_path, folder, tmp_path)
    assert found == dict.fromkeys(ODD, True)


def save_and_load_a_critic(folder: Path, states: Path) -> dict[str, Any]:
    """Whether the critic begins with the policy's router bias; moments of both that differ after loading."""
    from hpt_mega.checkpoint.hf import HFCheckpoint
    from hpt_mega.checkpoint.weights import load_hf
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import build_model
    from hpt_mega.megatron.optimizer import zero_gradients
    from hpt_mega.megatron.step import update
    from hpt_mega.resharding.mapping import family_for
    from hpt_mega.worker import build_learner

    cfg = config(SHARDED)
    cfg.algorithm = AlgorithmConfig("ppo")
    layout, checkpoint = runtime.initialize(cfg), HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)

    def learner() -> Any:
        model = build_model(shape, cfg.parallel, layout, torch.float32)
        load_hf(model, checkpoint, family, shape, layout)
        return build_learner(cfg, layout, model, shape)

    def moments(optimizer: Any) -> list[Tensor]:
        parts = [part.optimizer.state for part in optimizer.chained_optimizers]
        return [state["exp_avg"].clone() for part in parts for state in part.values()]

    first = learner()
    policy, critic = first.policy, first.critic
    router = {name: b for name, b in policy.module.named_buffers() if name.endswith("expert_bias")}
    theirs = dict(critic.model.module.named_buffers())
    for seed, (model, optimizer) in enumerate(((policy, first.optimizer), (critic.model, critic.optimizer))):
        zero_gradients(model, optimizer)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        update(optimizer)
    writer = first.begin_save(states, {})
    writer.write()
    writer.complete()
    second = learner()
    second.load(states)
    pairs = [
        *zip(moments(first.optimizer), moments(second.optimizer), strict=True),
        *zip(moments(critic.optimizer), moments(second.critic.optimizer), strict=True),
    ]
    return {
        "biases": len(router),
        "same bias": all(bool(b.any()) and torch.equal(b, theirs[name]) for name, b in router.items()),
        "moments": len(pairs),
        "other moments": sum(not torch.equal(a, b) for a, b in pairs),
    }


def test_a_critic_has_the_router_s_bias_and_keeps_its_moments_apart_from_the_policy_s(
    tmp_path: Path,
) -> None:
    for name in ("model", "state"):
        (tmp_path / name).mkdir()
    save_model("deepseek_v3", tmp_path / "model")
    (found,) = run_ranks(save_and_load_a_critic, 1, tmp_path, tmp_path / "model", tmp_path / "state")
    assert found["biases"] > 0 and found["same bias"]
    assert found["moments"] > 20 and found["other moments"] == 0
