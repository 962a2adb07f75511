"""The CPU patches stay away where there is a GPU, and leave torch usable where there is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str) -> str:
    """Each patch is for a whole process, so each case gets one."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_patched_where_a_gpu_is_present() -> None:
    out = run(
        """
        import sys, torch
        torch.cuda.is_available = lambda: True
        watched = [(torch, "zeros"), (torch, "arange"), (torch, "compile"), (torch.Tensor, "to"),
                   (torch.Tensor, "cuda"), (torch.Tensor, "type"), (torch.nn.Module, "cuda"),
                   (torch.cuda, "current_device"), (torch.cuda, "Stream"), (torch.cuda, "manual_seed"),
                   (torch.cuda, "get_rng_state"), (torch.cuda.nvtx, "range_push")]
        before = [getattr(owner, name) for owner, name in watched]
        from hpt_mega.megatron import cpu
        cpu.install()
        assert [getattr(owner, name) for owner, name in watched] == before
        assert not any(name.startswith("megatron.") for name in sys.modules)
        print("untouched")
        """
    )
    assert out.strip() == "untouched"


def test_after_install_cuda_means_the_cpu_and_the_meta_device_still_works() -> None:
    out = run(
        """
        import torch
        from hpt_mega.megatron import cpu
        compile_before = torch.compile
        cpu.install()
        zeros_once = torch.zeros
        cpu.install()
        assert torch.zeros is zeros_once, "installed twice"
        assert torch.compile is compile_before
        assert torch.zeros(3, device="cuda").device.type == "cpu"
        assert torch.ones(2).to("cuda:0").device.type == torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).to(torch.float64).dtype is torch.float64
        assert torch.empty(2, device="meta").device.type == "meta"
        with torch.device("meta"):
            assert torch.zeros(3).device.type == torch.arange(3).device.type == "meta"
            assert torch.nn.Linear(2, 3).weight.device.type == "meta"
        assert torch.zeros(3).device.type == "cpu"
        assert torch.ones(2).type() == "torch.FloatTensor"
        torch.cuda.manual_seed(3)
        first = torch.rand(2)
        assert torch.equal(torch.rand(2, generator=torch.Generator().manual_seed(3)), first)
        print("works")
        """
    )
    assert out.strip().endswith("works")
