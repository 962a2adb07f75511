"""Frozen parameters keep their bits and groups step as torch's AdamW does, in every layout.

The gradients of the steps are given; those of a backward pass are compared with transformers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpt_mega.config import OptimizerConfig, ParallelConfig, ParameterGroup
from hpt_mega.megatron.groups import group_of, is_frozen, matches
from tests.megatron.test_layouts import LENGTH, TEMPERATURE, published_advantage, reference, trajectories
from tests.megatron.tiny import (
    VOCABULARY,
    build_policy,
    config,
    given_gradient,
    leave_job,
    load_llama,
    save_llama,
)
from tests.ranks import run_ranks

STEPS = 3
FIRST_STAGE = "decoder.layers.[012]"  # of two stages
ADAM = OptimizerConfig(
    lr=3e-3,
    weight_decay=0.1,
    clip_grad=2.5,
    frozen=["embedding", "decoder.layers.4.mlp"],
    groups=[
        ParameterGroup("decoder.layers.[01].mlp", lr_scale=0.5),
        ParameterGroup("*.linear_proj.weight", lr_scale=2.0, weight_decay=0.3),
        ParameterGroup("*layernorm*", weight_decay=0.02),
    ],
)
LAYOUTS = {
    "tp1": ParallelConfig(1, 1, 1),
    "recomputed": ParallelConfig(1, 1, 1, recompute="full"),
    "tp2": ParallelConfig(2, 1, 1, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2, 1),
    "vpp3": ParallelConfig(1, 2, 1, vpp=3),
    "dp2": ParallelConfig(1, 1, 2, distributed_optimizer=True),
    "frozen stage": ParallelConfig(1, 2, 1, distributed_optimizer=True),
}
CASES = [*((layout, "untied") for layout in LAYOUTS), ("pp2", "tied"), ("frozen stage", "tied")]


def adam_of(layout: str) -> OptimizerConfig:
    if layout != "frozen stage":
        return ADAM
    return OptimizerConfig(lr=3e-3, clip_grad=2.5, frozen=["embedding", FIRST_STAGE])


def megatron_name(name: str) -> str:
    """Of the matrices and norms of a Llama, by its Hugging Face name."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
            "lm_head.weight": "output_layer.weight",
        }[name]
    inside = {
        "q_proj": "self_attention.linear_qkv",
        "k_proj": "self_attention.linear_qkv",
        "v_proj": "self_attention.linear_qkv",
        "o_proj": "self_attention.linear_proj",
        "gate_proj": "mlp.linear_fc1",
        "up_proj": "mlp.linear_fc1",
        "down_proj": "mlp.linear_fc2",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
    }[parts[-2]]
    return f"decoder.layers.{parts[2]}.{inside}.weight"


def backward(policy: Any) -> None:
    """HPT's gradient on the trajectories of test_layouts, each replica's in two micro-batches."""
    from hpt_mega.data.packing import collate
    from hpt_mega.megatron.step import Objective, forward_backward
    from hpt_mega.objective import algorithm

    everything = trajectories()
    mine = list(range(policy.layout.dp_rank, len(everything), policy.layout.dp_size))
    microbatches = [
        collate(
            [everything[i] for i in part], [published_advantage(everything[i]) for i in part], row_multiple=2
        )
        for part in (mine[:3], mine[3:])
    ]
    estimator = algorithm("hpt", length=LENGTH)
    objective = Objective(estimator, float(LENGTH * len(everything)), TEMPERATURE, VOCABULARY)
    forward_backward(policy.wrapped, microbatches, objective, policy.layout)


def train(layouts: list[str], folders: dict[str, Path], states: Path) -> dict[str, Any]:
    """A backward pass; steps on given gradients; the last of them again, after loading what came before."""
    from hpt_mega.megatron.optimizer import set_learning_rate, zero_gradients
    from hpt_mega.megatron.state import StateError, load_state
    from hpt_mega.megatron.step import update

    found: dict[str, Any] = {}

    def step(policy: Any, number: int) -> float | None:
        zero_gradients(policy.wrapped, policy.optimizer)
        policy.set_gradients(number)
        set_learning_rate(policy.optimizer, ADAM.lr / (number + 1))
        return update(policy.optimizer)

    for layout, variant in CASES:
        if layout in layouts:
            cfg = config(LAYOUTS[layout], optimizer=adam_of(layout))
            policy = build_policy(folders[variant], cfg)
            zero_gradients(policy.wrapped, policy.optimizer)
            backward(policy)
            here: dict[str, Any] = {"gradients": policy.gradients()}
            norms = [step(policy, number) for number in range(STEPS - 1)]
            place = states / f"{layout}-{variant}"
            place.mkdir(exist_ok=True)
            policy.save(place)
            here["norms"] = [*norms, step(policy, STEPS - 1)]
            here["weights"] = policy.weights()
            load_state(place, policy.model, policy.optimizer, policy.layout, cfg)
            step(policy, STEPS - 1)
            here["resumed"] = policy.weights()
            other = config(LAYOUTS[layout], optimizer=OptimizerConfig())
            with pytest.raises(StateError) as refused:
                load_state(place, policy.model, policy.optimizer, policy.layout, other)
            here["refused"] = str(refused.value)
            found[f"{layout}-{variant}"] = here
            leave_job()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_llama(tmp_path_factory.mktemp(name), tied=name == "tied") for name in ("untied", "tied")
    }


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for size in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        states = tmp_path_factory.mktemp("states")
        job = run_ranks(train, size, tmp_path_factory.mktemp("job"), names, folders, states)
        found |= {key: [rank[key] for rank in job] for key in job[0]}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_steps_are_those_of_torch_adamw_with_the_settings_of_each_group(
    layout: str, variant: str, trained: dict[str, list[Any]], folders: dict[str, Path]
) -> None:
    cfg = adam_of(layout)
    model = load_llama(folders[variant])
    named = {n: p for n, p in model.named_parameters() if not is_frozen(megatron_name(n), cfg.frozen)}
    adam = torch.optim.AdamW(
        [{"params": [p], "weight_decay": settings(n, p, cfg)[1]} for n, p in named.items()],
        betas=(cfg.beta1, cfg.beta2),
    )
    norms = []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = given_gradient(name, parameter.shape, step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), cfg.clip_grad)))
        for group, (name, parameter) in zip(adam.param_groups, named.items(), strict=True):
            group["lr"] = cfg.lr / (step + 1) * settings(name, parameter, cfg)[0]
        adam.step()
    ranks = trained[f"{layout}-{variant}"]
    weights = {name: weight for rank in ranks for name, weight in rank["weights"].items()}
    largest = max(float((weights[name] - p.detach()).abs().max()) for name, p in named.items())
    print(f"{layout} {variant}: largest weight difference {largest:.1e}")
    assert largest < 1e-6
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


def settings(name: str, parameter: torch.Tensor, cfg: OptimizerConfig) -> tuple[float, float]:
    """(times the learning rate, weight decay), said apart from the product's patterns."""
    if cfg.groups and name.startswith(("model.layers.0.mlp", "model.layers.1.mlp")):
        return 0.5, cfg.weight_decay
    if cfg.groups and "o_proj" in name:
        return 2.0, 0.3
    if parameter.dim() == 1:
        return 1.0, 0.02 if cfg.groups else 0.0
    return 1.0, cfg.weight_decay


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_a_frozen_parameter_keeps_its_bits_and_everything_else_moves(
    layout: str, variant: str, trained: dict[str, list[Any]], folders: dict[str, Path]
) -> None:
    before = dict(load_llama(folders[variant]).named_parameters())
    frozen = adam_of(layout).frozen
    for rank in trained[f"{layout}-{variant}"]:
        for name, weight in rank["weights"].items():
            same = torch.equal(weight, before[name])
            assert same == is_frozen(megatron_name(name), frozen), name


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_the_trained_parameters_have_the_gradient_of_transformers(
    layout: str, variant: str, trained: dict[str, list[Any]], folders: dict[str, Path]
) -> None:
    expected = reference(folders[variant])
    frozen = adam_of(layout).frozen
    ranks = trained[f"{layout}-{variant}"]
    found = [(name, gradient) for rank in ranks for name, gradient in rank["gradients"].items()]
    names = {name for name in expected.gradients if not is_frozen(megatron_name(name), frozen)}
    assert {name for name, _ in found} == names
    for name, gradient in found:
        assert float((gradient - expected.gradients[name]).abs().max()) < 1e-5 * expected.largest, name


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_a_resumed_step_is_the_same_and_other_groups_are_refused(
    layout: str, variant: str, trained: dict[str, list[Any]]
) -> None:
    for rank in trained[f"{layout}-{variant}"]:
        assert all(torch.equal(weight, rank["resumed"][name]) for name, weight in rank["weights"].items())
        assert "was written with optimizer.frozen=['embedding', 'decoder.layers." in rank["refused"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("embedding", "embedding.word_embeddings.weight", True),
        ("decoder.layers.1", "decoder.layers.1.mlp.linear_fc1.weight", True),
        ("decoder.layers.1", "decoder.layers.11.mlp.linear_fc1.weight", False),
        ("decoder.layers.?", "decoder.layers.11.mlp.linear_fc1.weight", False),
        ("*.mlp", "decoder.layers.11.mlp.linear_fc1.weight", True),
        ("*.linear_fc1.weight", "decoder.layers.11.mlp.linear_fc1.weight", True),
        ("mlp", "decoder.layers.11.mlp.linear_fc1.weight", False),
        ("Embedding", "embedding.word_embeddings.weight", False),
    ],
)
def test_a_pattern_means_a_parameter_or_a_module_above_it(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected
    assert is_frozen(name, ["other", pattern]) is expected
    assert (group_of(name, [ParameterGroup("other"), ParameterGroup(pattern)]) is not None) is expected
