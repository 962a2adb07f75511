"""What is asked of the planner: a job and a layout, and which layouts are possible at all.

Whether a possible layout fits a GPU's memory is decided in search.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpt_mega.planning.models import ModelShape


class PlanError(ValueError):
    """A job that cannot be; the message says what was given, what was expected, what to change."""


@dataclass(frozen=True)
class Layout:
    """How a model is cut: ranks of each kind; data-parallel ranks are what remains of the GPUs."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks of a pipeline stage
    cp: int = 1
    ep: int = 1
    etp: int = 1  # tensor-parallel ranks of an expert
    microbatch: int = 1  # sequences
    recompute: str = "none"  # of the activations: none | selective (norms and activation functions) | full

    def __str__(self) -> str:
        """Ranks of each kind, micro-batch, and what is recomputed, as in `tp8 pp2 mbs1 +selective`."""
        kinds = ("tp", "pp", "vpp", "cp", "ep", "etp")
        cut = " ".join(f"{kind}{getattr(self, kind)}" for kind in kinds if getattr(self, kind) > 1)
        again = "" if self.recompute == "none" else f" +{self.recompute}"
        return f"{cut or 'dp only'} mbs{self.microbatch}{again}"


@dataclass(frozen=True)
class Job:
    """What is to be computed. `batch` counts sequences of a step; in mode rl each is a rollout of `seq`
    tokens, of which `prompt` are given and the rest generated."""

    gpus: int
    batch: int = 256
    seq: int = 8192
    precision: str = "bf16"  # bf16 | fp8: of the matrix products of the layers
    mode: str = "pretrain"  # pretrain | rl
    distributed_optimizer: bool = True
    prompt: int = 1024
    rollout_tp: int = 0  # ranks of one engine; 0: the fewest that hold the weights twice over
    number_bytes: int = 2  # of a weight or activation outside FP8, in memory alone; 4: fp32

    def __post_init__(self) -> None:
        for name in ("gpus", "batch", "seq"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)}, expected 1 or above")
        for name, choices in (("precision", ("bf16", "fp8")), ("mode", ("pretrain", "rl"))):
            if getattr(self, name) not in choices:
                raise PlanError(f"{name}={getattr(self, name)}, expected {' or '.join(choices)}")
        if self.mode == "rl" and not 0 < self.prompt < self.seq:
            raise PlanError(f"prompt={self.prompt} in seq={self.seq}; expected 1 up to below seq")
        if self.rollout_tp < 0 or (self.rollout_tp and self.gpus % self.rollout_tp):
            raise PlanError(
                f"rollout_tp={self.rollout_tp} does not divide gpus={self.gpus}; choose a divisor, or 0"
            )


@dataclass(frozen=True)
class Ranks:
    """The data-parallel side of a layout on a job's GPUs."""

    dp: int  # replicas of everything outside the experts, context-parallel ranks not counted
    expert_dp: int  # replicas of an expert
    microbatches: int  # of one replica in a step

    @staticmethod
    def of(shape: ModelShape, job: Job, layout: Layout) -> Ranks:
        """Raises PlanError where the layout is impossible."""
        check(shape, job, layout)
        dp = job.gpus // (layout.tp * layout.pp * layout.cp)
        return Ranks(
            dp,
            job.gpus // (layout.pp * layout.ep * layout.etp),
            job.batch // (dp * layout.microbatch),
        )


def check_values(layout: Layout) -> None:
    """Raise PlanError at the first value that no layout can have."""
    for kind in ("tp", "pp", "vpp", "cp", "ep", "etp", "microbatch"):
        if getattr(layout, kind) < 1:
            raise PlanError(f"{kind}={getattr(layout, kind)}, expected 1 or above")
    if layout.recompute not in ("none", "selective", "full"):
        raise PlanError(f"recompute={layout.recompute}, expected none, selective or full")


def check(shape: ModelShape, job: Job, layout: Layout) -> None:
    """Raise PlanError at the first rule that the layout breaks."""
    check_values(layout)
    _check_widths(shape, layout)
    _check_pipeline(shape, layout)
    ranks = layout.tp * layout.pp * layout.cp
    if job.gpus % ranks:
        raise PlanError(
            f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} = {ranks} does not divide gpus={job.gpus}; "
            "change one of them"
        )
    _check_experts(shape, job, layout)
    samples = job.gpus // ranks * layout.microbatch
    if job.batch % samples:
        raise PlanError(
            f"batch={job.batch} is not a multiple of dp {job.gpus // ranks} x microbatch "
            f"{layout.microbatch} = {samples}; change batch or the layout"
        )
    if layout.vpp > 1 and job.batch // samples % layout.pp:
        raise PlanError(
            f"{job.batch // samples} micro-batches with vpp={layout.vpp}; expected a multiple of "
            f"pp={layout.pp}: change batch, or set vpp=1"
        )
    if job.seq % (layout.tp * layout.cp * (2 if layout.cp > 1 else 1)):
        raise PlanError(
            f"seq={job.seq} cannot be cut by tp {layout.tp} and cp {layout.cp}; "
            "expected a multiple of tp x cp, and of 2 cp where cp > 1"
        )


def _check_widths(shape: ModelShape, layout: Layout) -> None:
    if shape.heads % layout.tp:
        raise PlanError(f"tp={layout.tp} does not divide the {shape.heads} heads; choose a divisor")
    if max(shape.groups, layout.tp) % min(shape.groups, layout.tp):
        raise PlanError(f"tp={layout.tp} and {shape.groups} heads of keys: one must divide the other")
    if shape.ffn % layout.tp or shape.shared_ffn % layout.tp:
        raise PlanError(f"tp={layout.tp} does not divide the ffn of {shape.ffn or shape.shared_ffn}")


def _check_pipeline(shape: ModelShape, layout: Layout) -> None:
    chunks = layout.pp * layout.vpp
    if chunks > shape.layers:
        raise PlanError(
            f"pp {layout.pp} x vpp {layout.vpp} = {chunks} chunks for {shape.layers} layers; "
            "expected one layer a chunk or more: lower pp or vpp"
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise PlanError(f"vpp={layout.vpp} with pp=1; chunks shorten a pipeline: raise pp, or set vpp=1")


def _check_experts(shape: ModelShape, job: Job, layout: Layout) -> None:
    if not shape.experts:
        if layout.ep > 1 or layout.etp > 1:
            raise PlanError(f"ep={layout.ep}, etp={layout.etp} for a model without experts; set both to 1")
        return
    if shape.experts % layout.ep:
        raise PlanError(f"ep={layout.ep} does not divide the {shape.experts} experts; choose a divisor")
    if shape.expert_ffn % layout.etp:
        raise PlanError(f"etp={layout.etp} does not divide the expert's ffn of {shape.expert_ffn}")
    if job.gpus // layout.pp % (layout.ep * layout.etp):
        raise PlanError(
            f"ep {layout.ep} x etp {layout.etp} does not divide the {job.gpus // layout.pp} ranks of a "
            "pipeline stage; lower ep or pp"
        )


def stage_layers(shape: ModelShape, layout: Layout) -> list[int]:
    """Layers of each pipeline stage, as even as can be.

    Where layers + 2 fill the chunks, embedding and output count as a layer each, as in Megatron's
    account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split (Llama 3.1's 126 layers).
    """
    chunks = layout.pp * layout.vpp
    if layout.pp > 1 and shape.layers % chunks and (shape.layers + 2) % chunks == 0:
        stages = [(shape.layers + 2) // layout.pp] * layout.pp
        stages[0] -= 1
        stages[-1] -= 1
        return stages
    even, more = divmod(shape.layers, layout.pp)
    inner = range(1, more + 1) if layout.pp > more + 1 else range(more)  # spare the first and the last stage
    return [even + (stage in inner) for stage in range(layout.pp)]


def layers_by_kind(shape: ModelShape, layout: Layout) -> list[tuple[int, int]]:
    """(dense layers, layers with experts) of each pipeline stage; the leading layers are the dense ones."""
    leading, first, found = shape.layers - shape.moe_layers, 0, []
    for layers in stage_layers(shape, layout):
        dense = min(layers, max(0, leading - first))
        found.append((dense, layers - dense))
        first += layers
    return found
