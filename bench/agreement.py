"""How closely the demo's real model in Megatron agrees with transformers, in fp32, layout by layout.

    python bench/agreement.py --out bench/results/agreement.md

Compared are the logits of every position and the gradient of the mean negative log-likelihood of all tokens
but the first, on three short texts, each parameter after its way back to its Hugging Face name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.ranks

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.config import Config, ParallelConfig, PrecisionConfig
from hpt_mega.trajectory import Source, Trajectory
from tests.ranks import run_ranks

MODEL = Path("models/smollm2-135m-instruct")
LAYOUTS = {
    "PP1": ParallelConfig(1, 1, 1),
    "PP2": ParallelConfig(1, 2, 1),
    "PP3": ParallelConfig(1, 3, 1),
    "TP3": ParallelConfig(3, 1, 1),
    "DP2": ParallelConfig(1, 1, 2),
}
TEXTS = (  # real text: on random tokens this model's own round-off, fp32 against fp64, is 2e-3
    "Tom has 3 apples and buys 4 more, then gives two of them to Anna. How many are left?",
    "The ferry left the harbour at six in the morning, and the two brothers stood at the rail.",
    "7 + 12 = 19, and 19 - 4 = 15, so the answer is 15.",
)


def token_ids() -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tuple(tokenizer(text).input_ids) for text in TEXTS]


def count_targets() -> int:
    return sum(len(ids) - 1 for ids in token_ids())


def write_reference(path: Path) -> None:
    """Logits of every text [S, V] and the gradient of every parameter, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    logits = []
    for ids in token_ids():
        logits_SV = model(torch.tensor([ids])).logits[0]
        logits.append(logits_SV.detach().clone())
        nll = torch.nn.functional.cross_entropy(logits_SV[:-1], torch.tensor(ids[1:]), reduction="sum")
        (nll / count_targets()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"logits": logits, "gradients": gradients}, path)


def differences(parallel: ParallelConfig, reference_path: Path) -> list[float]:
    """This rank's largest logit difference and largest gradient difference."""
    from hpt_mega.checkpoint.weights import load_hf, own_entries
    from hpt_mega.data.packing import collate
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import build_model
    from hpt_mega.megatron.optimizer import wrap_data_parallel
    from hpt_mega.megatron.step import Objective, forward_backward
    from hpt_mega.objective import algorithm
    from hpt_mega.resharding.mapping import family_for

    cfg = Config(parallel=parallel, precision=PrecisionConfig("fp32"))
    layout = runtime.initialize(cfg)
    checkpoint = HFCheckpoint(MODEL)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    model = build_model(shape, parallel, layout, torch.float32)
    load_hf(model, checkpoint, family, shape, layout)
    wrapped = wrap_data_parallel(model, cfg)
    mine = list(range(len(TEXTS)))[layout.dp_rank :: layout.dp_size]
    slots = -(-len(TEXTS) // layout.dp_size)  # every replica has as many micro-batches
    ids = token_ids()
    demonstrations = [Trajectory(ids[i][:1], ids[i][1:], i, Source.OFFLINE, 0) for i in mine]
    microbatches = [collate([t], [1.0]) for t in demonstrations]
    microbatches += [collate([], [])] * (slots - len(mine))
    reference = torch.load(reference_path, mmap=True)

    logit_difference = torch.zeros(())
    objective = LogitsToo(Objective(algorithm("sft"), float(count_targets()), 1.0, shape.vocab_size), [])
    wrapped.zero_grad_buffer()
    forward_backward(wrapped, microbatches, objective, layout)
    for index, logits_SV in zip(mine, objective.logits, strict=False):
        gap = (logits_SV[:, : shape.vocab_size] - reference["logits"][index]).abs().max()
        logit_difference = torch.maximum(logit_difference, gap)
    gradient_difference = 0.0
    for entry, parameter in own_entries(model, family, shape):
        whole = gather(parameter.main_grad, layout)  # type: ignore[attr-defined]
        for name, gradient in zip(entry.hf, entry.fusion.merge(whole, shape), strict=True):
            gap = (gradient - reference["gradients"][name]).abs().max()
            gradient_difference = max(gradient_difference, float(gap))
    runtime.shutdown()
    return [float(logit_difference), gradient_difference]


def gather(part: Tensor, layout: Any) -> list[Tensor]:
    shards = [torch.empty_like(part) for _ in range(layout.tp_size)]
    dist.all_gather(shards, part.contiguous(), group=layout.tp_group)
    return shards


class LogitsToo:
    """The objective, which also keeps the logits of the micro-batches that hold a sequence."""

    def __init__(self, objective: Any, logits: list[Tensor]) -> None:
        self._objective = objective
        self.logits = logits

    def __call__(self, microbatch: Any, model: Any, hidden_SBH: Tensor, layout: Any) -> Any:
        if len(microbatch.targets_N):
            with torch.no_grad():
                part_SV = hidden_SBH[:, 0] @ model.output_weight().t()
            self.logits.append(torch.cat(gather(part_SV, layout), dim=-1))
        return self._objective(microbatch, model, hidden_SBH, layout)


def table(rows: dict[str, tuple[float, float]], reference_path: Path) -> str:
    reference = torch.load(reference_path, mmap=True)
    largest_logit = max(float(logits.abs().max()) for logits in reference["logits"])
    largest_gradient = max(float(g.abs().max()) for g in reference["gradients"].values())
    lines = [
        "# Agreement with transformers in fp32",
        "",
        f"SmolLM2-135M-Instruct on three texts of {', '.join(str(len(ids)) for ids in token_ids())} tokens; "
        f"the largest logit is {largest_logit:.1f}, the largest gradient {largest_gradient:.2f}.",
        "",
        "| layout | largest logit difference | largest SFT-gradient difference |",
        "|---|---|---|",
        *(f"| {name} | {logit:.1e} | {gradient:.1e} |" for name, (logit, gradient) in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/agreement.md"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        reference_path = Path(folder) / "reference.pt"
        write_reference(reference_path)
        rows = {}
        for name, parallel in LAYOUTS.items():
            job = Path(folder) / name
            job.mkdir()
            ranks = run_ranks(differences, parallel.world_size, job, parallel, reference_path)
            rows[name] = (max(rank[0] for rank in ranks), max(rank[1] for rank in ranks))
        text = table(rows, reference_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
