"""The doctor reports what megatron-core took, not what is merely installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def diagnosis(extra: Path | None = None) -> dict[str, Any]:
    """`hpt doctor --json` in its own process, with a folder of packages in front of the installed ones."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(str(folder) for folder in (extra, root) if folder)
    command = [sys.executable, "-W", "ignore", "-m", "hpt_mega.cli", "doctor", "--json"]
    ran = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_this_machine_is_described_for_other_programs() -> None:
    found = diagnosis()
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == torch.__version__
    assert {"megatron-core", "transformer-engine", "apex", "vllm", "sglang"} <= set(versions)
    assert found["host"] and found["free_disk_gib"] > 0
    assert found["cuda"] == torch.version.cuda
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert "blockwise" in found["pieces"]["fp8"]["taken"] or found["gpus"]


def test_an_apex_that_megatron_takes_is_reported_and_refused_without_a_gpu(tmp_path: Path) -> None:
    optimizers = tmp_path / "apex" / "optimizers"
    optimizers.mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (optimizers / "fused_adam.py").write_text("class FusedAdam: ...\nclass FusedSGD: ...\n")
    (optimizers / "__init__.py").write_text("from apex.optimizers.fused_adam import FusedAdam, FusedSGD\n")
    found = diagnosis(tmp_path)
    assert found["pieces"]["optimizer"]["taken"] == "FusedAdam of apex"
    assert torch.cuda.is_available() or "FusedAdam of apex" in " ".join(found["problems"])
    assert found["pieces"]["gradient norm and clipping"]["taken"] == "megatron-core's"  # it has no kernels


def test_the_unrelated_apex_of_pypi_is_named(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    found = diagnosis(tmp_path)
    assert "unrelated package" in " ".join(found["problems"])
    assert found["pieces"]["optimizer"]["taken"] == "AdamW of torch"
