"""PPO's critic: the policy's network with a scalar head, its loss and its optimizer.

How advantages follow from its values is objective/advantage.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hpt_mega.config import Config
from hpt_mega.data.packing import MicroBatch
from hpt_mega.megatron.context import own_queries
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.optimizer import (
    DataParallel,
    MegatronOptimizer,
    build_optimizer,
    set_learning_rate,
    wrap_data_parallel,
    zero_gradients,
)
from hpt_mega.megatron.runtime import Layout
from hpt_mega.megatron.step import Metrics, describe_update, forward_backward, score, update
from hpt_mega.objective import Estimator, TokenBatch
from hpt_mega.objective.value import gae, value_loss


class ValueModel(PolicyModel):
    """A pipeline stage of the critic; the last one ends in a linear layer to one value a position.

    The head is replicated over tensor-parallel ranks and starts at zero, so that every first value is 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            head = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)
            self.output_layer = head
            torch.nn.init.zeros_(head.weight)


@dataclass
class Critic:
    """The critic's model and optimizer, trained beside the policy on the same micro-batches."""

    model: DataParallel
    optimizer: MegatronOptimizer
    lr: float
    clip: float
    layout: Layout

    def values(self, microbatches: Sequence[MicroBatch]) -> list[Tensor]:
        """[N] the value before each response token, by micro-batch."""
        return score(self.model, microbatches, _values_of, self.layout)

    def learn(self, microbatches: Sequence[MicroBatch], tokens: float, estimator: Estimator) -> Metrics:
        """One update on the clipped squared error; `tokens` is the number of response tokens of the job."""
        zero_gradients(self.model, self.optimizer)
        set_learning_rate(self.optimizer, self.lr)
        loss = partial(_value_loss, estimator=estimator, clip=self.clip, denominator=max(1.0, tokens))
        sums = forward_backward(self.model, microbatches, loss, self.layout)
        done = describe_update(self.optimizer, update(self.optimizer), "value_")
        return {"value_loss": sums["sum/value_loss"]} | done


def build_critic(model: PolicyModel, policy: PolicyModel, cfg: Config, layout: Layout) -> Critic:
    """The critic around a ValueModel, which starts from the weights of the policy's stage of this layout."""
    for chunk, source in zip(model.chunks, policy.chunks, strict=True):
        mine = dict(_tensors(chunk))
        with torch.no_grad():
            for name, tensor in _tensors(source):
                if not name.startswith("output_layer."):
                    mine[name].copy_(tensor)
    whole = replace(cfg.optimizer, lr=cfg.critic.lr, frozen=[], groups=[])
    settings = replace(cfg, optimizer=whole)
    wrapped = wrap_data_parallel(model, settings)
    return Critic(wrapped, build_optimizer(wrapped, settings), cfg.critic.lr, cfg.critic.clip, layout)


def _tensors(model: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers: a router's bias is one."""
    return chain(model.named_parameters(), model.named_buffers())


def _values_of(microbatch: MicroBatch, model: PolicyModel, hidden_SBH: Tensor, layout: Layout) -> Tensor:
    own = own_queries(microbatch, layout)
    return own.gather(model.output_layer(hidden_SBH[own.places_M, 0])[:, 0].float())


def _value_loss(
    microbatch: MicroBatch,
    model: PolicyModel,
    hidden_SBH: Tensor,
    layout: Layout,
    *,
    estimator: Estimator,
    clip: float,
    denominator: float,
) -> tuple[Tensor, Metrics]:
    values_BT = microbatch.to_response_grid(_values_of(microbatch, model, hidden_SBH, layout))
    mask_BT, old_BT = microbatch.mask_BT, microbatch.values_BT
    if old_BT is None:  # an inert micro-batch
        return (values_BT.sum() + hidden_SBH.sum()) * 0.0, {"sum/tokens": 0.0, "sum/value_loss": 0.0}
    options = estimator.row.options
    penalty_BT = None
    if estimator.penalises_reward:
        old_logp_BT, ref_logp_BT = microbatch.old_logp_BT, microbatch.ref_logp_BT
        assert old_logp_BT is not None  # learner.py has scored both
        penalty_BT = estimator.kl_penalty(TokenBatch(logp=old_logp_BT, mask=mask_BT, ref_logp=ref_logp_BT))
    reward_B = microbatch.reward_B
    _, returns_BT = gae(reward_B, old_BT, mask_BT, options.gae_gamma, options.gae_lambda, penalty_BT)
    loss = value_loss(values_BT, old_BT, returns_BT, mask_BT, clip) / denominator
    return loss, {"sum/tokens": float(mask_BT.sum()), "sum/value_loss": float(loss)}
