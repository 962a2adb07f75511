"""token_logprobs against torch's log_softmax, alone and with the vocabulary shared by two processes."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from hpt_mega.objective.logprob import token_logprobs

TOKENS, HIDDEN, VOCAB, TRUE_VOCAB, TEMPERATURE = 13, 7, 22, 19, 0.7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, TRUE_VOCAB, (TOKENS,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight[:TRUE_VOCAB].t() / TEMPERATURE, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def mixture(logp: Tensor, entropy: Tensor) -> Tensor:
    """A scalar in which every token and both outputs carry a different coefficient."""
    coefficient = torch.linspace(-1.0, 2.0, TOKENS, dtype=logp.dtype)
    return (coefficient * logp).sum() + (coefficient.square() * entropy).sum()


def expected() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, entropy = reference(hidden, weight, targets)
    grads = torch.autograd.grad(mixture(logp, entropy), (hidden, weight))
    return logp.detach(), entropy.detach(), *grads


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 256])
def test_values_and_gradients_equal_log_softmax_for_every_chunk_size(chunk_tokens: int) -> None:
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, entropy = token_logprobs(
        hidden, weight, targets, temperature=TEMPERATURE, chunk_tokens=chunk_tokens, vocab_size=TRUE_VOCAB
    )
    got = (logp, entropy, *torch.autograd.grad(mixture(logp, entropy), (hidden, weight)))
    for ours, theirs in zip(got, expected(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_may_be_used_alone(output: int) -> None:
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    ours = token_logprobs(hidden, weight, targets, temperature=TEMPERATURE, vocab_size=TRUE_VOCAB)[output]
    theirs = reference(hidden, weight, targets)[output]
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("rows_at_once", [8, 4096])
def test_bf16_products_keep_fp32_statistics(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpt_mega.objective.logprob._ROWS_AT_ONCE", rows_at_once)
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, entropy = token_logprobs(
        hidden, weight, targets, temperature=TEMPERATURE, chunk_tokens=4, vocab_size=TRUE_VOCAB
    )
    assert logp.dtype == entropy.dtype == torch.float32
    got = (logp, entropy, *torch.autograd.grad(mixture(logp, entropy), (hidden, weight)))
    assert [x.dtype for x in got[2:]] == [torch.bfloat16] * 2
    for ours, theirs in zip(got, expected(), strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(torch.float32)
    hidden = (hidden * 1e4).requires_grad_()
    logp, entropy = token_logprobs(hidden, weight, targets)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert logp.isfinite().all() and entropy.min() >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"targets_N": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"weight_VH": torch.zeros(4, 2)}, "weight"),
        ({"weight_VH": torch.zeros(VOCAB, HIDDEN)}, "dtype"),
    ],
)
def test_misuse_is_an_error_that_names_the_argument(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=message):
        token_logprobs(**({"hidden_NH": hidden, "weight_VH": weight, "targets_N": targets} | change))


def vocab_parallel_rank(rank: int, port: int, boundary: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight, targets = inputs(dtype)
        hidden.requires_grad_()
        part = weight[:boundary] if rank == 0 else weight[boundary:]
        part = part.clone().requires_grad_()
        logp, entropy = token_logprobs(
            hidden, part, targets, temperature=TEMPERATURE, chunk_tokens=5, group=dist.group.WORLD,
            vocab_start=rank * boundary, vocab_size=TRUE_VOCAB,
        )  # fmt: skip
        grads = torch.autograd.grad(mixture(logp, entropy), (hidden, part))
        torch.save([x.detach() for x in (logp, entropy, *grads)], f"{path}/{dtype}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("boundary", [11, 20])  # 20: the second rank holds nothing but padding
def test_two_vocab_parallel_ranks_give_the_whole_result(boundary: int, tmp_path: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(vocab_parallel_rank, (port, boundary, str(tmp_path)), nprocs=2, join=False)
    try:
        assert context.join(timeout=40) or context.join(timeout=20), "ranks did not finish in time"
    finally:
        for process in context.processes:
            process.kill()
    logp, entropy, grad_hidden, grad_weight = expected()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.03)):
        for rank, rows in enumerate((slice(0, boundary), slice(boundary, None))):
            got = torch.load(f"{tmp_path}/{dtype}-{rank}.pt")
            whole = (logp, entropy, grad_hidden, grad_weight[rows])
            for ours, theirs in zip(got, whole, strict=True):
                scale = max(1.0, float(theirs.abs().max()))
                assert (ours - theirs).abs().max() <= tolerance * scale
