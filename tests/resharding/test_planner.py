"""Plans of weight updates: every row once, buckets of bounded size, and copies that rebuild the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.resharding.mapping import FAMILIES, Family, ModelShape
from hpt_mega.resharding.mapping.fusion import padded_vocab_size
from hpt_mega.resharding.mapping.shape import Experts, LatentAttention
from hpt_mega.resharding.planner import ALIGNMENT, Plan, plan_update, plan_writes
from hpt_mega.spec import Spec

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SHAPES = st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=4), st.builds(Spec, DTYPES, SHAPES), min_size=1
)

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=14,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=4,
    ffn_hidden_size=30,
    vocab_size=101,
    max_position_embeddings=16,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    tied=False,
)
EXPERTS = Experts(count=5, top_k=2, ffn_hidden_size=18)
LATENT = LatentAttention(12, 10, 4, 2, 4, None)


@given(SPECS, st.integers(700, 3000))
def test_every_row_of_every_tensor_lies_in_exactly_one_slot(specs: dict[str, Spec], size: int) -> None:
    plan = plan_update(specs, size)
    rows: dict[str, list[int]] = {name: [] for name in specs}
    for bucket in plan.buckets:
        assert bucket.slots
        assert bucket.nbytes <= size
        ends = [0]
        for slot in bucket.slots:
            assert slot.offset % ALIGNMENT == 0 and slot.offset >= ends[-1]
            ends.append(slot.offset + slot.nbytes)
            rows[slot.name] += range(slot.first_row, slot.first_row + slot.rows)
    assert rows == {name: list(range(spec.shape[0])) for name, spec in specs.items()}
    assert plan.names() == list(specs)
    assert plan.nbytes == sum(spec.nbytes for spec in specs.values())


@given(SPECS, st.integers(700, 3000))
def test_a_tensor_that_fits_a_bucket_is_not_cut(specs: dict[str, Spec], size: int) -> None:
    slots = [slot for bucket in plan_update(specs, size).buckets for slot in bucket.slots]
    for name, spec in specs.items():
        if spec.nbytes <= size:
            assert [slot.is_whole for slot in slots if slot.name == name] == [True]


@given(SPECS, st.integers(700, 3000))
def test_a_plan_survives_the_wire_with_its_digest(specs: dict[str, Spec], size: int) -> None:
    plan = plan_update(specs, size)
    again = Plan.parse(plan.describe())
    assert again == plan
    assert again.digest == plan.digest


def test_plans_that_differ_in_one_number_have_different_digests() -> None:
    one = plan_update({"a": Spec(torch.float32, (3, 5))}, 1024)
    for other in (
        plan_update({"a": Spec(torch.float32, (5, 3))}, 1024),
        plan_update({"b": Spec(torch.float32, (3, 5))}, 1024),
        plan_update({"a": Spec(torch.int32, (3, 5))}, 1024),
        plan_update({"a": Spec(torch.float32, (3, 5))}, 1025),
    ):
        assert one.digest != other.digest


def test_a_row_larger_than_a_bucket_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a row of wide has 4000 bytes and a bucket 1024.*bucket_mib"):
        plan_update({"wide": Spec(torch.float32, (2, 1000))}, 1024)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ranks_copies_rebuild_the_tensors_they_were_cut_from(family: Family, size: int) -> None:
    shape = shape_of(family)
    given = random_tensors(family, shape)
    plan = plan_update({name: Spec.of(tensor) for name, tensor in given.items()}, 1500)
    assert len(plan.buckets) > 3
    buckets = [torch.full((1500,), 255, dtype=torch.uint8) for _ in plan.buckets]
    for rank in range(size):
        shards = {
            entry: entry.fusion.shard([given[name] for name in entry.hf], shape, rank, size)
            for entry in family.entries(shape)
        }
        held = {entry: torch.zeros_like(shard) for entry, shard in shards.items()}
        pieces = [
            (entry.hf[piece.tensor], piece)
            for entry, part in held.items()
            for piece in entry.fusion.contribution(part, shape, rank)
        ]
        writes = plan_writes(plan, pieces)
        for entry, part in held.items():  # training goes on: a plan outlives the values it was made with
            part.copy_(shards[entry])
        for bucket, copies in zip(buckets, writes, strict=True):
            for copy in copies:
                copy.run(bucket)
    assert_rebuilt(plan, buckets, given)
    assert padded_vocab_size(shape.vocab_size, 3) > shape.vocab_size  # the padding stays behind


def shape_of(family: Family) -> ModelShape:
    if family.name == "deepseek_v3":
        return replace(
            SHAPE, experts=replace(EXPERTS, first_layer=1, shared_ffn_hidden_size=6), latent=LATENT
        )
    return replace(SHAPE, experts=EXPERTS if family.name in ("qwen3_moe", "mixtral") else None)


def random_tensors(family: Family, shape: ModelShape) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        name: torch.randn(sizes).bfloat16()
        for entry in family.entries(shape)
        for name, sizes in entry.hf_shapes(shape).items()
    }


def assert_rebuilt(plan: Plan, buckets: Sequence[Tensor], given: dict[str, Tensor]) -> None:
    parts: dict[str, list[Tensor]] = {}
    for bucket, buffer in zip(plan.buckets, buckets, strict=True):
        for slot in bucket.slots:
            parts.setdefault(slot.name, []).append(slot.view(buffer))
    assert parts.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(torch.cat(parts[name]), tensor), name
