"""One update: Megatron's forward-backward schedule over micro-batches with the unified objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.data.packing import MicroBatch
from hpt_mega.megatron.attention import PackedRow
from hpt_mega.megatron.context import own_queries, own_tokens
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.optimizer import DataParallel, MegatronOptimizer
from hpt_mega.megatron.runtime import Layout
from hpt_mega.megatron.scaler import loss_scale
from hpt_mega.objective import Estimator, TokenBatch
from hpt_mega.objective.logprob import token_logprobs
from hpt_mega.objective.metrics import added
from hpt_mega.trajectory import Source

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

Metrics = dict[str, float]


class Loss(Protocol):
    """What a step minimises; called on the last pipeline stage, once a micro-batch."""

    def __call__(
        self, microbatch: MicroBatch, model: PolicyModel, hidden_SBH: Tensor, layout: Layout
    ) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the loss (a sum over the global denominator), and sums and maxima that
        metrics are made of ("sum/NAME", "max/NAME")."""
        ...


@dataclass(frozen=True)
class Objective:
    """The unified objective as a Loss: the estimator, its global denominator, and how log-probs are taken."""

    estimator: Estimator
    denominator: float
    temperature: float
    vocab_size: int

    def __call__(
        self, microbatch: MicroBatch, model: PolicyModel, hidden_SBH: Tensor, layout: Layout
    ) -> tuple[Tensor, Metrics]:
        logp_N, entropy_N = self.logprobs(microbatch, model, hidden_SBH, layout)
        if not len(logp_N):  # an inert micro-batch still runs the backward
            return (logp_N.sum() + hidden_SBH.sum()) * 0.0, {"sum/loss": 0.0}
        logp_BT = microbatch.to_response_grid(logp_N)
        old_logp_BT = microbatch.old_logp_BT
        advantage_B = microbatch.advantage_B
        batch = TokenBatch(
            logp=logp_BT,
            # where a batch of rollouts is updated on once, the old policy is the current one
            old_logp=logp_BT.detach() if old_logp_BT is None else old_logp_BT,
            ref_logp=microbatch.ref_logp_BT,
            rollout_logp=microbatch.rollout_logp_BT,
            values=microbatch.values_BT,
            mask=microbatch.mask_BT,
            reward=microbatch.reward_B,
            group=microbatch.group_B,
            source=microbatch.source_B,
            pair=microbatch.pair_B,
            advantage=None if advantage_B is None else advantage_B[:, None].expand_as(microbatch.mask_BT),
            weight=microbatch.weight_B,
            entropy=microbatch.to_response_grid(entropy_N),
            question_tokens=microbatch.question_tokens_B,
        )
        out = self.estimator(batch, denominator=self.denominator)
        loss = {"sum/loss": float(out.loss.detach())}
        return out.loss, loss | out.sums | _engine_gap(microbatch, logp_N.detach())

    def logprobs(
        self, microbatch: MicroBatch, model: PolicyModel, hidden_SBH: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [N] fp32 of the micro-batch's response tokens."""
        weight = model.output_weight()
        own = own_queries(microbatch, layout)
        logp_M, entropy_M = token_logprobs(
            hidden_SBH[own.places_M, 0],
            weight,
            microbatch.targets_N[own.numbers_M],
            temperature=self.temperature,
            group=layout.tp_group if layout.tp_size > 1 else None,
            vocab_start=layout.tp_rank * weight.shape[0],
            vocab_size=self.vocab_size,
        )
        return own.gather(logp_M), own.gather(entropy_M)


def forward_backward(
    model: DataParallel, microbatches: Sequence[MicroBatch], loss: Loss, layout: Layout
) -> Metrics:
    """Accumulate the gradient of the loss over this rank's micro-batches; every rank of the job calls it
    with equally many. Returns sums and maxima over the whole job."""
    forward = partial(_forward, read=partial(_with_token_count, loss), layout=layout)
    return _reduce(_run_schedule(model, microbatches, forward, forward_only=False), layout)


Reader = Callable[[MicroBatch, PolicyModel, Tensor, Layout], Tensor]


def score(
    model: PolicyModel, microbatches: Sequence[MicroBatch], read: Reader, layout: Layout
) -> list[Tensor]:
    """What `read` makes of each micro-batch's hidden states: [N] fp32, known to all stages of the replica."""
    forward = partial(_forward, read=read, layout=layout)
    # TE keeps delayed scales for every recomputation, and here none follows
    recomputed, model.config.recompute_granularity = model.config.recompute_granularity, None
    try:
        with torch.no_grad():
            found = _run_schedule(model, microbatches, forward, forward_only=True)
    finally:
        model.config.recompute_granularity = recomputed
    sizes = [len(microbatch.targets_N) for microbatch in microbatches]
    flat = torch.cat(found).float() if layout.is_last_stage else torch.empty(sum(sizes), device=layout.device)
    dist.broadcast(flat, src=layout.stage_rank(layout.pp_size - 1), group=layout.pp_group)
    return list(flat.split(sizes))


def update(optimizer: MegatronOptimizer) -> float | None:
    """Clip, step, and return the gradient's global norm before clipping; None where fp16 skips the step.

    Raises FloatingPointError where the norm is not finite, before the step, which would destroy the weights.
    """
    overflow = optimizer.prepare_grads()
    if (scale := loss_scale(optimizer)) is not None:
        scale.settle(overflow)
    if overflow:
        return None
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}; lower optimizer.lr or inspect the batch")
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
    optimizer.step_with_ready_grads()
    return norm


def describe_update(optimizer: MegatronOptimizer, norm: float | None, prefix: str = "") -> Metrics:
    """What `update` has done; in fp16 also the scale of the next loss, and whether the step was skipped."""
    found = {} if norm is None else {f"{prefix}grad_norm": norm}
    if (scale := loss_scale(optimizer)) is not None:
        found |= {f"{prefix}loss_scale": float(scale.scale), f"{prefix}skipped": float(norm is None)}
    return found


def _run_schedule(
    model: DataParallel | PolicyModel,
    microbatches: Sequence[MicroBatch],
    forward: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule for the layout; returns what the last stage made of each micro-batch."""
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(microbatches) for _ in model.chunks],
        model=list(model.chunks),
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens_1S.shape[1],  # a hint: lengths travel with each micro-batch
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


def _forward(
    batches: Iterator[MicroBatch], model: Any, read: Callable[..., Any], layout: Layout
) -> tuple[Tensor, Any]:
    microbatch = next(batches).to(layout.device)
    hidden = model(
        own_tokens(microbatch, layout),
        microbatch.positions_1S,
        None,
        packed_seq_params=PackedRow(
            qkv_format="thd",
            cu_seqlens_q=microbatch.boundaries_K,
            cu_seqlens_kv=microbatch.boundaries_K,
            max_seqlen_q=microbatch.longest,
            max_seqlen_kv=microbatch.longest,
            prompts=microbatch.prompts,
        ),
    )
    policy = model.module if isinstance(model, DataParallel) else model

    def of_hidden(hidden_SBH: Tensor, non_loss_data: bool = False) -> Any:
        return read(microbatch, policy, hidden_SBH, layout)

    return hidden, of_hidden


def _with_token_count(
    loss: Loss, microbatch: MicroBatch, model: PolicyModel, hidden_SBH: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Metrics]:
    """The three-part form that leaves the normalisation to the loss."""
    value, metrics = loss(microbatch, model, hidden_SBH, layout)
    return value, torch.ones((), dtype=torch.int), metrics


def _engine_gap(microbatch: MicroBatch, logp_N: Tensor) -> Metrics:
    """How far the engine's log-probabilities of the sampled tokens are from the trainer's; nats."""
    online_N = (microbatch.source_B == Source.ONLINE)[microbatch.rows_N]
    engine_N = microbatch.rollout_logp_BT[microbatch.rows_N, microbatch.columns_N]
    gap_N = (logp_N - engine_N).abs()[online_N]
    return {"sum/logp_gap": float(gap_N.sum()), "max/logp_gap": float(gap_N.max())} if len(gap_N) else {}


def _reduce(results: Sequence[Metrics], layout: Layout) -> Metrics:
    """Combine the last stage's micro-batch metrics over micro-batches and data-parallel ranks, everywhere."""
    local = added(results) if layout.is_last_stage else None
    box: list[Any] = [layout.gather_over_data(local) if layout.is_last_stage else None]
    dist.broadcast_object_list(box, src=layout.stage_rank(layout.pp_size - 1), group=layout.pp_group)
    return added(box[0])
