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


def test_engines_and_readers_are_named_with_the_settings_that_choose_them(tmp_path: Path) -> None:
    def choices(found: dict[str, Any], piece: str) -> tuple[str, str]:
        return found["pieces"][piece]["taken"], found["pieces"][piece]["would"]

    found = diagnosis()
    versions = {package["name"]: package["version"] for package in found["packages"]}
    rollouts, absent = choices(found, "rollouts")
    assert "rollout=megatron" in rollouts
    has_vllm = versions["vllm"] is not None
    assert ("rollout=vllm" in rollouts, "rollout=vllm" in absent) == (has_vllm, not has_vllm)
    if not found["gpus"]:
        assert "rollout=sglang" in absent and "rollout=sglang" not in rollouts
    for name, version in (("vllm", "0.32.0"), ("nvidia_dali_cuda130", "2.4.0")):
        (about := tmp_path / f"{name}-{version}.dist-info").mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    found = diagnosis(tmp_path)
    assert "rollout=vllm" in choices(found, "rollouts")[0]
    assert "data.reader=dali" in choices(found, "stored tokens")[0]


def test_the_unrelated_apex_of_pypi_is_named(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    found = diagnosis(tmp_path)
    assert "unrelated package" in " ".join(found["problems"])
    assert found["pieces"]["optimizer"]["taken"] == "AdamW of torch"
