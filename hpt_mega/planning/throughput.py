"""Time of one training step: roofline of every matrix product, attention, and what communication is exposed.

The constants are in hardware.py. Rollouts and weight sync of mode rl are in rollout.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpt_mega.planning.hardware import DEFAULT, Efficiency, Hardware
from hpt_mega.planning.job import Job, Layout, Ranks, layers_by_kind
from hpt_mega.planning.memory import GRADIENT_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES, stage_shards
from hpt_mega.planning.models import ModelShape

# Counted or read off published curves, not fitted:
PIPELINE_FILL = (
    256  # of the summed dimension: what filling and draining a kernel's pipeline costs (4 stages of 64)
)
LOSS_BYTES = (
    62  # moved per logit: Megatron's unfused vocab-parallel cross entropy in fp32, forward and backward
)
ATTENTION_HALF = (
    850  # tokens at which attention reaches half its efficiency (arXiv 2407.08608, figs. 5 and 6)
)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for one micro-batch, forward and backward."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tp: float = 0.0  # exposed communication
    cp: float = 0.0
    ep: float = 0.0
    host: float = 0.0  # by which launching kernels outlasts the GPU

    @property
    def total(self) -> float:
        parts = (self.gemm, self.attention, self.elementwise, self.tp, self.cp, self.ep, self.host)
        return sum(parts)


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, by cause; they sum to `step`."""

    step: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """All that a layer's time depends on."""

    shape: ModelShape
    job: Job
    layout: Layout
    gpu: Hardware
    reached: Efficiency = DEFAULT

    @property
    def tokens(self) -> float:
        """Of a micro-batch on one context-parallel rank."""
        return self.layout.microbatch * self.job.seq / self.layout.cp

    @property
    def memory_rate(self) -> float:
        return self.gpu.memory_tb_s * 1e12 * self.reached.memory

    @property
    def nvlink_rate(self) -> float:
        return self.gpu.nvlink_gb_s * 1e9 * self.reached.nvlink

    @property
    def network_rate(self) -> float:
        """Of one GPU's card."""
        return self.gpu.network_gb_s * 1e9 * self.reached.network

    def group_rate(self, size: int, stride: int) -> float:
        """Bytes/s of a ring over `size` ranks that are `stride` GPUs apart, as NCCL builds it: a ring through
        r ranks of a node enters and leaves the node through r network cards."""
        in_node = max(1, self.gpu.gpus_per_node // stride)
        if size <= in_node:
            return self.nvlink_rate
        return min(in_node * self.network_rate, self.nvlink_rate)

    def product(self, rows: float, inputs: float, outputs: float, precision: str, count: int = 1) -> float:
        """Seconds of a linear layer [rows, inputs] x [inputs, outputs], forward and backward (3 products).

        Compute and memory add up: what a kernel loads first and stores last is not hidden. This is what makes
        small products slow. The weight's gradient is accumulated in fp32. `count` equal products.
        """
        reached = self.reached.gemm_fp8 if precision == "fp8" else self.reached.gemm_bf16
        fill = sum(1 + PIPELINE_FILL / depth for depth in (inputs, outputs, rows)) / 3
        compute = 3 * 2 * rows * inputs * outputs / (self.gpu.peak(precision) * reached) * fill
        operand = 1 if precision == "fp8" else 2
        ends = rows * (inputs + outputs)
        moved = 3 * operand * inputs * outputs * 2 / 3 + 2 * 4 * inputs * outputs  # weight twice, gradient
        moved += 2 * operand * ends + 2 * ends  # operands of the three products, results in bf16
        return count * (compute + moved / self.memory_rate)


def layer_time(cost: Cost, moe: bool) -> LayerTime:
    """Of one layer; full recompute adds another forward pass."""
    shape, layout, reached = cost.shape, cost.layout, cost.reached
    gemm = _projections(cost) + (_experts(cost) if moe else 0.0)
    width = shape.shared_ffn if moe else shape.ffn
    if width:
        gemm += _sharded(cost, shape.ffn_matrices(width))
    forward, backward = _attention(cost)
    elementwise = _elementwise_bytes(cost, moe) / cost.memory_rate
    tp = reached.exposed * _tp_seconds(cost, moe)
    ep = _ep_seconds(cost) if moe else 0.0
    cp = _cp_exposed(cost, forward, backward)
    again = 1 / 3 if layout.recompute == "full" else 0.0
    time = LayerTime(
        gemm * (1 + again),
        forward * (1 + 3 * again) + backward,
        elementwise * (1 + again + (0.15 if layout.recompute == "selective" else 0)),
        tp * (1 + again),
        cp * (1 + again),
        ep * (1 + again),
    )
    host = reached.moe_host_s if moe else reached.dense_host_s
    return replace(time, host=max(0.0, host * (1 + again) - time.total))


def _sharded(cost: Cost, matrices: list[tuple[int, int]]) -> float:
    """A column-parallel matrix (outputs cut), then a row-parallel one (inputs cut)."""
    (inputs, inner), (back, outputs) = matrices
    tp, precision = cost.layout.tp, cost.job.precision
    return cost.product(cost.tokens, inputs, inner / tp, precision) + cost.product(
        cost.tokens, back / tp, outputs, precision
    )


def _projections(cost: Cost) -> float:
    matrices = cost.shape.attention_matrices()
    if len(matrices) == 2:
        return _sharded(cost, matrices)
    tp, precision = cost.layout.tp, cost.job.precision
    return sum(cost.product(cost.tokens, i, o / tp, precision) for i, o in matrices)


def _experts(cost: Cost) -> float:
    """Balanced tokens, grouped products, one for each local expert."""
    shape, layout = cost.shape, cost.layout
    local = shape.experts // layout.ep
    rows = cost.tokens / layout.tp * layout.etp * shape.topk / local
    return sum(
        cost.product(rows, inputs, outputs / layout.etp, cost.job.precision, local)
        for inputs, outputs in shape.ffn_matrices(shape.expert_ffn)
    )


def _attention(cost: Cost) -> tuple[float, float]:
    """Forward, backward: causal, in bf16; the backward pass recomputes the scores, 2.5 times the FLOPs."""
    shape = cost.shape
    width = shape.heads * (2 * shape.dim + shape.rope_dim) / cost.layout.tp
    flops = 2 * cost.tokens * cost.job.seq * width / 2
    peak = cost.gpu.peak("bf16") * cost.job.seq / (cost.job.seq + ATTENTION_HALF)
    return (
        flops / (peak * cost.reached.attention_forward),
        2.5 * flops / (peak * cost.reached.attention_backward),
    )


def _elementwise_bytes(cost: Cost, moe: bool) -> float:
    """Read and written by norms, residuals, rotation, activation, quantisation and the routing of tokens.

    In units of bf16 tensors of a token; the backward pass moves about twice what the forward pass does.
    """
    shape, layout = cost.shape, cost.layout
    fp8 = cost.job.precision == "fp8"
    cast = 2.0 if fp8 else 0.0  # read in bf16, written in fp8 straight and transposed
    residual = (4 + 6) * shape.hidden  # a norm: read, write; a sum with the residual: two reads, a write
    rotation = 4 * (shape.query_width + shape.kv_width)

    def activation(width: float) -> float:
        return (2 * shape.inward + 2 + cast) * width

    forward = (2 * residual + rotation + cast * (2 * shape.hidden + shape.query_width)) / layout.tp
    if moe:
        routed = shape.topk * (4 * 2 * shape.hidden + cast * shape.hidden + activation(shape.expert_ffn))
        forward += (routed + activation(shape.shared_ffn)) / layout.tp
    else:
        forward += activation(shape.ffn) / layout.tp
    return 3 * forward * cost.tokens


def _tp_seconds(cost: Cost, moe: bool) -> float:
    """All-gathers and reduce-scatters under sequence parallelism: two of each kind in the forward pass of
    attention and ffn together, as many in the backward pass, and two gathers again for weight gradients."""
    layout = cost.layout
    if layout.tp == 1:
        return 0.0
    collectives = 5 if moe else 10
    moved = cost.tokens * cost.shape.hidden * 2 * (layout.tp - 1) / layout.tp
    rate = cost.group_rate(layout.tp, 1)
    return collectives * (moved / rate + cost.reached.collective_latency_s)


def _cp_exposed(cost: Cost, forward: float, backward: float) -> float:
    """Keys and values travel the ring of context-parallel ranks while attention computes (Megatron's p2p)."""
    layout = cost.layout
    if layout.cp == 1:
        return 0.0
    width = max(cost.shape.kv_width / layout.tp, cost.shape.dim)
    hop = cost.tokens * 2 * width * 2 / cost.group_rate(layout.cp, layout.tp)
    steps = layout.cp - 1
    hidden = steps / layout.cp
    return max(0.0, steps * hop - hidden * forward) + max(0.0, 2 * steps * hop - hidden * backward)


def _ep_seconds(cost: Cost) -> float:
    """Dispatch and combine, forward and backward, where a token is sent once to each other node and once to
    each GPU there (DeepEP, HybridEP). Expected numbers of distinct nodes and GPUs under balanced routing."""
    layout, topk = cost.layout, cost.shape.topk
    if layout.ep == 1:
        return 0.0
    in_node = max(1, min(layout.ep, cost.gpu.gpus_per_node // layout.etp))
    nodes = layout.ep / in_node
    other_nodes = (nodes - 1) * (1 - (1 - 1 / nodes) ** topk)
    other_gpus = (layout.ep - nodes) * (1 - (1 - 1 / layout.ep) ** topk)
    token_bytes = cost.tokens / layout.tp * layout.etp * cost.shape.hidden * 2
    return 4 * token_bytes * (other_nodes / cost.network_rate + other_gpus / cost.nvlink_rate)


def step_time(
    shape: ModelShape, job: Job, layout: Layout, gpu: Hardware, reached: Efficiency = DEFAULT
) -> Timing:
    """Of one optimizer step over job.batch sequences. Raises PlanError where the layout is impossible."""
    ranks = Ranks.of(shape, job, layout)
    cost = Cost(shape, job, layout, gpu, reached)
    dense = layer_time(cost, False) if shape.moe_layers < shape.layers else LayerTime()
    moe = layer_time(cost, True) if shape.experts else LayerTime()
    output = _output_seconds(cost)
    stages = layers_by_kind(shape, layout)
    times = [d * dense.total + m * moe.total for d, m in stages]
    times[-1] += output
    slowest = max(range(layout.pp), key=times.__getitem__)
    d, m = stages[slowest]
    parts = {
        part: ranks.microbatches * (d * getattr(dense, part) + m * getattr(moe, part))
        for part in ("gemm", "attention", "elementwise", "tp", "cp", "ep", "host")
    }
    parts["output"] = ranks.microbatches * output if slowest == layout.pp - 1 else 0.0
    parts["pp_bubble"] = (layout.pp - 1) / layout.vpp * sum(times) / layout.pp
    parts["pp_send"] = _pp_exposed(cost, ranks)
    parts["dp"] = _dp_exposed(cost, ranks, times[slowest])
    parts["optimizer"] = _optimizer_seconds(cost, ranks)
    return Timing(sum(parts.values()), parts)


def _output_seconds(cost: Cost) -> float:
    """Output matrix, in bf16, and cross entropy: work of the last stage alone."""
    width = cost.shape.vocab / cost.layout.tp
    product = cost.product(cost.tokens, cost.shape.hidden, width, "bf16")
    return product + cost.tokens * width * LOSS_BYTES / cost.memory_rate


def _pp_exposed(cost: Cost, ranks: Ranks) -> float:
    """Waiting for a neighbouring stage: the plain 1F1B schedule does not overlap it, the interleaved does."""
    layout = cost.layout
    if layout.pp == 1:
        return 0.0
    moved = cost.tokens * cost.shape.hidden * 2 / layout.tp
    rate = cost.network_rate if cost.job.gpus > cost.gpu.gpus_per_node else cost.nvlink_rate
    blocking = 1.0 if layout.vpp == 1 else cost.reached.exposed
    return 2 * blocking * (ranks.microbatches * layout.vpp + layout.pp - 1) * moved / rate


def _dp_exposed(cost: Cost, ranks: Ranks, microbatch_s: float) -> float:
    """Gradients leave during the last backward pass, weights arrive during the first forward pass."""
    layout = cost.layout
    dense_rate = cost.group_rate(ranks.dp * layout.cp, layout.tp)
    expert_rate = cost.group_rate(ranks.expert_dp, layout.ep * layout.etp)
    dense_ranks = ranks.dp * layout.cp
    exposed = 0.0
    for shard in stage_shards(cost.shape, layout):
        ring = shard.dense * (1 - 1 / dense_ranks) / dense_rate
        ring += shard.experts * (1 - 1 / ranks.expert_dp) / expert_rate
        late = max(0.0, GRADIENT_BYTES * ring - microbatch_s * 2 / 3)
        late += max(0.0, WEIGHT_BYTES * ring - microbatch_s / 3)
        exposed = max(exposed, late)
    return exposed


def _optimizer_seconds(cost: Cost, ranks: Ranks) -> float:
    """Adam on this rank's part: fp32 state read and written, gradients read twice (norm, step), weights
    written; before, every rank's whole gradients are cleared and scaled."""
    layout, split = cost.layout, cost.job.distributed_optimizer
    touched = 2 * OPTIMIZER_BYTES + 2 * GRADIENT_BYTES + WEIGHT_BYTES
    own = max(
        shard.dense / (ranks.dp * layout.cp if split else 1)
        + shard.experts / (ranks.expert_dp if split else 1)
        for shard in stage_shards(cost.shape, layout)
    )
    whole = max(shard.dense + shard.experts for shard in stage_shards(cost.shape, layout))
    return cost.reached.step_host_s + (own * touched + whole * 3 * GRADIENT_BYTES) / cost.memory_rate
