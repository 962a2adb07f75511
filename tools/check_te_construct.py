"""Build every model family with Transformer Engine's layers and each FP8 recipe, on a machine without a GPU.

    python tools/check_te_construct.py --venv DIR --out bench/results/te_construct.md

Checks what needs no kernel: construction, parameter names and shapes against the mapping tables (import from
Hugging Face and export back, bit for bit), checkpoint keys, recipes. Nothing computes. The first run compiles
Transformer Engine against a CUDA build of torch in DIR (one job, tens of minutes, 7 GB), later ones use it.
It needs nvcc of CUDA 13 and a C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENGINE, TORCH = "2.20.2", "2.14.1"
TOOLS = ("wheel", "pybind11", "ninja", "packaging", "pydantic", "einops", "onnx", "onnxscript", "setuptools")
NEEDS = ("megatron-core==0.16.1", "psutil", "transformers>=5.16,<5.20", "accelerate", "hydra-core", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, required=True, help="where Transformer Engine is, or will be")
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return check(options.out)
    build(options.venv)
    out = ["--out", str(options.out.resolve())] if options.out else []
    command = [options.venv / "bin/python", __file__, "--venv", options.venv, "--inside", *out]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode


def build(venv: Path) -> None:
    """A virtual environment with torch, Transformer Engine and what hpt_mega imports; kept once complete."""
    if (venv / ".complete").is_file():
        return
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={TORCH}", *TOOLS], check=True)
    needs = [
        "megatron-core==0.16.1",
        "psutil",
        "transformers>=5.16,<5.20",
        "accelerate",
        "hydra-core",
        "numpy",
    ]
    subprocess.run([*pip, *needs, f"transformer-engine-cu13=={ENGINE}"], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    nvidia = site / "nvidia"
    parts = [nvidia / name for name in ("cudnn", "nccl", "cu13")]
    environment = os.environ | {
        "NVTE_FRAMEWORK": "pytorch",
        "MAX_JOBS": "1",
        "CUDNN_PATH": str(nvidia / "cudnn"),
        "CPATH": os.pathsep.join(str(part / "include") for part in parts),
        "LIBRARY_PATH": os.pathsep.join(str(part / "lib") for part in parts),
    }
    own = ["--no-build-isolation", "--no-deps", f"transformer-engine-torch=={ENGINE}"]
    subprocess.run([*pip, *own], env=environment, check=True)
    subprocess.run([*pip, "--no-deps", f"transformer-engine=={ENGINE}"], check=True)
    (venv / ".complete").write_text(f"{time.monotonic() - begun:.0f} s\n")


@dataclass(frozen=True)
class Line:
    """What was found for one family and precision; `failure` is empty where all checks passed."""

    family: str
    precision: str
    layers: str = ""
    parameters: int = 0
    keys: int = 0
    failure: str = ""


def check(out: Path | None) -> int:
    warnings.simplefilter("ignore")
    answer_as_a_gpu()
    import torch
    import torch.distributed as dist

    from hpt_mega.launch import single_rank_environment

    os.environ |= single_rank_environment()

    dist.init_process_group("gloo")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as scratch:
        for line in findings(Path(scratch)):
            print(row(line), flush=True)
            lines.append(line)
    recipes = list(recipe_rows())
    dist.destroy_process_group()
    text = report(lines, recipes, torch.__version__)
    if out:
        out.write_text(text)
    print(text.partition("\n| family")[0])
    return int(any(line.failure for line in lines))


def answer_as_a_gpu(capability: tuple[int, int] = (10, 0)) -> None:
    """torch.cuda's answers of a machine with one GPU; memory stays on the CPU."""
    import torch

    from hpt_mega.megatron import cpu

    cpu._answer_for_cuda_runtime()  # the CPU patches that keep tensors on the CPU; install() sees a GPU now
    cpu._redirect_cuda_tensors()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_name = lambda *_: "none: names and shapes only"
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="none",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
    )


def findings(scratch: Path) -> Iterator[Line]:
    import torch

    from hpt_mega.config import Fp8Config, ParallelConfig, compose
    from hpt_mega.megatron import runtime

    families: Any = importlib.import_module("tests.checkpoint.families")
    layout = runtime.build_groups(ParallelConfig(pp=1), timedelta(minutes=1))
    precisions = {"bf16": Fp8Config()}
    for name in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        precisions[f"fp8_{name}"] = compose([f"precision=fp8_{name}"]).precision.fp8
    precisions["fp8_blockwise, ends in bf16"] = replace(
        precisions["fp8_blockwise"], first_layers=1, last_layers=1
    )
    for family in families.MODELS:
        folder = scratch / family
        families.save_model(family, folder, torch.bfloat16)
        for name, fp8 in precisions.items():
            try:
                yield replace(examine(folder, fp8, layout, scratch / "out"), family=family, precision=name)
            except Exception as error:
                traceback.print_exc()
                yield Line(family, name, failure=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def examine(folder: Path, fp8: Any, layout: Any, out: Path) -> Line:
    """Build the model, import the folder, export it again, and compare; raises where something differs."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe

    from hpt_mega.checkpoint.hf import HFCheckpoint
    from hpt_mega.checkpoint.torch_dist import stored_as
    from hpt_mega.checkpoint.weights import export_hf, load_hf, own_entries
    from hpt_mega.config import ParallelConfig
    from hpt_mega.megatron.model import build_stage, transformer_config
    from hpt_mega.resharding.mapping import family_for

    checkpoint = HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    config = transformer_config(shape, ParallelConfig(1, 1, 1), torch.bfloat16, fp8)
    config = replace(config, use_cpu_initialization=True)
    model = build_stage(shape, config, tp_size=1)
    if fp8.recipe:
        get_fp8_recipe(config)
    load_hf(model, checkpoint, family, shape, layout)
    entries = own_entries(model, family, shape)
    export_hf(model, family, shape, out, folder, layout)
    exported = HFCheckpoint(out)
    different = [n for n in checkpoint.names() if not torch.equal(checkpoint.tensor(n), exported.tensor(n))]
    if different:
        raise ValueError(f"import and export changed {', '.join(different[:4])}")
    expected = {stored_as(entry, shape, stacked=shape.is_homogeneous).key for entry, _ in entries}
    found = {
        part.key for part in model.sharded_state_dict().values() if not part.key.endswith("_extra_state")
    }
    if expected != found:
        raise ValueError(f"checkpoint keys differ: {sorted(expected ^ found)[:4]}")
    kinds = {type(module).__name__ for module in model.decoder.modules()}
    layers = sorted(kind for kind in kinds if kind.startswith("TE") and "Linear" in kind)
    return Line("", "", ", ".join(layers), len(entries), len(found))


def recipe_rows() -> Iterator[str]:
    """What megatron-core makes of each precision of conf/, against the rules of the emulation."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe

    from hpt_mega.config import ParallelConfig, compose
    from hpt_mega.megatron.model import transformer_config
    from hpt_mega.resharding.mapping import family_for

    families: Any = importlib.import_module("tests.checkpoint.families")
    llama: Any = families.MODELS["llama"]().config.to_dict()
    shape = family_for(llama | {"architectures": ["LlamaForCausalLM"]}).read_shape(llama)
    for name in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        fp8 = compose([f"precision=fp8_{name}"]).precision.fp8
        made = get_fp8_recipe(transformer_config(shape, ParallelConfig(1, 1, 1), torch.bfloat16, fp8))
        yield f"| fp8_{name} | {' '.join(str(made).split())} |"


def row(line: Line) -> str:
    verdict = line.failure or "same"
    return (
        f"| {line.family} | {line.precision} | {line.layers} | {line.parameters} | {line.keys} | {verdict} |"
    )


def report(lines: list[Line], recipes: list[str], torch_version: str) -> str:
    from importlib.metadata import version

    failed = sum(bool(line.failure) for line in lines)
    return "\n".join(
        [
            "# Transformer Engine's layers, constructed without a GPU",
            "",
            f"Made by tools/check_te_construct.py: transformer-engine {version('transformer-engine')}, torch "
            f"{torch_version}, megatron-core {version('megatron-core')}, Python {platform.python_version()}. "
            f"{len(lines) - failed} of {len(lines)} passed. Nothing computed: no GPU.",
            "",
            "Parameters: all have a row in the family's table. Keys: of the sharded state dict, equal to "
            "those the converter writes. Last column: weights after import from and export to Hugging Face.",
            "",
            "| family | precision | linear layers | parameters | checkpoint keys | weights |",
            "|---|---|---|---|---|---|",
            *map(row, lines),
            "",
            "The recipes as megatron-core hands them to Transformer Engine:",
            "",
            "| precision | recipe |",
            "|---|---|",
            *recipes,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
