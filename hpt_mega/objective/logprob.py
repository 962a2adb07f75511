"""Log-probability and entropy of chosen tokens from vocab-parallel hidden states, in chunks of tokens.

The output projection lives inside, so no [tokens, vocabulary] tensor outlives one chunk; losses live in
estimator.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ROWS_AT_ONCE = 4096  # of the weight gradient, so that a bf16 product is widened while it is in cache
_BLOCK = {"cpu": 2**20}  # logits a softmax works on at once: they stay in cache between its passes
_BLOCK_ELSEWHERE = 2**25  # where launching a kernel costs more than memory
_LOWEST = -1e30  # stands in for the maximum over no columns; finite, so differences stay finite


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy of that softmax, in nats.

    hidden_NH: [N, H] fp32, bf16 or fp64; equal on every rank of `group`.
    weight_VH: [V, H], same dtype: this rank's rows [vocab_start, vocab_start + V) of the output layer.
    targets_N: [N] int64 token ids in the whole vocabulary.
    group: the tensor-parallel group that shares the vocabulary; None when this rank holds all of it.
    vocab_size: the true vocabulary; rows from there on are padding and take no part (their gradient is 0).

    Returns (logp_N, entropy_N): [N] fp32 (fp64 for fp64 input), equal on every rank, both differentiable.

    The products run in the dtype of `hidden`, the softmax in fp32 over a few tokens at a time. Memory beyond
    inputs, outputs and gradients is one buffer of [chunk_tokens, V] and, below fp32, the weight gradient in
    fp32; the backward pass recomputes the logits (one product forward, three backward). Gradients: `weight`
    gets this rank's rows, accumulated over chunks in fp32; `hidden` gets the whole gradient, always
    all-reduced over `group` here. Under sequence parallelism gather the hidden states first with an
    operation whose backward splits instead of reduce-scatters, or the gradient is summed twice.

    Raises ValueError for shapes, dtypes or a temperature that do not fit.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature, chunk_tokens)
    rows = weight_VH.shape[0]
    real_rows = rows if vocab_size is None else min(max(vocab_size - vocab_start, 0), rows)
    shard = _Shard(vocab_start, real_rows, 1.0 / temperature, chunk_tokens, group)
    apply: Any = _TokenLogprobs.apply  # torch ships it without annotations
    logp_N, entropy_N = apply(hidden_NH, weight_VH, targets_N, shard)
    return logp_N, entropy_N


@dataclass(frozen=True)
class _Shard:
    """Which rows of the vocabulary this rank holds, and how it goes through the tokens."""

    start: int
    rows: int
    inverse_temperature: float
    chunk_tokens: int
    group: dist.ProcessGroup | None

    def local_targets(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard (0 where it lies elsewhere), and whether it lies here."""
        local = targets_N - self.start
        here = (local >= 0) & (local < self.rows)
        return torch.where(here, local, 0), here

    def chunks(self, tokens: int) -> list[slice]:
        return [slice(i, min(i + self.chunk_tokens, tokens)) for i in range(0, tokens, self.chunk_tokens)]


class _Logits:
    """The logits of one chunk at a time, widened for the softmax a block of rows at a time."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, shard: _Shard) -> None:
        self.hidden, self.weight, self.scale = hidden_NH, weight_VH, shard.inverse_temperature
        self.product = hidden_NH.new_empty(min(shard.chunk_tokens, hidden_NH.shape[0]), shard.rows)
        dtype = _softmax_dtype(hidden_NH)
        block = _BLOCK.get(hidden_NH.device.type, _BLOCK_ELSEWHERE)
        self.rows = max(1, min(block // max(shard.rows, 1), len(self.product)))
        self.scratch = torch.empty(self.rows, shard.rows, dtype=dtype, device=hidden_NH.device)
        self.wide = None if self.product.dtype == dtype else torch.empty_like(self.scratch)

    def blocks(self, chunk: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(tokens, scaled logits [R, V], scratch [R, V]) by block, both free to be overwritten."""
        torch.mm(self.hidden[chunk], self.weight.t(), out=self.product[: chunk.stop - chunk.start])
        for start in range(chunk.start, chunk.stop, self.rows):
            tokens = slice(start, min(start + self.rows, chunk.stop))
            logits = self._product(tokens, chunk)
            if self.wide is not None:
                logits = self.wide[: tokens.stop - start].copy_(logits)
            if self.scale != 1.0:
                logits.mul_(self.scale)
            yield tokens, logits, self.scratch[: tokens.stop - start]

    def replace(self, tokens: slice, chunk: slice, gradient_RV: Tensor) -> None:
        """Put the gradient of a block's logits, in the dtype of the products, in the logits' place."""
        self._product(tokens, chunk).copy_(gradient_RV)

    def _product(self, tokens: slice, chunk: slice) -> Tensor:
        return self.product[tokens.start - chunk.start : tokens.stop - chunk.start]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, shard: _Shard
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shard = shard
        log_normaliser_N, target_logit_N, mean_logit_N = _statistics(hidden_NH, weight_VH, targets_N, shard)
        entropy_N = log_normaliser_N - mean_logit_N
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, log_normaliser_N, entropy_N)
        return target_logit_N - log_normaliser_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        """d logp / d z_j = 1[j = target] - p_j and d entropy / d z_j = -p_j (log p_j + entropy)."""
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, targets_N, log_normaliser_N, entropy_N = ctx.saved_tensors
        shard: _Shard = ctx.shard
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(log_normaliser_N)
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        rows_VH = weight_VH[: shard.rows]
        grad_hidden_NH = torch.zeros_like(hidden_NH) if need_hidden else None
        wide = log_normaliser_N.dtype
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if need_weight else None
        column_N, here_N = shard.local_targets(targets_N)
        logits = _Logits(hidden_NH, rows_VH, shard)
        for chunk in shard.chunks(hidden_NH.shape[0]) if shard.rows else []:
            for tokens, logp_RV, grad_RV in logits.blocks(chunk):
                logp_RV.sub_(log_normaliser_N[tokens, None])
                torch.exp(logp_RV, out=grad_RV)
                up = grad_logp_N[tokens, None] * shard.inverse_temperature
                if grad_entropy_N is None:
                    grad_RV.mul_(-up)
                else:
                    slope = grad_entropy_N[tokens, None] * -shard.inverse_temperature
                    grad_RV.mul_(logp_RV.add_(entropy_N[tokens, None]).mul_(slope).sub_(up))
                grad_RV.scatter_add_(1, column_N[tokens, None], up * here_N[tokens, None])
                logits.replace(tokens, chunk, grad_RV)
            narrow_CV = logits.product[: chunk.stop - chunk.start]
            if grad_hidden_NH is not None:
                torch.mm(narrow_CV, rows_VH, out=grad_hidden_NH[chunk])
            if grad_weight_VH is not None:
                _accumulate(grad_weight_VH[: shard.rows], narrow_CV, hidden_NH[chunk])
        if grad_hidden_NH is not None and shard.group is not None:
            dist.all_reduce(grad_hidden_NH, group=shard.group)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None


def _statistics(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, shard: _Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """(log sum exp z, z of the target, E z) over the whole vocabulary, each [N]; two collectives in all."""
    tokens = hidden_NH.shape[0]
    maximum_N = torch.full((tokens,), _LOWEST, dtype=_softmax_dtype(hidden_NH), device=hidden_NH.device)
    sums_3N = maximum_N.new_zeros((3, tokens))  # sum exp(z - max), sum exp(z - max) (z - max), target's z
    column_N, here_N = shard.local_targets(targets_N)
    logits = _Logits(hidden_NH, weight_VH[: shard.rows], shard)
    for chunk in shard.chunks(tokens) if shard.rows else []:
        for block, z_RV, exp_RV in logits.blocks(chunk):
            sums_3N[2, block] = z_RV.gather(1, column_N[block, None])[:, 0] * here_N[block]
            torch.amax(z_RV, dim=1, out=maximum_N[block])
            torch.exp(z_RV.sub_(maximum_N[block, None]), out=exp_RV)
            torch.sum(exp_RV, dim=1, out=sums_3N[0, block])
            torch.sum(exp_RV.mul_(z_RV), dim=1, out=sums_3N[1, block])
    if shard.group is not None:
        local_N = maximum_N.clone()
        dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=shard.group)
        shift_N = local_N - maximum_N
        sums_3N[1] += sums_3N[0] * shift_N
        sums_3N[:2] *= shift_N.exp()
        dist.all_reduce(sums_3N, group=shard.group)
    return maximum_N + sums_3N[0].log(), sums_3N[2], maximum_N + sums_3N[1] / sums_3N[0]


def _accumulate(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad.T @ hidden, in the dtype of total."""
    if grad_CV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
        return
    for start in range(0, total_VH.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        total_VH[rows].add_((grad_CV[:, rows].t() @ hidden_CH).float())


def _softmax_dtype(hidden_NH: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_NH.dtype, torch.float32)


def _check(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, chunk_tokens: int
) -> None:
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H] with one H; got {list(hidden_NH.shape)} "
            f"and {list(weight_VH.shape)}"
        )
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"targets must be [{hidden_NH.shape[0]}], one a token; got {list(targets_N.shape)}")
    if hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(f"hidden and weight must share a dtype; got {hidden_NH.dtype} and {weight_VH.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1; got {chunk_tokens}")
