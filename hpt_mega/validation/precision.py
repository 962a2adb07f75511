"""The precision: what an FP8 recipe takes, and which widths it divides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hpt_mega.config import Config, Fp8Config
from hpt_mega.megatron.fp8 import AMAX_ALGORITHMS, FORMATS, RECIPES, align_of

_TE_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def fp8(cfg: Config, shape: Mapping[str, Any], on_gpu: bool) -> Iterator[str]:
    """The settings of the FP8 recipe, and whether the model and the layout suit it."""
    fp8, key = cfg.precision.fp8, "precision.fp8"
    if not fp8.recipe:
        if fp8 != Fp8Config():
            yield f"{key} has settings and no recipe; choose a precision such as fp8_blockwise"
        return
    if cfg.precision.dtype == "fp16":
        yield f"precision.dtype is fp16 and {key}.recipe {fp8.recipe!r}; FP8 goes with bf16 or fp32"
    for name, value, known in (
        ("recipe", fp8.recipe, RECIPES),
        ("format", fp8.format, FORMATS),
        ("amax_algorithm", fp8.amax_algorithm, AMAX_ALGORITHMS),
    ):
        if value not in known:
            yield f"{key}.{name} is {value!r}, expected {' or '.join(known)}"
    if fp8.amax_history < 1 or fp8.margin < 0:
        yield f"{key}.amax_history is {fp8.amax_history} and margin {fp8.margin}; expected >= 1 and >= 0"
    kept = (fp8.first_layers, fp8.last_layers)
    per_stage = shape.get("num_hidden_layers", 0) // max(1, cfg.parallel.pp)
    if shape and not 0 <= min(kept) <= max(kept) <= per_stage:
        yield (
            f"{key}.first_layers and last_layers are {kept[0]} and {kept[1]}; megatron-core takes 0 to "
            f"{per_stage}, the layers of a pipeline stage"
        )
    yield from _fp8_recipe(cfg, on_gpu)
    yield from _fp8_widths(cfg, shape)


def _fp8_recipe(cfg: Config, on_gpu: bool) -> Iterator[str]:
    """What a recipe does not go together with."""
    fp8, key = cfg.precision.fp8, "precision.fp8"
    if fp8.recipe == "delayed" and (fp8.first_layers or fp8.last_layers):
        yield f"{key}: delayed scaling spans all layers of a stage; set first_layers and last_layers to 0"
    if fp8.param_gather and not cfg.parallel.distributed_optimizer:
        yield f"{key}.param_gather is the distributed optimizer's; set parallel.distributed_optimizer=true"
    if fp8.param_gather and fp8.recipe == "mxfp8":
        yield f"{key}.param_gather with mxfp8 needs a shared gradient buffer, not wired here; set it to false"
    is_sent = cfg.rollout.engine != "megatron" or cfg.trainer.export_hf
    if fp8.param_gather and (is_sent or cfg.parallel.tp > 1):
        yield (
            f"{key}.param_gather keeps weights in FP8, which neither servers nor exports are given here and "
            "whose gradients' norm tensor parallelism would count once; set it to false, or parallel.tp=1, "
            "rollout=megatron and trainer.export_hf=false"
        )
    trusted = os.environ.get(_TE_TRUST) == "1"
    if fp8.recipe == "delayed" and cfg.resume == "auto" and on_gpu and not trusted:
        yield (
            f"{key}.recipe is 'delayed' and resume=auto: Transformer Engine keeps the amax history as a "
            f"pickle and refuses to load it; set {_TE_TRUST}=1 if run_dir is your own, or change the recipe"
        )


def _fp8_widths(cfg: Config, shape: Mapping[str, Any]) -> Iterator[str]:
    """Transformer Engine refuses other widths; the emulation does so too, so that its runs move to GPUs."""
    recipe, tp = cfg.precision.fp8.recipe, max(1, cfg.parallel.tp)
    align = align_of(recipe)
    heads = shape.get("num_attention_heads", 0)
    head = shape.get("head_dim") or shape.get("hidden_size", 0) // max(1, heads)
    widths = {
        "hidden_size": shape.get("hidden_size", 0),
        "intermediate_size / tp": shape.get("intermediate_size", 0) / tp,
        "moe_intermediate_size": shape.get("moe_intermediate_size", 0),
        "q_lora_rank": shape.get("q_lora_rank") or 0,
        "kv_lora_rank": shape.get("kv_lora_rank", 0),
        "attention heads x channels / tp": 0 if "kv_lora_rank" in shape else heads * head / tp,
    }
    for name, width in widths.items():
        if width % align:
            yield (
                f"precision.fp8.recipe {recipe!r} takes widths that are multiples of {align} and the model's "
                f"{name} is {width:g}; change parallel.tp or the precision"
            )
