"""The gradient of HPT's objective is that of transformers by autograd, in every layout and every split.

The reference is the paper's formula written out over one forward of each sequence alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hpt_mega.config import ParallelConfig
from hpt_mega.trajectory import Source, Trajectory
from tests.megatron.tiny import (
    VOCABULARY,
    Policy,
    build_policy,
    config,
    leave_job,
    load_llama,
    load_mixture,
    named_gradients,
    save_llama,
    save_mixture,
)
from tests.ranks import run_ranks

LENGTH = 9  # Dr.GRPO's constant
TEMPERATURE = 0.8
GROUPS = (  # (prompt length, alpha, beta, [(response length, reward)], demonstration length)
    (5, 0.7, 0.0, [(4, 1.0), (9, 0.0), (1, 0.0)], 0),
    (11, 1.0, 0.4, [(7, 0.25), (3, 1.0), (6, 0.0)], 8),
    (3, 0.3, 1.0, [(2, 1.0), (5, 0.0), (8, 1.0)], 6),
    (7, 0.0, 0.9, [], 4),
)


pytestmark = pytest.mark.timeout(600)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout, and how the step's trajectories are split over replicas and micro-batches."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    tied: bool = False
    budget: int = 40
    inert: int = 0  # micro-batches without a sequence
    uneven: bool = False  # the first replica gets all but one of the trajectories, the second that one
    dtype: str = "fp32"
    cp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    recompute: str = "none"
    overlap: bool = False
    stage_layers: tuple[int, ...] = ()
    experts: bool = False  # Qwen3-MoE in place of Llama
    fused_rotation: bool = False  # as on a GPU, TE's kernel written out

    @property
    def parallel(self) -> ParallelConfig:
        names = [field.name for field in dataclasses.fields(ParallelConfig) if hasattr(self, field.name)]
        given = {name: getattr(self, name) for name in names}
        return ParallelConfig(**given | {"stage_layers": list(self.stage_layers)})

    @property
    def model(self) -> str:
        return "experts" if self.experts else "tied" if self.tied else "untied"

    def __str__(self) -> str:
        flags = ("sequence_parallel", "distributed_optimizer", "overlap", "uneven", "fused_rotation")
        sizes = (
            f"{self.model}-tp{self.tp}cp{self.cp}pp{self.pp}vpp{self.vpp}ep{self.ep}etp{self.etp}dp{self.dp}"
        )
        words = [sizes, *(name for name in flags if getattr(self, name))]
        if self.recompute != "none":
            words.append(self.recompute)
        words += [f"layers{'_'.join(map(str, self.stage_layers))}"] if self.stage_layers else []
        return "-".join([*words, f"budget{self.budget}", f"inert{self.inert}", self.dtype])

    def share(self, items: Sequence[Any], rank: int) -> list[Any]:
        if self.uneven:
            return list([items[:-1], items[-1:], [], []][rank])
        return list(items[rank :: self.dp])


LAYOUTS = [
    Case(),
    Case(tied=True),
    Case(tp=2),
    Case(tp=2, tied=True),
    Case(tp=2, sequence_parallel=True),
    Case(tp=2, sequence_parallel=True, tied=True),
    Case(pp=2),
    Case(pp=2, tied=True),
    Case(cp=2),
    Case(cp=2, tied=True),
    Case(tp=2, cp=2, sequence_parallel=True),
    Case(cp=2, pp=2, tied=True),
    Case(cp=2, dp=2, distributed_optimizer=True),
    Case(dp=2),
    Case(dp=2, distributed_optimizer=True),
    Case(dp=2, distributed_optimizer=True, tied=True),
    Case(dp=4),
    Case(dp=4, distributed_optimizer=True, tied=True),
    Case(tp=3),
    Case(pp=3),
    Case(pp=3, tied=True),
    Case(tp=2, pp=2, tied=True),
    Case(tp=2, pp=2, sequence_parallel=True),
    Case(pp=2, vpp=3),
    Case(pp=2, vpp=2, tied=True, budget=25),  # 1, 2, 2 and 1 layers
    Case(pp=2, stage_layers=(4, 2), tied=True),
    Case(pp=4),  # 1, 2, 2 and 1 layers
    Case(tp=2, sequence_parallel=True, recompute="full"),
    Case(pp=2, tied=True, recompute="selective"),
    Case(cp=2, recompute="selective"),
    Case(dp=2, overlap=True, tied=True),
    Case(dp=2, pp=2, overlap=True, distributed_optimizer=True, recompute="full"),
    Case(fused_rotation=True, tied=True),
    Case(fused_rotation=True, tp=2, cp=2, sequence_parallel=True),
    Case(fused_rotation=True, pp=2, vpp=3, recompute="full"),
    Case(experts=True),
    Case(experts=True, dp=2, ep=2),
    Case(experts=True, dp=2, ep=2, distributed_optimizer=True, recompute="full"),
    Case(experts=True, tp=2, ep=2, sequence_parallel=True),
    Case(experts=True, tp=2, sequence_parallel=True),
    Case(experts=True, cp=2, ep=2),
    Case(experts=True, pp=2, vpp=2),
    Case(experts=True, dp=4, ep=2, distributed_optimizer=True),
    Case(experts=True, tp=2, dp=2, ep=4, sequence_parallel=True),
    Case(experts=True, pp=2, dp=2, ep=2),
    Case(experts=True, tp=2, etp=2, sequence_parallel=True),
    Case(experts=True, dp=2, etp=2),
    Case(experts=True, tp=2, dp=2, ep=2, etp=2, sequence_parallel=True, distributed_optimizer=True),
]
SPLITS = [
    Case(budget=1),
    Case(budget=1000),
    Case(budget=61, inert=2),
    Case(pp=2, budget=1000),
    Case(pp=2, budget=25, inert=1),
    Case(tp=2, sequence_parallel=True, budget=19, inert=2),
    Case(dp=2, uneven=True, inert=1),
    Case(dp=2, uneven=True, distributed_optimizer=True, budget=23),
    Case(dp=4, uneven=True, budget=1000),  # two replicas without any trajectory
    Case(pp=3, budget=1000),  # fewer micro-batches than stages
]
ROUNDED = [Case(dtype="bf16", tied=True), Case(tp=2, dtype="bf16"), Case(pp=2, dtype="bf16", tied=True)]
CASES = [*LAYOUTS, *SPLITS, *ROUNDED]


def trajectories() -> list[Trajectory]:
    """Rollouts and demonstrations of four questions, in an order that mixes them."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())

    made = []
    for group, (prompt_length, alpha, beta, rollouts, demonstration) in enumerate(GROUPS):
        prompt = tokens(prompt_length)
        for length, reward in rollouts:
            logp = tuple((-3 - torch.rand(length, generator=generator)).tolist())
            made.append(
                Trajectory(prompt, tokens(length), group, Source.ONLINE, 0, logp, reward, weight=alpha)
            )
        if demonstration:
            made.append(Trajectory(prompt, tokens(demonstration), group, Source.OFFLINE, 0, weight=beta))
    return made[::2] + made[1::2]


def published_advantage(trajectory: Trajectory) -> float:
    """R - mean of the group's rollouts, or 1 for a demonstration."""
    if trajectory.source is Source.OFFLINE:
        return 1.0
    rewards = [reward for _, reward in GROUPS[trajectory.group][3]]
    return trajectory.reward - sum(rewards) / len(rewards)


@dataclasses.dataclass
class Reference:
    gradients: dict[str, Tensor]
    loss: float
    logp_gap: float
    entropy: float

    @property
    def largest(self) -> float:
        return max(float(g.abs().max()) for g in self.gradients.values())

    @property
    def norm(self) -> float:
        return float(sum(g.double().square().sum() for g in self.gradients.values())) ** 0.5


def reference(folder: Path, *, experts: bool = False) -> Reference:
    model: Any = load_mixture(folder) if experts else load_llama(folder)
    total = loss = gap = entropy = 0.0
    everything = trajectories()
    for t in everything:
        ids = torch.tensor([t.prompt_tokens + t.response_tokens])
        logits_TV = model(ids).logits[0, len(t.prompt_tokens) - 1 : -1] / TEMPERATURE
        logp_TV = torch.log_softmax(logits_TV, -1)
        logp_T = logp_TV[range(len(t.response_tokens)), list(t.response_tokens)]
        weight = t.weight * published_advantage(t) / (LENGTH * len(everything))
        total = total - weight * logp_T.sum()
        loss -= weight * len(t.response_tokens)  # the surrogate is at ratio 1 in every token
        entropy -= float((logp_TV.exp() * logp_TV).detach().sum())
        if t.source is Source.ONLINE:
            gap += float((logp_T.detach() - torch.tensor(t.rollout_logp)).abs().sum())
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    return Reference(named_gradients(model), loss, gap, entropy)


def megatron_gradients(cases: Sequence[Case], folders: dict[str, Path]) -> dict[str, Any]:
    """For every case: this rank's gradients by HF name, metrics, and the norm before clipping."""
    from megatron.core.models.common.embeddings import rope_utils

    from hpt_mega.data.balancing import plan_microbatches
    from hpt_mega.data.packing import collate, round_up
    from hpt_mega.megatron.optimizer import zero_gradients
    from hpt_mega.megatron.step import Objective, forward_backward, update
    from hpt_mega.objective import algorithm

    rope_utils.fused_apply_rotary_pos_emb_thd = fused = mock.Mock(side_effect=rotated)
    results = {}
    for case in cases:
        policy = build_policy(folders[case.model], config(case.parallel, dtype=case.dtype))
        policy.model.config.apply_rope_fusion = case.fused_rotation
        fused.reset_mock()
        estimator = algorithm("hpt", length=LENGTH)
        everything = trajectories()
        advantages = estimator.advantages(
            torch.tensor([t.reward for t in everything]),
            torch.tensor([t.group for t in everything]),
            torch.tensor([int(t.source) for t in everything]),
        ).tolist()
        mine = case.share(list(zip(everything, advantages, strict=True)), policy.layout.dp_rank)
        segment = 2 * case.cp if case.cp > 1 else 1
        row = math.lcm(segment, case.cp * case.tp if case.sequence_parallel else 1)
        shares = [case.share(everything, rank) for rank in range(case.dp)]
        plans = [
            plan_microbatches([round_up(len(t), segment) for t in share], case.budget)[0] for share in shares
        ]
        plan = plans[policy.layout.dp_rank]
        most = round_up(max(map(len, plans)) + case.inert, case.pp if case.vpp > 1 else 1)
        plan += [[] for _ in range(most - len(plan))]
        microbatches = [
            collate(
                [mine[i][0] for i in part],
                [mine[i][1] for i in part],
                segment_multiple=segment,
                row_multiple=row,
            )
            for part in plan
        ]
        calls = count_calls(policy)
        zero_gradients(policy.wrapped, policy.optimizer)
        objective = Objective(estimator, float(LENGTH * len(everything)), TEMPERATURE, VOCABULARY)
        metrics = forward_backward(policy.wrapped, microbatches, objective, policy.layout)
        norm = update(policy.optimizer) if not case.distributed_optimizer else None
        results[str(case)] = {"metrics": metrics, "norm": norm, "plan": [len(part) for part in plan]}
        results[str(case)]["calls"] = {name: count / len(plan) for name, count in calls.items()}
        results[str(case)]["fused_rotation"] = fused.called
        results[str(case)]["overlaps"] = policy.wrapped.ddp_config.overlap_grad_reduce
        # clipping scales main_grad in place: undo it
        gradients = policy.gradients()
        if norm is None:
            results[str(case)]["norm"] = update(policy.optimizer)
        else:
            scale = min(1.0, policy.cfg.optimizer.clip_grad / (norm + 1e-6))
            gradients = {name: g / scale for name, g in gradients.items()}
        results[str(case)]["gradients"] = gradients
        leave_job()
    return results


def rotated(
    heads_SND: Tensor, cu_seqlens: Tensor, angles_L11D: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """TE's fused_apply_rotary_pos_emb_thd as its kernel computes it: places are counted from the segment's
    start; a context-parallel rank holds chunks rank and 2 * size - 1 - rank of 2 * size."""
    assert cu_seqlens.dtype is torch.int32 and angles_L11D.shape[1:3] == (1, 1)
    places = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        segment = torch.arange(end - begin)
        if cp_size > 1:
            chunks = segment.chunk(2 * cp_size)
            segment = torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]))
        places.append(segment)
    angles_S1D = angles_L11D[torch.cat(places), 0]
    first, second = heads_SND.chunk(2, dim=-1)
    return heads_SND * angles_S1D.cos() + torch.cat((-second, first), dim=-1) * angles_S1D.sin()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "untied": save_llama(tmp_path_factory.mktemp("untied"), tied=False),
        "tied": save_llama(tmp_path_factory.mktemp("tied"), tied=True),
        "experts": save_mixture(tmp_path_factory.mktemp("experts")),
    }


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {name: reference(folder, experts=name == "experts") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def ranks_of(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], list[dict[str, Any]]]:
    """What every rank found for a case; all cases of one world size run in one job."""
    jobs: dict[int, list[dict[str, Any]]] = {}

    def find(case: Case) -> list[dict[str, Any]]:
        size = case.parallel.world_size
        if size not in jobs:
            cases = [c for c in CASES if c.parallel.world_size == size]
            jobs[size] = run_ranks(megatron_gradients, size, tmp_path_factory.mktemp("job"), cases, folders)
        return [rank[str(case)] for rank in jobs[size]]

    return find


def count_calls(policy: Policy) -> Counter[str]:
    """How often a layer and its attention are computed from now on."""
    calls = Counter[str]()
    layer = policy.model.decoder.layers[0]
    layer.register_forward_hook(lambda *_: calls.update(["layer"]))
    layer.self_attention.core_attention.register_forward_hook(lambda *_: calls.update(["attention"]))
    return calls


def largest_difference(ranks: list[dict[str, Any]], expected: Reference) -> float:
    """Over all ranks and parameters; every parameter must be found somewhere."""
    found = [(name, g) for rank in ranks for name, g in rank["gradients"].items()]
    assert {name for name, _ in found} == set(expected.gradients)
    return max(float((g - expected.gradients[name]).abs().max()) for name, g in found)


def check(case: Case, ranks: list[dict[str, Any]], expected: Reference) -> None:
    difference = largest_difference(ranks, expected)
    print(f"{case}: largest gradient difference {difference:.1e} of {expected.largest:.3f}")
    assert difference < 1e-5 * expected.largest
    for rank in ranks:
        metrics = rank["metrics"]
        assert metrics["sum/loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert metrics["sum/logp_gap"] == pytest.approx(expected.logp_gap, rel=1e-5)
        assert metrics["sum/entropy"] == pytest.approx(expected.entropy, rel=1e-5)
        assert metrics["sum/tokens"] == sum(len(t.response_tokens) for t in trajectories())
        assert rank["norm"] == pytest.approx(expected.norm, rel=1e-5)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_loss_gradient_and_its_norm_are_those_of_transformers_in_every_layout(
    case: Case, ranks_of: Any, references: dict[str, Reference]
) -> None:
    check(case, ranks_of(case), references[case.model])


TWICE = {"none": (), "selective": ("attention",), "full": ("layer", "attention")}


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layers_recompute_rotate_and_overlap_as_asked(case: Case, ranks_of: Any) -> None:
    for rank in ranks_of(case):
        assert rank["calls"] == {part: 2 if part in TWICE[case.recompute] else 1 for part in TWICE["full"]}
        assert rank["overlaps"] == case.overlap
        assert rank["fused_rotation"] == case.fused_rotation


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_gradient_does_not_depend_on_microbatch_split_nor_on_who_has_which_sequence(
    case: Case, ranks_of: Any, references: dict[str, Reference]
) -> None:
    ranks = ranks_of(case)
    assert all(rank["plan"].count(0) >= case.inert for rank in ranks)
    check(case, ranks, references[case.model])


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bf16_gradient_is_within_a_few_percent_of_fp32(
    case: Case, ranks_of: Any, references: dict[str, Reference]
) -> None:
    expected = references[case.model]
    for rank in ranks_of(case):
        names = rank["gradients"]
        error = sum(float((g - expected.gradients[name]).square().sum()) for name, g in names.items()) ** 0.5
        whole = sum(float(expected.gradients[name].square().sum()) for name in names) ** 0.5
        print(f"{case}: relative error {error / whole:.3f}")
        assert 1e-4 < error / whole < 0.05  # the lower bound: it did run in bf16
