"""Plans: one layout judged, or all layouts of a job judged and ranked, with the reasons against the others.

Memory and time come from memory.py, throughput.py and rollout.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpt_mega.planning.hardware import DEFAULT, Efficiency, Hardware
from hpt_mega.planning.job import Job, Layout, PlanError, Ranks
from hpt_mega.planning.memory import RUNTIME_GIB, Memory, memory
from hpt_mega.planning.models import ModelShape
from hpt_mega.planning.rollout import Engine, engine, rl_step
from hpt_mega.planning.throughput import Timing, step_time

SHORTEST_CUT = 4096  # tokens: the search does not cut a sequence into parts shorter than this


@dataclass(frozen=True)
class Plan:
    """A layout's memory (GiB of the fullest GPU) and speed."""

    layout: Layout
    dp: int
    microbatches: int
    memory: Memory  # in training
    memory_gib: float  # the larger of training and generation
    available_gib: float
    timing: Timing
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    engine: Engine | None = None  # in mode rl

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.available_gib


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot be or does not fit. `over_gib` is 0 for the former."""

    layout: Layout
    reason: str
    over_gib: float = 0.0


def plan(shape: ModelShape, job: Job, layout: Layout, gpu: Hardware, reached: Efficiency = DEFAULT) -> Plan:
    """Judge one layout. Raises PlanError where it is impossible; one too large for the GPU is a plan too."""
    ranks = Ranks.of(shape, job, layout)
    needed = memory(shape, job, layout)
    timing = step_time(shape, job, layout, gpu, reached)
    used, most = None, needed.total
    if job.mode == "rl":
        used = engine(shape, job, gpu, needed)
        most = max(most, RUNTIME_GIB + needed.weights + used.weights_gib + used.kv_gib)
        timing = rl_step(shape, job, gpu, needed, timing, reached)
    speed = job.batch * job.seq / timing.step / job.gpus
    tflops = speed * shape.flops_per_token(job.seq) / 1e12
    return Plan(
        layout, ranks.dp, ranks.microbatches, needed, most, gpu.memory_gib, timing, speed, tflops, used
    )


def search(
    shape: ModelShape, job: Job, gpu: Hardware, microbatch: int | None = None, recompute: str | None = None
) -> tuple[list[Plan], list[Refusal]]:
    """Every layout that fits, fastest first, and the refused ones, nearest to fitting first.

    Of the given micro-batch and recompute, where there are any; else activations are recomputed only where a
    layout does not fit without.
    """
    recomputes = ("none", "selective", "full") if recompute is None else (recompute,)
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    for cut in _layouts(shape, job, gpu, microbatch):
        for again in recomputes:
            layout = replace(cut, recompute=again)
            try:
                needed = memory(shape, job, layout).total
                over = needed - gpu.memory_gib
                if over <= 0:
                    plans.append(plan(shape, job, layout, gpu))
                    break
            except PlanError as error:
                refusals.append(Refusal(layout, str(error)))
                break
            if again == recomputes[-1]:
                reason = f"needs {needed:.1f} GiB of {gpu.memory_gib:.1f}"
                refusals.append(Refusal(layout, reason, over))
    plans.sort(key=lambda found: -found.tokens_per_s_per_gpu)
    refusals.sort(key=lambda refused: (not refused.over_gib, refused.over_gib))
    return plans, refusals


def _layouts(shape: ModelShape, job: Job, gpu: Hardware, microbatch: int | None) -> Iterator[Layout]:
    """Tensor-parallel ranks within a node, experts uncut, no recompute yet; stages of equal layers, or a
    power of two of them (DeepSeek-V3's 61 layers)."""
    for tp in _powers(min(gpu.gpus_per_node, 8, job.gpus)):
        for pp in range(1, min(shape.layers, job.gpus // tp) + 1):
            if job.gpus % (tp * pp) or not (_even(shape, pp) or pp.bit_count() == 1):
                continue
            for cp in _powers(max(1, job.seq // SHORTEST_CUT)):
                if job.gpus % (tp * pp * cp):
                    continue
                for ep in _powers(min(shape.experts, job.gpus // pp)) if shape.experts else (1,):
                    for vpp in _chunks(shape, pp):
                        tried = (1, 2, 4) if cp == 1 else (1,)  # else less cp does better
                        for size in tried if microbatch is None else (microbatch,):
                            yield Layout(tp, pp, vpp, cp, ep, 1, size)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _even(shape: ModelShape, chunks: int) -> bool:
    return shape.layers % chunks == 0 or (shape.layers + 2) % chunks == 0


def _chunks(shape: ModelShape, pp: int) -> list[int]:
    """Of a stage: none, the fewest, and the most."""
    most = (shape.layers + 2) // pp if pp > 1 else 1
    found = [vpp for vpp in range(2, most + 1) if pp * vpp <= shape.layers and _even(shape, pp * vpp)]
    return [1, *sorted({*found[:2], *found[-1:]})]
