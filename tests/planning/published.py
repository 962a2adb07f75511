"""Published speeds that the planner is fitted to and judged by, with their source.

REFERENCE is what bench/planner.py fits; HELD_OUT was never fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from hpt_mega.planning.hardware import DEFAULT, Efficiency, hardware
from hpt_mega.planning.job import Job, Layout
from hpt_mega.planning.models import ModelShape, model
from hpt_mega.planning.search import Plan, plan


@dataclass(frozen=True)
class Published:
    """One row of a published table; 0 where the table has no such column."""

    name: str
    source: str
    shape: ModelShape
    hardware: str
    job: Job
    layout: Layout
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float

    def predicted(self, reached: Efficiency = DEFAULT) -> Plan:
        return plan(self.shape, self.job, self.layout, hardware(self.hardware), reached)

    def ratios(self, reached: Efficiency = DEFAULT) -> list[float]:
        """Predicted over published, of each figure published."""
        found = self.predicted(reached)
        pairs = (
            (found.tokens_per_s_per_gpu, self.tokens_per_s_per_gpu),
            (found.tflops_per_gpu, self.tflops_per_gpu),
        )
        return [ours / theirs for ours, theirs in pairs if theirs]

    def error(self, reached: Efficiency = DEFAULT) -> float:
        """Relative; of two figures (which need not agree: see LLAMA3_70B) the worse."""
        return max((ratio - 1 for ratio in self.ratios(reached)), key=abs)

    def centre(self, reached: Efficiency = DEFAULT) -> float:
        """Predicted over published, geometric mean over the figures."""
        ratios = self.ratios(reached)
        return ratios[0] if len(ratios) == 1 else sqrt(ratios[0] * ratios[1])


# Megatron-Bridge, docs/performance-summary.md and -archive.md (github.com/NVIDIA-NeMo/Megatron-Bridge), by
# container: GPUs, precision, batch, micro-batch, sequence, TP, PP, CP, VP, EP, tokens/s/GPU, TFLOP/s/GPU.
# MXFP8 counts as fp8. HELD_OUT is a selection: rows with FSDP, dropped tokens or multi-token prediction,
# which the planner does not model, are not in it. The LLAMA3_70B row contradicts itself by 2 %: 731 TFLOP/s
# are 1,628 tokens/s by the FLOPs per token of the table's other rows.
_BRIDGE = """
26.06    h100  llama3_1_405b   1024 fp8  1536 1 8192 8 8  2 8  1  326   822
26.06    h100  qwen3_30b_a3b   16   fp8  1024 1 4096 1 1  1 1  16 8826  203
26.04.01 h100  llama3_1_70b    64   fp8  256  1 8192 4 8  1 5  1  1664  731
"""
_BRIDGE_HELD_OUT = """
25.11    h100  llama3_1_70b    64   fp8  128  1 8192 4 8  1 5  1  1602  719
25.11    h100  llama3_1_405b   1024 fp8  512  1 8192 8 8  2 8  1  292   737
26.06    h100  llama3_1_70b    32   fp8  32   1 4096 4 4  1 5  1  1638  710
25.11    b200  llama3_1_8b     8    fp8  128  2 8192 1 1  1 1  1  30624 1576
25.11    gb200 llama3_1_8b     8    fp8  128  2 8192 1 1  1 1  1  31508 1622
25.11    b200  llama3_1_405b   128  fp8  64   1 8192 4 8  2 8  1  661   1667
26.06    gb300 llama3_1_405b   256  fp8  1536 1 8192 4 8  1 4  1  1048  2646
26.02    gb200 llama3_1_405b   256  fp8  1536 1 8192 4 16 1 4  1  793   2004
26.02    h100  qwen3_30b_a3b   16   fp8  1024 1 4096 1 2  1 12 8  5113  118
26.02    h100  qwen3_235b_a22b 256  fp8  8192 1 4096 2 8  1 4  32 1633  242
26.02    b200  qwen3_30b_a3b   8    fp8  512  1 4096 1 1  1 1  8  9691  223
26.06    b300  qwen3_30b_a3b   8    fp8  512  8 4096 1 1  1 1  8  40769 938
26.06    gb300 qwen3_30b_a3b   8    fp8  512  8 4096 1 1  1 1  8  45275 1041
26.02    gb200 qwen3_30b_a3b   8    fp8  512  4 4096 1 1  1 1  8  26084 600
26.06    gb300 qwen3_235b_a22b 256  fp8  8192 2 4096 1 4  1 12 32 9015  1335
25.11    gb200 qwen3_235b_a22b 256  bf16 8192 1 4096 1 8  1 3  32 4916  728
25.11    gb300 deepseek_v3     256  bf16 4096 1 4096 1 2  1 4  32 3848  961
25.11    gb300 deepseek_v3     256  fp8  4096 1 4096 1 2  1 4  32 4357  1088
"""
# Megatron-LM, README.md (github.com/NVIDIA/Megatron-LM), H100, BF16, sequence 4096, vocabulary 131072: heads,
# hidden, layers, TP, PP, GPUs, batch, TFLOP/s/GPU. Interleaving is not stated and taken as none; the
# micro-batch is not stated and taken as one sequence.
_MEGATRON = """
1.7B 16  2048  24  1 1  48   192  408.8
16B  48  6144  32  4 1  192  192  489.1
70B  64  8192  84  8 2  768  384  419.7
177B 96  12288 96  8 6  2304 1152 432.8
462B 144 18432 112 8 16 6144 3072 459.9
"""


def _bridge(line: str) -> Published:
    release, gpu, name, gpus, precision, *numbers, tokens, tflops = line.split()
    batch, microbatch, seq, tp, pp, cp, vp, ep = map(int, numbers)
    job = Job(int(gpus), batch, seq, precision)
    layout = Layout(tp, pp, vp, cp, ep, microbatch=microbatch)
    source = f"Megatron-Bridge {release}"
    return Published(name, source, model(name), gpu, job, layout, float(tokens), float(tflops))


def _megatron(line: str) -> Published:
    name, *numbers, tflops = line.split()
    heads, hidden, layers, tp, pp, gpus, batch = map(int, numbers)
    shape = model("gpt", heads=heads, hidden=hidden, layers=layers)
    job = Job(gpus, batch, 4096, "bf16")
    return Published(f"gpt {name}", "Megatron-LM", shape, "h100", job, Layout(tp, pp), 0.0, float(tflops))


REFERENCE = [
    *(_bridge(line) for line in _BRIDGE.strip().splitlines()),
    *(_megatron(line) for line in _MEGATRON.strip().splitlines()),
]
HELD_OUT = [_bridge(line) for line in _BRIDGE_HELD_OUT.strip().splitlines()]
