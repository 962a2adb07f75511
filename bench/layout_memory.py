"""Memory of a training process: recomputed activations, the distributed optimizer, and saving its state.

    PYTHONPATH=. python bench/layout_memory.py --out bench/results/layout_memory.md

Peaks are of the resident set (VmHWM, reset before the phase), in MiB above what was resident at its start.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import tempfile
from pathlib import Path

import torch

from hpt_mega.config import Config, ParallelConfig, PrecisionConfig
from hpt_mega.trajectory import Source, Trajectory
from hpt_mega.validation.values import CHECKPOINT_FORMATS
from tests.ranks import run_ranks

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "intermediate_size": 896,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
LENGTHS = (700, 600, 500, 248)  # one micro-batch of 2,048 tokens


def resident(field: str) -> float:
    """MiB of VmRSS or VmHWM of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


class Peak:
    """The highest resident set within the block, in MiB above that at its start."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory must not be taken for held
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.above = resident("VmHWM") - self.before


def measure(parallel: ParallelConfig, lengths: tuple[int, ...], save: str, folder: Path) -> dict[str, float]:
    """Peaks of the second step and of a save, and the optimizer's bytes, on this rank."""
    from hpt_mega.data.packing import collate
    from hpt_mega.megatron import runtime, state
    from hpt_mega.megatron.model import build_model
    from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel, zero_gradients
    from hpt_mega.megatron.step import Objective, forward_backward, update
    from hpt_mega.objective import algorithm
    from hpt_mega.resharding.mapping import family_for

    cfg = Config(parallel=parallel, precision=PrecisionConfig("fp32"))
    layout = runtime.initialize(cfg)
    shape = family_for(LLAMA).read_shape(LLAMA)
    model = build_model(shape, parallel, layout, torch.float32)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    wrapped = wrap_data_parallel(model, cfg)
    optimizer = build_optimizer(wrapped, cfg)
    items = [Trajectory((1,) * 8, (2,) * (n - 8), i, Source.OFFLINE, 0) for i, n in enumerate(lengths)]
    batch = [collate(items, [1.0] * len(items))]
    objective = Objective(algorithm("sft"), float(sum(lengths)), 1.0, shape.vocab_size)
    for _ in range(2):  # the first makes the optimizer's state
        zero_gradients(wrapped, optimizer)
        with Peak() as step:
            forward_backward(wrapped, batch, objective, layout)
        update(optimizer)
    with Peak() as idle:
        pass
    found = {"step": step.above, "held": idle.before, "save": 0.0}
    found["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [s for part in parts for s in part.optimizer.state.values()]
    found["state"] = sum(t.numel() * 4 for s in states for t in s.values() if torch.is_tensor(t)) / 2**20
    if save:
        cfg.trainer.checkpoint_format = save
        with Peak() as saving:
            writer = state.begin_save(folder, model, optimizer, {}, layout, cfg)
            writer.write()
            writer.complete()
        found["save"] = saving.above
    runtime.shutdown()
    return found


def job(parallel: ParallelConfig, lengths: tuple[int, ...], save: str = "") -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as results, tempfile.TemporaryDirectory() as folder:
        return run_ranks(measure, parallel.world_size, Path(results), parallel, lengths, save, Path(folder))


def recompute_table() -> list[str]:
    lines = ["| recompute | peak of forward and backward, MiB | beside none |", "|---|---|---|"]
    base = 0.0
    for mode in ("none", "selective", "full"):
        (found,) = job(ParallelConfig(pp=1, recompute=mode), LENGTHS)
        base = base or found["step"]
        lines.append(f"| {mode} | {found['step']:.0f} | {found['step'] / base:.2f} |")
        print(lines[-1], flush=True)
    return lines


def optimizer_table() -> list[str]:
    lines = [
        "| ranks | distributed optimizer | Adam's moments a rank, MiB | resident after a step, MiB "
        "| peak of a save above it, MiB |",
        "|---|---|---|---|---|",
    ]
    for dp in (2, 4):
        rows = [("no", False, "dp_reshardable")]
        rows += [(f"yes; {save}", True, save) for save in CHECKPOINT_FORMATS]
        for name, sharded, save in rows:
            parallel = ParallelConfig(pp=1, dp=dp, distributed_optimizer=sharded)
            ranks = job(parallel, (60, 40), save)
            most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            columns = [f"{most[key]:.0f}" for key in ("state", "held", "save")]
            lines.append(f"| {dp} | {name} | {' | '.join(columns)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = sum(LENGTHS)
    optimizer = optimizer_table()
    lines = [
        "# Memory of layouts",
        "",
        f"A Llama of 12 layers, 320 wide, in fp32; {size:,} packed tokens a step; torch {torch.__version__}.",
        "",
        *recompute_table(),
        "",
        *optimizer,
    ]
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
