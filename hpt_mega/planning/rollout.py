"""Mode rl: memory and time of generation beside training on the same GPUs, and of the weights' way there.

Engines take turns with the trainer, whose gradients and optimizer state wait in host memory meanwhile.
Rewards are taken as hidden behind generation; every response as long as it may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpt_mega.planning.hardware import DEFAULT, Efficiency, Hardware
from hpt_mega.planning.job import Job, PlanError
from hpt_mega.planning.memory import GIB, RUNTIME_GIB, WEIGHT_BYTES, Memory
from hpt_mega.planning.models import ModelShape
from hpt_mega.planning.throughput import Timing

ENGINE_SHARE = 0.92  # of what is free, which an engine takes for weights and KV cache


@dataclass(frozen=True)
class Engine:
    """One engine of `tp` GPUs; GiB are of one GPU."""

    tp: int
    engines: int
    weights_gib: float
    kv_gib: float  # that the sequences at once need
    concurrent: int  # sequences at once


def kv_bytes_per_token(shape: ModelShape, tp: int, number_bytes: int = 2) -> float:
    """On one GPU; multi-latent attention keeps the compressed keys and values on each."""
    if shape.kv_rank:
        return shape.layers * number_bytes * (shape.kv_rank + shape.rope_dim)
    return shape.layers * number_bytes * 2 * max(shape.kv_width / tp, shape.dim)


def engine(shape: ModelShape, job: Job, gpu: Hardware, training: Memory) -> Engine:
    """The engine that job.rollout_tp asks for, else the smallest whose weights take half of what is free.

    Raises PlanError where no sequence fits beside the weights.
    """
    free = (gpu.memory_gib - RUNTIME_GIB - training.weights) * ENGINE_SHARE
    whole = shape.parameters() * (1 if job.precision == "fp8" else 2) / GIB
    sizes = [tp for tp in (1, 2, 4, 8, 16, 32, 64) if job.gpus % tp == 0 and shape.heads % tp == 0]
    tp = job.rollout_tp or next((tp for tp in sizes if whole / tp <= free / 2), sizes[-1])
    room = free - whole / tp
    sequence = kv_bytes_per_token(shape, tp) * job.seq / GIB
    if room < sequence:
        raise PlanError(
            f"an engine of {tp} GPUs holds {whole / tp:.1f} GiB of weights and needs {sequence:.1f} GiB of "
            f"KV cache for one sequence of {job.seq} tokens, {free:.1f} GiB are free; raise rollout_tp"
        )
    engines = job.gpus // tp
    concurrent = min(-(-job.batch // engines), int(room / sequence))
    return Engine(tp, engines, whole / tp, concurrent * sequence, concurrent)


def rl_step(
    shape: ModelShape,
    job: Job,
    gpu: Hardware,
    training: Memory,
    train: Timing,
    reached: Efficiency = DEFAULT,
) -> Timing:
    """Seconds of a whole step: rollouts, old log-probs, training, weight sync. Raises as engine() does."""
    used = engine(shape, job, gpu, training)
    forward = sum(
        train.parts[part] for part in ("gemm", "attention", "elementwise", "tp", "cp", "ep", "host", "output")
    )
    network = gpu.network_gb_s * 1e9 * reached.network
    rate = gpu.nvlink_gb_s * 1e9 * reached.nvlink if job.gpus <= gpu.gpus_per_node else network
    asleep = (training.gradients + training.optimizer) * GIB
    parts = {
        "rollout_prefill": _prefill_seconds(shape, job, gpu, used, reached),
        "rollout_decode": _decode_seconds(shape, job, gpu, used, reached),
        "old_logprob": (forward + train.parts["pp_bubble"]) / 3,
        "weight_sync": WEIGHT_BYTES * shape.parameters() / used.tp / rate,
        "offload": 2 * asleep / (gpu.host_gb_s * 1e9),
    }
    return Timing(train.step + sum(parts.values()), {**train.parts, **parts})


def _prefill_seconds(shape: ModelShape, job: Job, gpu: Hardware, used: Engine, reached: Efficiency) -> float:
    share = reached.gemm_fp8 if job.precision == "fp8" else reached.gemm_bf16
    tokens = job.batch / used.engines * job.prompt
    return 2 * shape.active_parameters() * tokens / (used.tp * gpu.peak(job.precision) * share)


def _decode_seconds(shape: ModelShape, job: Job, gpu: Hardware, used: Engine, reached: Efficiency) -> float:
    """Each step reads the weights that its tokens use and every sequence's keys and values."""
    rate = gpu.memory_tb_s * 1e12 * reached.memory
    share = reached.gemm_fp8 if job.precision == "fp8" else reached.gemm_bf16
    width = 1 if job.precision == "fp8" else 2
    experts = shape.moe_layers * shape.expert_parameters()
    untouched = (1 - shape.topk / shape.experts) ** used.concurrent if shape.experts else 0.0
    weights = (shape.parameters() - experts * untouched) * width / used.tp
    length = job.prompt + (job.seq - job.prompt) / 2  # on average
    cache = used.concurrent * kv_bytes_per_token(shape, used.tp) * length
    compute = 2 * shape.active_parameters() * used.concurrent / used.tp / (gpu.peak(job.precision) * share)
    latency = 2 * shape.layers * reached.collective_latency_s if used.tp > 1 else 0.0
    step = (weights + cache) / rate + compute + latency + reached.decode_host_s
    waves = job.batch / used.engines / used.concurrent
    return (job.seq - job.prompt) * max(1.0, waves) * step
