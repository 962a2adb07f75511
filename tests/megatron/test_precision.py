"""FP8 layers: gradients, delayed scaling's history, tensor parallelism, recompute, checkpoints, learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hpt_mega.config import Config, Fp8Config, OptimizerConfig, ParallelConfig, PrecisionConfig
from tests.ranks import run_ranks

LAYERS, VOCABULARY, WIDTH = 3, 61, 128
RECIPES = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}

pytestmark = pytest.mark.timeout(300)


def save_llama(folder: Path) -> Path:
    """Widths that two tensor-parallel ranks can split into whole blocks of 128."""
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=256,
            max_position_embeddings=64,
            initializer_range=0.08,
            dtype="float32",
        )
    ).save_pretrained(folder)
    return folder


def config(fp8: Fp8Config, parallel: ParallelConfig | None = None, dtype: str = "fp32") -> Config:
    return Config(
        parallel=parallel or ParallelConfig(1, 1, 1),
        precision=PrecisionConfig(dtype, fp8=fp8),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=0, schedule="constant"),
    )


def build(folder: Path, cfg: Config) -> Any:
    from hpt_mega.checkpoint.hf import HFCheckpoint
    from hpt_mega.checkpoint.weights import load_hf
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import DTYPES, build_model
    from hpt_mega.resharding.mapping import family_for
    from hpt_mega.worker import build_learner

    layout = runtime.initialize(cfg)
    checkpoint = HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    model = build_model(shape, cfg.parallel, layout, DTYPES[cfg.precision.dtype], fp8=cfg.precision.fp8)
    load_hf(model, checkpoint, family, shape, layout)
    sft = dataclasses.replace(cfg, algorithm=dataclasses.replace(cfg.algorithm, name="sft"))
    return build_learner(sft, layout, model, shape)


def batch(step: int, count: int = 6) -> list[Any]:
    """Sequences in which a token follows from the one before it."""
    from hpt_mega.trajectory import Source, Trajectory

    generator = torch.Generator().manual_seed(step)
    made = []
    for group in range(count):
        tokens = torch.randint(0, VOCABULARY, (1,), generator=generator).tolist()
        while len(tokens) < 9 + group:
            tokens.append((7 * tokens[-1] + 3 + int(torch.rand((), generator=generator) < 0.2)) % VOCABULARY)
        made.append(Trajectory(tuple(tokens[:2]), tuple(tokens[2:]), group, Source.OFFLINE, 0))
    return made


def products(learner: Any) -> list[Any]:
    modules = learner.policy.module.decoder.modules()
    return [m._forward_impl for m in modules if "_forward_impl" in vars(m)]


def scales(learner: Any) -> dict[str, Tensor]:
    history = products(learner)[0].history
    return {role: scale.clone() for role, scale in history.scale.items()}


def nll(learner: Any, step: int = 1000) -> float:
    """Mean negative log-likelihood of a batch that is not trained on."""
    unseen = batch(step, 16)
    found = learner._per_token(unseen, learner._logp_under(learner.policy.module))
    return -sum(map(sum, found)) / sum(map(len, found))


def leave() -> None:
    from tests.megatron.tiny import leave_job

    leave_job()


def one_rank(folder: Path, states: Path) -> dict[str, Any]:
    """All that one process can find, in one job."""
    return {function.__name__: function(folder, states) for function in FOUND_BY_ONE_RANK}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    states = tmp_path_factory.mktemp("states")
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    one: dict[str, Any] = run_ranks(one_rank, 1, tmp_path_factory.mktemp("job"), folder, states)[0]
    two = run_ranks(split_in_two, 2, tmp_path_factory.mktemp("job"), folder)
    return one | {"split_in_two": two}


def wide(*shape: int) -> Tensor:
    """So many binades that small numbers vanish beside large ones: with scales that are powers of two, FP8
    rounds alike in any block until then."""
    return torch.randn(shape) * torch.exp(4 * torch.randn(shape))


def gradients(folder: Path, _: Path) -> dict[str, Any]:
    """Of one layer, by each recipe, beside those of the products of its quantised operands."""
    from hpt_mega.megatron.fp8 import Scaling

    found = {}
    for recipe, number_format in RECIPES.items():
        if recipe == "delayed":
            continue
        learner = build(folder, config(Fp8Config(recipe, number_format)))
        linear = learner.policy.module.decoder.layers[1].mlp.linear_fc2
        torch.manual_seed(1)
        x = wide(7, 5, 256).requires_grad_()
        grad = wide(7, 5, WIDTH)
        weight = linear.weight
        alone = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}
        out = linear._forward_impl(x, weight, bias=None, **alone)
        bias = 1e3 * torch.arange(WIDTH)
        assert torch.equal(linear._forward_impl(x, weight, bias=bias, **alone), out + bias)
        dx, dw = torch.autograd.grad(out, (x, weight), grad)
        scaling = Scaling(recipe, number_format)

        def read(t: Tensor, role: Any, contracted: int, scaling: Scaling = scaling) -> Tensor:
            operand = scaling.quantise(t.detach().reshape(-1, t.shape[-1]), role, contracted)
            return operand.values.double() * operand.scale

        found[recipe] = {
            "out": (out.detach(), read(x, "input", 1) @ read(weight, "weight", 1).t()),
            "dx": (dx, read(grad, "gradient", 1) @ read(weight, "weight", 0)),
            "dw": (dw, read(grad, "gradient", 0).t() @ read(x, "input", 0)),
            "exact dw": (dw, grad.reshape(-1, WIDTH).t() @ x.detach().reshape(-1, 256)),
        }
        leave()
    return found


def test_each_product_quantises_along_the_dimension_it_sums_over(found: dict[str, Any]) -> None:
    for parts in found["gradients"].values():
        for name, (ours, expected) in parts.items():
            flat = ours.reshape(expected.shape).double()
            error = float((flat - expected).norm() / expected.norm())
            assert (0.01 < error < 0.08) if name == "exact dw" else error < 1e-6, name


def quantised_layers(folder: Path, _: Path) -> list[list[str]]:
    """Names of the modules that compute in FP8: one layer kept at the start, one at the end; none kept."""
    found = []
    for fp8 in (Fp8Config("blockwise", first_layers=1, last_layers=1), Fp8Config("mxfp8")):
        learner = build(folder, config(fp8))
        modules = learner.policy.module.named_modules()
        found.append([name for name, module in modules if "_forward_impl" in vars(module)])
        leave()
    return found


def test_kept_layers_and_all_outside_the_layers_stay_in_high_precision(found: dict[str, Any]) -> None:
    kept, every = found["quantised_layers"]
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert sorted(kept) == sorted(f"decoder.layers.1.{name}" for name in linears)
    assert sorted(every) == sorted(f"decoder.layers.{i}.{name}" for i in range(LAYERS) for name in linears)


HISTORIES = [(4, "max", 0), (1, "max", 1), (4, "most_recent", 0)]  # length, algorithm, margin


def written_out_history(length: int, algorithm: str, margin: int, amaxes: list[float]) -> list[float]:
    """Transformer Engine's rule for one tensor: the scales after each micro-batch."""
    seen: list[float] = []
    found, scale = [], 1.0
    for amax in amaxes:
        window = [amax, *seen[-(length - 1) :]] if length > 1 else [amax]
        chosen = max(window) if algorithm == "max" else amax
        if amax:
            seen.append(amax)
        if 0 < chosen < float("inf"):
            scale = 448 / 2**margin / chosen
        found.append(scale)
    return found


@pytest.mark.parametrize("case", HISTORIES)
def test_a_scale_follows_from_the_history_as_in_transformer_engine(
    case: tuple[int, str, int], found: dict[str, Any]
) -> None:
    expected = written_out_history(*case, AMAXES)
    torch.testing.assert_close(torch.tensor(found["histories"][case]), torch.tensor(expected))


AMAXES = [3.0, 0.5, 7.0, 0.0, 1.0, 2.0, 0.25, float("inf"), 0.125, 4.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]


def histories(_: Path, __: Path) -> dict[tuple[int, str, int], list[float]]:
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.precision import AmaxHistory

    runtime.initialize(config(Fp8Config()))
    found = {}
    for length, algorithm, margin in HISTORIES:
        fp8 = Fp8Config("delayed", "hybrid", margin=margin, amax_history=length, amax_algorithm=algorithm)
        history = AmaxHistory(fp8, 2)
        scales = []
        for amax in AMAXES:
            history.record("input", 1, torch.tensor([-amax, amax / 2]))
            history.update("input", "weight")
            scales.append(float(history.scale["input"][1]))
        assert history.scale["weight"].tolist() == [1.0, 1.0]
        found[length, algorithm, margin] = scales
    leave()
    return found


def some_steps(folder: Path, fp8: Fp8Config, parallel: ParallelConfig) -> dict[str, Any]:
    """Three steps; the scales are those after the first: later ones make much of the last bits of a sum."""
    learner = build(folder, config(fp8, parallel))
    learner.learn(batch(0), 0)
    first = scales(learner) if fp8.recipe == "delayed" else {}
    for step in (1, 2):
        learner.learn(batch(step), step)
    found = {"nll": nll(learner), "scales": first}
    leave()
    return found


def unsplit(folder: Path, _: Path) -> dict[str, Any]:
    return {
        recipe: some_steps(folder, Fp8Config(recipe, RECIPES[recipe]), ParallelConfig(1, 1, 1))
        for recipe in ("delayed", "blockwise")
    }


def split_in_two(folder: Path) -> dict[str, Any]:
    return {
        f"{recipe} {sequence_parallel}": some_steps(
            folder, Fp8Config(recipe, RECIPES[recipe]), ParallelConfig(2, 1, 1, sequence_parallel)
        )
        for recipe in ("delayed", "blockwise")
        for sequence_parallel in (False, True)
    }


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_learn_as_one(
    recipe: str, sequence_parallel: bool, found: dict[str, Any]
) -> None:
    one = found["unsplit"][recipe]
    two = [rank[f"{recipe} {sequence_parallel}"] for rank in found["split_in_two"]]
    assert two[0]["nll"] == pytest.approx(one["nll"], rel=2e-3)
    for role, scale in two[0]["scales"].items():
        assert torch.equal(scale, two[1]["scales"][role])  # the amax is taken over both ranks
        torch.testing.assert_close(scale, one["scales"][role], rtol=1e-3, atol=0)


def resumed(folder: Path, states: Path) -> dict[str, float]:
    """A checkpoint after two steps, two more; the same two after loading into a fresh learner."""
    fp8 = Fp8Config("delayed", "hybrid", amax_history=5)
    learner = build(folder, config(fp8))
    for step in range(2):
        learner.learn(batch(step), step)
    writer = learner.begin_save(states, {"step": 2})
    writer.write()
    writer.complete()
    found = {"straight": two_more(learner)}
    leave()
    for case in ("loaded", "forgot"):
        learner = build(folder, config(fp8))
        learner.load(states)
        if case == "forgot":  # as a checkpoint without the history would
            for scale in products(learner)[0].history.scale.values():
                scale.fill_(1.0)
        found[case] = two_more(learner)
        leave()
    return found


def two_more(learner: Any) -> float:
    for step in (2, 3):
        learner.learn(batch(step), step)
    return nll(learner)


def test_a_run_of_delayed_scaling_goes_on_with_the_same_numbers(found: dict[str, Any]) -> None:
    resumed = found["resumed"]
    assert resumed["loaded"] == resumed["straight"]
    assert resumed["forgot"] != resumed["straight"]


def recomputed(folder: Path, _: Path) -> list[list[float]]:
    found = []
    for recompute in (False, True):
        learner = build(folder, config(Fp8Config("delayed", "hybrid")))
        if recompute:
            for name, value in (("granularity", "full"), ("method", "uniform"), ("num_layers", 1)):
                setattr(learner.policy.module.config, f"recompute_{name}", value)
        found.append([float(learner.learn(batch(step), step)["grad_norm"]) for step in range(3)])
        leave()
    return found


def test_recomputed_activations_take_the_scales_of_the_first_forward(found: dict[str, Any]) -> None:
    plain, recomputing = found["recomputed"]
    assert recomputing == plain


def decoded(folder: Path, _: Path) -> dict[str, Any]:
    """Hidden states in training and in rollouts' mode, before and after an update."""
    learner = build(folder, config(Fp8Config("blockwise")))
    model = learner.policy.module
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]

    def hidden() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            trained = model(tokens, positions, None)
            with model.inference():
                return trained, model(tokens, positions, None)

    before = hidden()
    learner.learn(batch(0), 0)
    found = {"before": before, "after": hidden()}
    leave()
    return found


def test_rollouts_see_the_quantised_weights_of_now(found: dict[str, Any]) -> None:
    hidden = found["decoded"]
    for trained, served in hidden.values():
        assert torch.equal(trained, served)
    assert not torch.equal(hidden["before"][1], hidden["after"][1])


def learned(folder: Path, _: Path) -> dict[str, float]:
    """Likelihood after 40 steps in bf16 and in each recipe, and before the first."""
    found = {}
    for recipe in ("", *RECIPES):
        fp8 = Fp8Config(recipe, RECIPES[recipe]) if recipe else Fp8Config()
        learner = build(folder, config(fp8, dtype="bf16"))
        found.setdefault("before", nll(learner))
        for step in range(40):
            learner.learn(batch(step), step)
        found[recipe] = nll(learner)
        leave()
    return found


def test_a_run_in_each_recipe_learns_as_one_in_bf16(found: dict[str, Any]) -> None:
    final = found["learned"]
    assert final[""] < 0.7 * final["before"]
    for recipe in RECIPES:
        assert final[recipe] == pytest.approx(final[""], rel=0.05), recipe
        assert final[recipe] != final[""]


FOUND_BY_ONE_RANK: tuple[Callable[[Path, Path], Any], ...] = (
    *(gradients, quantised_layers, histories, unsplit, resumed, recomputed, decoded, learned),
)


def test_the_state_of_grouped_products_without_scales_is_the_same_for_each() -> None:
    from hpt_mega.megatron import precision

    class Grouped:
        num_gemms = 3

        def _split_extra_state(self, state: Tensor) -> list[Tensor]:
            return list(state)

    for _ in range(2):
        precision.tolerate_empty_state(Grouped)
    assert [len(part) for part in Grouped()._split_extra_state(torch.empty(0))] == [0, 0, 0]
    assert Grouped()._split_extra_state(torch.tensor([4, 5])) == [4, 5]
