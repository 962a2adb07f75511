"""Seconds of a weight update from a Megatron trainer (PP2) into a running vLLM, beside two other ways.

    PYTHONPATH=. python bench/resharding.py --out bench/results/resharding.md

The same bytes, the same engine, turn by turn: a plain copy in memory, our update through memory and through a
process group (gloo over the loopback interface), and the naive way: gather tensor by tensor, save a Hugging
Face folder, have vLLM reload it. SmolLM2-135M and a random model of about 1 GB (in bf16). Beside them what no
way can do without: oneDNN's packing of the linear layers, alone, which vLLM's CPU kernels compute from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hpt_mega.checkpoint.weights import export_hf
from hpt_mega.config import ParallelConfig
from hpt_mega.megatron.model import DTYPES
from hpt_mega.resharding.planner import Plan
from hpt_mega.rollout.external import RemoteClient
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import ServerSettings, VLLMClient, VLLMServer
from tests.megatron.tiny import build_policy, config
from tests.ranks import run_ranks

ROUNDS = 5
START_S, MEASURE_S = 600.0, 1800.0
BUCKET_MIB = 256
LARGE = {
    "vocab_size": 49152,
    "hidden_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 4608,
    "tie_word_embeddings": False,
}


@dataclass
class Timed:
    """The client's part of an update, with the seconds of each phase."""

    client: VLLMClient
    seconds: dict[str, float] = field(default_factory=dict)

    def begin_update(self) -> None:
        self._charge("begin", self.client.begin_update)

    def load(self, index: int, checksums: Sequence[str]) -> None:
        self._charge("engine reads, loads, packs", lambda: self.client.load(index, checksums))

    def finish_update(self, policy_version: int) -> None:
        self._charge("finish", lambda: self.client.finish_update(policy_version))

    def _charge(self, phase: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def pack(weights: Sequence[Tensor]) -> None:
    """As vLLM packs its linear layers, with all cores."""
    from vllm import _custom_ops  # heavy, and of one rank

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for weight in weights:
        _custom_ops.create_onednn_mm(weight.t(), 32)
    torch.set_num_threads(1)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a kernel for the dtype on this machine; where not, vLLM does not pack either."""
    try:
        pack([weight])
    except RuntimeError:
        return False
    return True


def linear_weights(plan: Plan, dtype: torch.dtype) -> list[Tensor]:
    """Tensors like those that vLLM packs: every matrix but an embedding that is no output layer."""
    shapes = {slot.name: slot.shape for bucket in plan.buckets for slot in bucket.slots}
    untied = "lm_head.weight" in shapes
    return [
        torch.rand(shape).to(dtype)
        for name, shape in shapes.items()
        if len(shape) == 2 and not (untied and "embed_tokens" in name)
    ]


def measure(client: VLLMClient, model: Path, folder: Path, dtype: str) -> dict[str, list[float]]:
    """One trainer rank; on the leader, seconds by way or phase, a number a round."""
    policy = build_policy(model, config(ParallelConfig(pp=2), dtype=dtype), train=False)
    sync = WeightSync(policy.model, policy.family, policy.shape, policy.layout, BUCKET_MIB << 20)
    leads = policy.layout.is_leader
    remote = RemoteClient(client.name, client.url, client.key, 300.0, 300.0, 300.0, client.log)
    source = torch.ones(sync.plan.nbytes if leads else 1, dtype=torch.uint8)
    weights = linear_weights(sync.plan, DTYPES[dtype]) if leads else []
    packs = policy.layout.broadcast_object(can_pack(weights[0]) if leads else None)
    target = torch.empty_like(source)
    found: dict[str, list[float]] = {"bytes": [float(sync.plan.nbytes)]}

    def timed(name: str, work: Callable[[], object]) -> None:
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - began)

    for number in range(ROUNDS + 1):  # the first one touches all memory and is left out
        engine = Timed(client)
        timed("copy", lambda: target.copy_(source))
        if packs:
            timed("packing alone", lambda: pack(weights) if leads else None)
        if leads:
            client.connect(sync.path, sync.plan)
        timed("update", lambda engine=engine, number=number: sync.send([engine] if leads else [], number))
        for phase, seconds in engine.seconds.items():
            found.setdefault(phase, []).append(seconds)
        if leads:
            remote.connect(sync.path, sync.plan)
        timed("update, network", lambda number=number: sync.send([remote] if leads else [], number))
        remote.leave()
        timed(
            "gather and save",
            lambda: export_hf(policy.model, policy.family, policy.shape, folder, model, policy.layout),
        )
        timed("reload", lambda: reload(client, folder) if leads else None)
    return found


def reload(client: VLLMClient, folder: Path) -> None:
    """vLLM's own way from a folder; JSON's kwargs reach the worker's method as they are."""
    client._post(
        "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}, 300.0
    )


def random_model(folder: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE, dtype="bfloat16"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def rows(name: str, found: dict[str, list[float]]) -> list[str]:
    """The table's lines of one model."""
    (size,) = found.pop("bytes")
    found = {what: seconds[1:] for what, seconds in found.items()}
    naive = [a + b for a, b in zip(found["gather and save"], found["reload"], strict=True)]
    middle = {what: statistics.median(seconds) for what, seconds in (found | {"naive": naive}).items()}
    lines = [
        f"\n{name}, {size / 1e9:.2f} GB\n",
        "| what | min | median | max | GB/s | of the update |",
        "|---|---|---|---|---|---|",
    ]
    for what, seconds in (found | {"naive way": naive}).items():
        middle_s = statistics.median(seconds)
        lines.append(
            f"| {what} | {min(seconds):.3f} s | {middle_s:.3f} s | {max(seconds):.3f} s | "
            f"{size / middle_s / 1e9:.2f} | {middle_s / middle['update']:.2f}x |"
        )
    lines.append(
        f"\nUpdate against plain copy: {middle['update'] / middle['copy']:.1f}x (wanted: at most 3x; copy "
        f"and packing: {(middle['copy'] + middle.get('packing alone', 0.0)) / middle['copy']:.1f}x). "
        f"Naive way against update: {middle['naive'] / middle['update']:.1f}x (wanted: at least 10x)."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--small", action="store_true", help="the first model alone")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dtype = str(DTYPES[given.dtype]).removeprefix("torch.")
    text = [
        "# Weight updates into a running engine",
        "",
        f"Two trainer ranks, one vLLM, {given.dtype}, buckets of {BUCKET_MIB} MiB, {ROUNDS} rounds.",
    ]
    scratch = Path(tempfile.mkdtemp(prefix="resharding"))
    try:
        models = [("SmolLM2-135M", given.model)]
        models += [] if given.small else [("Random Llama", random_model(scratch / "large"))]
        for name, model in models:
            settings = ServerSettings(model, dtype, 256, 8, 1, 0, 1, 0.5, False)
            server = VLLMServer("bench", settings, scratch / "bench.log", 300.0, 300.0)
            ranks = scratch / f"ranks {name}"
            ranks.mkdir()
            try:
                server.start(START_S)
                arguments = (server.client, model, scratch / "saved", given.dtype)
                found = run_ranks(measure, 2, ranks, *arguments, deadline_s=MEASURE_S)[0]
            finally:
                server.close()
            text += rows(name, found)
    finally:
        shutil.rmtree(scratch)
    given.out.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
