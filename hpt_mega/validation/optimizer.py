"""The optimizer: patterns of parameters that mean something, and not two things; what is left to the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpt_mega.config import Config, ParameterGroup
from hpt_mega.megatron.groups import is_frozen, matches
from hpt_mega.resharding.mapping import MappingError, family_for


def offload(cfg: Config, on_gpu: bool) -> Iterator[str]:
    """Whether a part of the optimizer can be left to the CPU."""
    share = cfg.optimizer.cpu_offload
    if not 0 <= share <= 1:
        yield f"optimizer.cpu_offload is {share}, expected 0 to 1"
    elif share and not on_gpu:
        yield f"optimizer.cpu_offload is {share} and there is no GPU, so that all is on the CPU; set 0"
    elif share and cfg.precision.dtype == "fp32":
        yield f"optimizer.cpu_offload is {share}; megatron-core offloads no fp32 weights, set precision=bf16"
    elif share and not cfg.parallel.distributed_optimizer:
        yield (
            f"optimizer.cpu_offload is {share}, which megatron-core has in its distributed optimizer only; "
            "set parallel.distributed_optimizer=true"
        )
    elif share and cfg.trainer.checkpoint_format == "fully_reshardable":
        yield (
            f"optimizer.cpu_offload is {share} and trainer.checkpoint_format 'fully_reshardable'; "
            "megatron-core writes classes into such a checkpoint and refuses to read them, set dp_reshardable"
        )


def parameters(cfg: Config, shape: Mapping[str, Any], on_gpu: bool) -> Iterator[str]:
    """Patterns of optimizer.frozen and optimizer.groups beside the names of the model's parameters."""
    frozen, groups = cfg.optimizer.frozen, cfg.optimizer.groups
    for number, group in enumerate(groups):
        key, decay = f"optimizer.groups.{number}", group.weight_decay
        if not group.lr_scale > 0:
            yield f"{key}.lr_scale is {group.lr_scale}, expected above 0; optimizer.frozen stops learning"
        if decay is not None and not decay >= 0:
            yield f"{key}.weight_decay is {decay}, expected 0 or above"
    if not shape or not (frozen or groups):
        return
    try:
        names = _names(shape, on_gpu)
    except MappingError as error:
        yield f"optimizer.frozen and groups: {error}"
        return
    for pattern in frozen:
        if not any(matches(pattern, name) for name in names):
            yield f"optimizer.frozen: {pattern!r} means no parameter; {_examples(names)}"
    trained = [name for name in names if not is_frozen(name, frozen)]
    if trained:
        yield from _groups(groups, trained)
    else:
        yield f"optimizer.frozen={frozen} leaves nothing to train; drop a pattern"


def _groups(groups: Sequence[ParameterGroup], trained: list[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, group in enumerate(groups):
        key = f"optimizer.groups.{number}"
        own = [name for name in trained if matches(group.match, name)]
        if not own:
            yield f"{key}.match={group.match!r} means no parameter that is trained; {_examples(trained)}"
        if twice := [name for name in own if name in seen]:
            other = f"optimizer.groups.{seen[twice[0]]}"
            yield f"{key} and {other} both mean {twice[0]}; a parameter is in one group at most"
        seen |= dict.fromkeys(own, number)


def _names(shape: Mapping[str, Any], on_gpu: bool) -> list[str]:
    """Under Transformer Engine's layers, which a GPU gets, norms and experts have other names."""
    family = family_for(dict(shape))
    entries = family.entries(family.read_shape(dict(shape)))
    return [entry.te if on_gpu else entry.megatron for entry in entries]


def _examples(names: list[str]) -> str:
    kinds = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    return f"there are {', '.join(kinds)}"
