"""Whose fused kernels megatron-core takes: its own choice, by what is installed when it is imported."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from hpt_mega.megatron import cpu


def makers() -> dict[str, str]:
    """Who makes each kernel; megatron-core is imported and asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that apex or TE is missing, which is what is reported here
        cpu.install()
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    return {
        "adam": _maker(optimizer.Adam),
        "clip": _maker(clip.l2_norm_impl),
        "accumulation": "apex" if layers._grad_accum_fusion_available else "torch",
        "layers": "Transformer Engine" if layers.HAVE_TE else "megatron-core",
    }


def _maker(function: Any) -> str:
    names = {
        "transformer_engine": "Transformer Engine",
        "transformer_engine_torch": "Transformer Engine",
        "apex": "apex",
        "amp_C": "apex",
        "torch": "torch",
        "megatron": "megatron-core",
    }
    root = str(getattr(function, "__module__", "")).partition(".")[0]
    return names.get(root, root or "an extension")
