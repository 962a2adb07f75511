"""Checks of a job's nodes before it starts: what they lack, where they differ, how fast NCCL is.

What is installed is told by doctor.py; here the nodes are compared.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from hpt_mega.files import write_atomically

NEEDED = ("torch", "megatron-core", "transformers", "math-verify")
NEEDED_ON_GPU = ("transformer-engine",)
REDUCED_BYTES = 2**28
DEADLINE_S = 300

Node = Mapping[str, Any]


def write_node(folder: Path, run_dir: Path) -> None:
    """Write FOLDER/NODE.json; needs a folder that all nodes see, which is thereby tested too."""
    from hpt_mega.doctor import diagnose

    name = os.environ.get("SLURMD_NODENAME", platform.node())
    run_dir.mkdir(parents=True, exist_ok=True)
    found = {
        "node": name,
        "gpus_given": int(os.environ.get("SLURM_GPUS_ON_NODE", "0")),
        "free_gib": shutil.disk_usage(run_dir).free / 2**30,
        **asdict(diagnose()),
    }
    write_atomically(folder / f"{name}.json", json.dumps(found, indent=2))


def read_nodes(folder: Path) -> list[Node]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def compare(nodes: Sequence[Node], expected: int, disk_gib: float) -> list[str]:
    """What stands against starting the job on these nodes: one sentence each."""
    problems = []
    if len(nodes) != expected:
        names = ", ".join(node["node"] for node in nodes) or "none"
        problems.append(
            f"{len(nodes)} of {expected} nodes reported ({names}); is the folder shared by all nodes?"
        )
    return [*problems, *_absent(nodes), *_differences(nodes), *_resources(nodes, disk_gib)]


def _absent(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        installed = {package["name"]: package for package in node["packages"]}
        for name in NEEDED + (NEEDED_ON_GPU if node["gpus_given"] else ()):
            if not installed[name]["version"]:
                yield f"{node['node']}: {name} is missing ({installed[name]['install']})"


def _differences(nodes: Sequence[Node]) -> Iterator[str]:
    versions: dict[str, dict[str, str]] = {"python": {node["node"]: node["python"] for node in nodes}}
    for node in nodes:
        for package in node["packages"]:
            versions.setdefault(package["name"], {})[node["node"]] = package["version"] or "missing"
    for name, by_node in versions.items():
        usual = Counter(by_node.values()).most_common(1)
        for node_name, version in by_node.items():
            if version != usual[0][0]:
                yield f"{node_name}: {name} is {version}, on the other nodes {usual[0][0]}; make them equal"


def _resources(nodes: Sequence[Node], disk_gib: float) -> Iterator[str]:
    for node in nodes:
        if len(node["gpus"]) < node["gpus_given"]:
            yield (
                f"{node['node']}: Slurm gives {node['gpus_given']} GPUs and torch sees {len(node['gpus'])}; "
                "is torch built for CUDA, and the driver loaded?"
            )
        if node["free_gib"] < disk_gib:
            yield (
                f"{node['node']}: {node['free_gib']:.0f} GiB are free for the run, {disk_gib:.0f} wanted; "
                "make room, or set MIN_DISK_GIB"
            )


def time_allreduce() -> int:
    """All tasks reduce 256 MiB over NCCL; rank 0 prints the bus bandwidth. Does nothing without a GPU."""
    import torch
    import torch.distributed as dist

    from hpt_mega.slurm.job import rank_environment

    if not torch.cuda.is_available():
        return 0
    os.environ.update(rank_environment())
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(seconds=DEADLINE_S))
    size = dist.get_world_size()
    data = torch.ones(REDUCED_BYTES // 4, device="cuda")
    for _ in range(3):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(10):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / 10
    if dist.get_rank() == 0:
        bandwidth = REDUCED_BYTES / seconds * 2 * (size - 1) / size / 1e9
        print(f"pre-flight: all-reduce of {size} GPUs, {bandwidth:.0f} GB/s on the bus")
    dist.destroy_process_group()
    return 0
