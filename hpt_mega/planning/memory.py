"""Memory of one GPU in training: the fullest pipeline stage, by what fills it.

An engine's weights and KV cache are in rollout.py; whether the sum fits is decided in search.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hpt_mega.planning.job import Job, Layout, Ranks, layers_by_kind
from hpt_mega.planning.models import ModelShape

GIB = 2**30
RUNTIME_GIB = 2.5  # CUDA context, cuBLAS workspaces, NCCL's channels
FRAGMENTATION = 0.05  # of what comes and goes within a step
OPTIMIZER_BYTES = 12  # fp32 weights, first and second moment of Adam; of fp32 models the moments alone
WEIGHT_BYTES, GRADIENT_BYTES = 2, 4  # bf16; fp32 accumulation, as Megatron's distributed data parallel


@dataclass(frozen=True)
class Memory:
    """GiB on the GPU of the fullest stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float  # runtime and communication
    reserve: float  # for fragmentation

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def held(self) -> float:
        """Of the model itself, whether or not a step is computed."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Shard:
    """Parameters on one GPU; experts apart, as they have data-parallel replicas of their own."""

    dense: float
    experts: float


def stage_shards(shape: ModelShape, layout: Layout, output: bool = True) -> list[Shard]:
    """Of each pipeline stage, output matrix counted or not. Leading dense layers fall to the first stages."""
    shards = []
    stages = layers_by_kind(shape, layout)
    for stage, (plain, moe) in enumerate(stages):
        dense = (plain + moe) * shape.attention_parameters() + moe * shape.ffn_parameters(moe=True)
        dense += plain * shape.ffn_parameters(moe=False)
        ends = (stage == 0) + (output and stage == len(stages) - 1)  # the embedding, the output matrix
        if shape.tied and layout.pp == 1:
            ends = 1
        dense += ends * shape.embedding_parameters()
        experts = moe * shape.expert_parameters() / (layout.ep * layout.etp)
        shards.append(Shard(dense / layout.tp, experts))
    return shards


def activation_bytes(shape: ModelShape, job: Job, layout: Layout, moe: bool) -> float:
    """Of one token in one layer, kept for the backward pass, on one of `tp` ranks under sequence parallelism.

    After arXiv 2205.05198, table 2, with FlashAttention (no scores) and without dropout. In fp8, inputs of
    matrix products are kept in one byte.
    """
    kept = job.number_bytes
    operand = 1 if job.precision == "fp8" else kept
    if layout.recompute == "full":
        return kept * shape.hidden / layout.tp
    keep_recomputable = layout.recompute == "none"
    attention = kept * (shape.query_width + 2 * shape.kv_width) + kept * shape.query_width
    attention += shape.query_width if job.precision == "fp8" else 0  # output beside its quantised copy
    residual = 2 * kept * shape.hidden + (2 * operand * shape.hidden if keep_recomputable else 0)
    per_width = kept * shape.inward + (operand if keep_recomputable else 0)
    if not moe:
        return (attention + residual + per_width * shape.ffn) / layout.tp
    routed = shape.topk * (per_width * shape.expert_ffn / layout.etp + operand * shape.hidden)
    return (attention + residual + per_width * shape.shared_ffn + routed) / layout.tp


def microbatches_in_flight(layout: Layout, stage: int, microbatches: int) -> float:
    """Whole micro-batches whose activations a stage holds: 1F1B, interleaved where vpp > 1 (2104.04473)."""
    if layout.vpp == 1:
        return min(layout.pp - stage, microbatches)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks / layout.vpp, microbatches)


def memory(shape: ModelShape, job: Job, layout: Layout) -> Memory:
    """Of the fullest stage. Raises PlanError where the layout is impossible."""
    return max(stage_memories(shape, job, layout), key=lambda found: found.total)


def stage_memories(shape: ModelShape, job: Job, layout: Layout, output: bool = True) -> list[Memory]:
    """Of each pipeline stage; without `output` of a model that ends in a value (its head is left out).

    Raises PlanError where the layout is impossible.
    """
    ranks = Ranks.of(shape, job, layout)
    return [_stage(shape, job, layout, ranks, stage, output) for stage in range(layout.pp)]


def _stage(shape: ModelShape, job: Job, layout: Layout, ranks: Ranks, stage: int, output: bool) -> Memory:
    plain, moe = layers_by_kind(shape, layout)[stage]
    shard = stage_shards(shape, layout, output)[stage]
    parameters = shard.dense + shard.experts
    split, expert_split = (ranks.dp * layout.cp, ranks.expert_dp) if job.distributed_optimizer else (1, 1)
    state_bytes = OPTIMIZER_BYTES if job.number_bytes < 4 else OPTIMIZER_BYTES - 4
    optimizer = state_bytes * (shard.dense / split + shard.experts / expert_split)
    tokens = layout.microbatch * job.seq / layout.cp
    layers = moe * activation_bytes(shape, job, layout, True)
    layers += plain * activation_bytes(shape, job, layout, False)
    activations = tokens * layers * microbatches_in_flight(layout, stage, ranks.microbatches)
    if layout.recompute == "full":  # one layer at a time is there in full
        whole = Layout(layout.tp, etp=layout.etp)
        activations += tokens * activation_bytes(shape, job, whole, bool(moe))
    logits = 0.0
    if output and stage == layout.pp - 1:  # as computed, in fp32, gradient
        logits = tokens * shape.vocab / layout.tp * (job.number_bytes + 8)
    return Memory(
        weights=job.number_bytes * parameters / GIB,
        gradients=GRADIENT_BYTES * parameters / GIB,
        optimizer=optimizer / GIB,
        activations=activations / GIB,
        logits=logits / GIB,
        buffers=RUNTIME_GIB,
        reserve=FRAGMENTATION * (activations + logits) / GIB,
    )
