"""What the benchmarks that need a GPU share."""

from __future__ import annotations

import sys
from importlib.metadata import version

SKIPPED = 77  # the exit code of a benchmark that this machine cannot run


def require() -> None:
    """End this process where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        sys.exit(SKIPPED)


def made_by(script: str) -> str:
    """The sentence that says on what, and with which versions."""
    import torch

    names = ("torch", "transformers", "megatron-core", "transformer-engine")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Made by bench/{script}.py on one {torch.cuda.get_device_name()}: {versions}."
