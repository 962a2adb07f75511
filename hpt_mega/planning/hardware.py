"""GPUs and their networks, from vendor data sheets, and the efficiencies that software reaches on them.

Which efficiencies were fitted, and on what, is said at `Efficiency`; bench/planner.py repeats the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from hpt_mega.planning.job import PlanError
from hpt_mega.suggestion import did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One GPU in its node. Peaks are dense (no sparsity); bandwidths are of one direction."""

    name: str
    memory_gib: float  # as nvidia-smi reports it
    bf16_tflops: float
    fp8_tflops: float
    memory_tb_s: float
    nvlink_gb_s: float
    network_gb_s: float  # of the one network card a GPU has
    gpus_per_node: int = 8  # that share NVLink
    host_gb_s: float = 50  # to the host's memory: PCIe 5.0 x16, 64 GB/s less its protocol

    def peak(self, precision: str) -> float:
        """FLOP/s."""
        return (self.fp8_tflops if precision == "fp8" else self.bf16_tflops) * 1e12


# H100 SXM5, H200 SXM: NVIDIA data sheets (989.5 and 1979 TFLOP/s dense, 3.35 and 4.8 TB/s, NVLink 4: 900 GB/s
# both ways). B200, B300: DGX B200, DGX B300 data sheets (a GPU: 2.25 and 4.5 PFLOP/s dense, 8 TB/s, NVLink 5:
# 1.8 TB/s both ways). GB200, GB300 NVL72 data sheets: 2.5 and 5 PFLOP/s dense a GPU, NVLink over 72 GPUs, of
# which Megatron-Bridge's jobs use 64. Networks: ConnectX-7 at 400 Gb/s, ConnectX-8 at 800 Gb/s.
HARDWARE = {
    row.name: row
    for row in (
        Hardware("h100", 79.6, 989.5, 1979, 3.35, 450, 50),
        Hardware("h200", 140.4, 989.5, 1979, 4.8, 450, 50),
        Hardware("b200", 179.0, 2250, 4500, 8.0, 900, 50),
        Hardware("b300", 268.0, 2250, 4500, 8.0, 900, 100),
        Hardware("gb200", 185.0, 2500, 5000, 8.0, 900, 50, gpus_per_node=64),
        Hardware("gb300", 277.0, 2500, 5000, 8.0, 900, 100, gpus_per_node=64),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """What software reaches of the data sheet.

    The first three are fitted, on the eight published rows of tests/planning/published.py (moe_host_s by the
    one row with experts: it stands for whatever keeps small experts from using a GPU, launches above all).
    The others are typical figures of the kernels or libraries named, set once and not fitted row by row;
    exposed and step_host_s were chosen with the dense rows in view. bench/results/planner.md has the errors,
    with each row left out too. Nothing about rollouts is fitted: public figures of them do not state their
    lengths.
    """

    gemm_bf16: float = 0.80  # of the peak, by a product large enough that only compute counts
    gemm_fp8: float = 0.637
    moe_host_s: float = 9.1e-3  # to launch the kernels of a layer with experts, forward and backward

    exposed: float = 0.10  # of overlapped communication (tensor-parallel, interleaved stages), all the same
    attention_forward: float = 0.66  # of the bf16 peak, causal, head 128, long sequences: FlashAttention-3,
    attention_backward: float = 0.58  # arXiv 2407.08608, figs. 5 and 6; see ATTENTION_HALF
    memory: float = 0.85  # of the bandwidth, as STREAM-like kernels reach it
    nvlink: float = 0.80  # NCCL's bus bandwidth over NVLink's (nccl-tests: 360 to 370 of 450 GB/s)
    network: float = 0.80  # as above, over InfiniBand
    dense_host_s: float = 0.5e-3  # to launch a dense layer's kernels: about 100 at 5 us
    step_host_s: float = 15e-3  # once a step: batch, norm and loss reduced, logging, the optimizer's launches
    decode_host_s: float = 1e-3  # an engine's step under CUDA graphs: scheduling and sampling
    collective_latency_s: float = 1e-5  # of one small all-reduce over NVLink


DEFAULT = Efficiency()


def hardware(name: str, **changes: Any) -> Hardware:
    """A preset with some figures changed, so that any GPU can be described. Raises PlanError."""
    if name not in HARDWARE:
        near = did_you_mean(name, HARDWARE)
        raise PlanError(
            f"unknown hardware {name}{near}; expected one of {', '.join(HARDWARE)}; for another GPU take the "
            "nearest and give hardware.memory_gib and so on"
        )
    known = [field.name for field in fields(Hardware) if field.name != "name"]
    if unknown := changes.keys() - set(known):
        raise PlanError(f"unknown figure hardware.{sorted(unknown)[0]}; expected one of {', '.join(known)}")
    for figure, value in changes.items():
        if not 0 < value < math.inf:
            raise PlanError(f"hardware.{figure}={value}, expected a finite number above 0")
    if "gpus_per_node" in changes:
        if changes["gpus_per_node"] % 1:
            raise PlanError(f"hardware.gpus_per_node={changes['gpus_per_node']}, expected a whole number")
        changes["gpus_per_node"] = int(changes["gpus_per_node"])
    return replace(HARDWARE[name], **changes)
