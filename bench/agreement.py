"""How closely the demo's real model in Megatron agrees with transformers, in fp32, layout by layout.

    PYTHONPATH=. python bench/agreement.py --out bench/results/agreement.md

Compared are the logits of every position and the gradient of the mean negative log-likelihood of all tokens
but the first, on three short texts, each parameter after its way back to its Hugging Face name.
Transformers in fp64 tells whose round-off a difference is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
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


def by_transformers(dtype: torch.dtype) -> dict[str, Any]:
    """Logits of every text [S, V] and the gradient of every parameter."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    logits = []
    for ids in token_ids():
        logits_SV = model(torch.tensor([ids])).logits[0]
        logits.append(logits_SV.detach().clone())
        nll = torch.nn.functional.cross_entropy(logits_SV[:-1], torch.tensor(ids[1:]), reduction="sum")
        (nll / count_targets()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "gradients": gradients}


def largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, element by element; 0 where a rank holds nothing to compare."""
    return max((float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)), default=0.0)


def differences(parallel: ParallelConfig, reference_path: Path) -> list[float]:
    """This rank's largest differences: logits from transformers in fp32 and fp64, gradients likewise."""
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
    objective = LogitsToo(Objective(algorithm("sft"), float(count_targets()), 1.0, shape.vocab_size), [])
    wrapped.zero_grad_buffer()
    forward_backward(wrapped, microbatches, objective, layout)
    held = mine if layout.is_last_stage else []
    logits = [logits_SV[:, : shape.vocab_size] for logits_SV in objective.logits]
    gradients: dict[str, Tensor] = {}
    for entry, parameter in own_entries(model, family, shape):
        whole = gather(parameter.main_grad, layout)  # type: ignore[attr-defined]
        gradients |= dict(zip(entry.hf, entry.fusion.merge(whole, shape), strict=True))
    runtime.shutdown()
    references = torch.load(reference_path, mmap=True)
    return [
        *(largest(logits, [r["logits"][i] for i in held]) for r in references),
        *(largest(list(gradients.values()), [r["gradients"][n] for n in gradients]) for r in references),
    ]


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


def table(rows: dict[str, list[float]], largest_logit: float, largest_gradient: float) -> str:
    lengths = ", ".join(str(len(ids)) for ids in token_ids())
    lines = [
        "# Agreement with transformers",
        "",
        f"SmolLM2-135M-Instruct in fp32 on three texts of {lengths} tokens. The largest logit is "
        f"{largest_logit:.1f}, the largest gradient {largest_gradient:.2f}; the numbers are the largest "
        "differences of all elements.",
        "",
        "| layout | logits, from transformers fp32 | logits, from fp64 "
        "| SFT gradient, from transformers fp32 | SFT gradient, from fp64 |",
        "|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(f'{value:.1e}' for value in row)} |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/agreement.md"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        reference_path = Path(folder) / "reference.pt"
        single, double = by_transformers(torch.float32), by_transformers(torch.float64)
        torch.save((single, double), reference_path)
        names = list(double["gradients"])
        own_logits = largest(single["logits"], double["logits"])
        own_gradients = largest(*([r["gradients"][n] for n in names] for r in (single, double)))
        rows = {"transformers fp32": [0.0, own_logits, 0.0, own_gradients]}
        for name, parallel in LAYOUTS.items():
            job = Path(folder) / name
            job.mkdir()
            ranks = run_ranks(differences, parallel.world_size, job, parallel, reference_path)
            rows[name] = [max(values) for values in zip(*ranks, strict=True)]
    logit, gradient = (
        max(float(tensor.abs().max()) for tensor in tensors)
        for tensors in (double["logits"], double["gradients"].values())
    )
    text = table(rows, logit, gradient)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
