"""One update: Megatron's forward-backward schedule over micro-batches with the unified objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.data.packing import MicroBatch
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.optimizer import DistributedDataParallel, MegatronOptimizer
from hpt_mega.megatron.runtime import Layout
from hpt_mega.objective import Estimator, TokenBatch
from hpt_mega.objective.logprob import token_logprobs
from hpt_mega.trajectory import Source

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

Metrics = dict[str, float]


@dataclass(frozen=True)
class Objective:
    """What a step minimises: the estimator, its global denominator, and how log-probs are taken."""

    estimator: Estimator
    denominator: float
    temperature: float
    vocab_size: int


def forward_backward(
    model: DistributedDataParallel, microbatches: Sequence[MicroBatch], objective: Objective, layout: Layout
) -> Metrics:
    """Accumulate the gradient of the objective over this rank's micro-batches; every rank of the job calls
    it with equally many. Returns sums and maxima over the whole job."""
    forward = partial(_forward, objective=objective, layout=layout)
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens_BS.shape[1],  # a hint: lengths travel with each micro-batch
        micro_batch_size=microbatches[0].tokens_BS.shape[0],
        forward_only=False,
    )
    return _reduce(results, layout)


def update(optimizer: MegatronOptimizer) -> float:
    """Clip, step, and return the gradient's global norm before clipping.

    Raises FloatingPointError where the norm is not finite: a step on NaNs would destroy the weights.
    """
    successful, norm, _ = optimizer.step()
    norm = float(norm)
    if not successful or not torch.isfinite(torch.tensor(norm)):
        raise FloatingPointError(f"the gradient's norm is {norm}; lower optimizer.lr or inspect the batch")
    return norm


def token_logprobs_of(
    microbatch: MicroBatch, hidden_SBH: Tensor, model: PolicyModel, objective: Objective, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [N] fp32 of the micro-batch's response tokens (last stage only)."""
    return token_logprobs(
        hidden_SBH[microbatch.query_positions_N, microbatch.rows_N],
        model.output_weight(),
        microbatch.targets_N,
        temperature=objective.temperature,
        group=layout.tp_group if layout.tp_size > 1 else None,
        vocab_start=layout.tp_rank * model.output_weight().shape[0],
        vocab_size=objective.vocab_size,
    )


def _forward(
    batches: Iterator[MicroBatch], model: Any, objective: Objective, layout: Layout
) -> tuple[Tensor, Any]:
    microbatch = next(batches)
    hidden = model(microbatch.tokens_BS, microbatch.positions_1S, None)
    policy = model.module if isinstance(model, DistributedDataParallel) else model
    return hidden, partial(_loss, microbatch, policy, objective, layout)


def _loss(
    microbatch: MicroBatch, model: PolicyModel, objective: Objective, layout: Layout, hidden_SBH: Tensor
) -> tuple[Tensor, Tensor, Metrics]:
    logp_N, entropy_N = token_logprobs_of(microbatch, hidden_SBH, model, objective, layout)
    logp_BT = microbatch.to_response_grid(logp_N)
    batch = TokenBatch(
        logp=logp_BT,
        old_logp=logp_BT.detach(),  # one update a batch of rollouts: the old policy is the current one
        rollout_logp=microbatch.rollout_logp_BT,
        mask=microbatch.mask_BT,
        reward=microbatch.reward_B,
        group=microbatch.group_B,
        source=microbatch.source_B,
        advantage=microbatch.advantage_B[:, None].expand_as(microbatch.mask_BT),
        weight=microbatch.weight_B,
        entropy=microbatch.to_response_grid(entropy_N),
    )
    out = objective.estimator(batch, denominator=objective.denominator)
    loss = out.loss
    if not hidden_SBH.requires_grad or not len(logp_N):  # an inert micro-batch still runs the backward
        loss = loss + hidden_SBH.sum() * 0.0
    metrics = _token_metrics(microbatch, logp_N.detach(), entropy_N.detach())
    metrics["sum/loss"] = float(out.loss)
    metrics.update({f"objective/{name}": value for name, value in out.metrics.items()})
    return loss, torch.ones((), dtype=torch.int), metrics


def _token_metrics(microbatch: MicroBatch, logp_N: Tensor, entropy_N: Tensor) -> Metrics:
    """Sums over tokens, so that they add up over micro-batches; and the trainer/engine log-prob gap."""
    online_N = (microbatch.source_B == Source.ONLINE)[microbatch.rows_N]
    engine_N = microbatch.rollout_logp_BT[microbatch.rows_N, microbatch.columns_N]
    gap_N = (logp_N - engine_N).abs()[online_N]
    return {
        "sum/tokens": float(len(logp_N)),
        "sum/entropy": float(entropy_N.sum()),
        "sum/online_tokens": float(online_N.sum()),
        "sum/logp_gap": float(gap_N.sum()),
        "max/logp_gap": float(gap_N.max()) if len(gap_N) else 0.0,
    }


def _reduce(results: Sequence[Metrics], layout: Layout) -> Metrics:
    """Combine the last stage's micro-batch metrics over micro-batches and data-parallel ranks, everywhere.

    `sum/` metrics add, `max/` take the maximum, `objective/` ones are averaged over micro-batches.
    """
    local = list(results) if layout.is_last_stage else None
    box: list[Any] = [layout.gather_over_data(local) if layout.is_last_stage else None]
    dist.broadcast_object_list(box, src=layout.stage_rank(layout.pp_size - 1), group=layout.pp_group)
    everyone = [metrics for rank in box[0] for metrics in rank]
    combined: Metrics = {}
    for name in dict.fromkeys(name for metrics in everyone for name in metrics):
        values = [metrics[name] for metrics in everyone if name in metrics]
        if name.startswith("max/"):
            combined[name] = max(values)
        elif name.startswith("sum/"):
            combined[name] = sum(values)
        else:
            combined[name] = sum(values) / len(values)
    return combined
