"""The distributed state of a run (model, optimizer, RNG) in megatron-core's sharded checkpoint format.

Where checkpoints live, when they are complete and which are kept is checkpoint/store.py's business.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpt_mega.config import Config
from hpt_mega.megatron.critic import Critic
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.optimizer import MegatronOptimizer
from hpt_mega.megatron.runtime import Layout
from hpt_mega.megatron.saving import StateWriter

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding  # isort: skip

_OPTIMIZER, _CRITIC_OPTIMIZER = "optimizer", "critic_optimizer"  # in a state

# What a distributed optimizer's own buffers follow from, and with them its state as dp_reshardable.
_BUFFERS_FOLLOW = ("tp", "pp", "vpp", "ep", "etp", "stage_layers", "overlap")


class StateError(ValueError):
    """A saved state that this layout cannot load; the message says which one can."""


def begin_save(
    folder: Path,
    model: PolicyModel,
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    layout: Layout,
    cfg: Config,
    critic: Critic | None = None,
) -> StateWriter:
    """Begin to write this job's state into the existing folder; every rank calls it.

    `common` is small plain data. With trainer.async_save training may go on before the writer is done.
    """
    written_as = cfg.trainer.checkpoint_format
    state = {
        **_sharded_state(model, optimizer, critic, cfg, written_as, loading=()),
        "random": _sharded_random_state(layout),
        "world_size": layout.world_size,
        "written_as": {
            "format": written_as,
            "parallel": asdict(cfg.parallel),
            "trained": _trained(cfg),
            "stepped": _stepped(optimizer, critic),
        },
        "common": common,
    }
    return StateWriter(state, folder, copied=cfg.trainer.async_save)


def load_state(
    folder: Path,
    model: PolicyModel,
    optimizer: MegatronOptimizer,
    layout: Layout,
    cfg: Config,
    critic: Critic | None = None,
) -> dict[str, Any]:
    """Restore what begin_save's writer wrote; returns `common`.

    Random numbers go on only where the job has as many processes as the one that saved. Raises StateError
    for a layout that the saved optimizer cannot be loaded into.
    """
    saved = dist_checkpointing.load_common_state_dict(str(folder))
    if (written_as := saved.get("written_as")) is None:
        raise StateError(f"{folder} does not say in which layout it was written: an earlier version made it")
    _refuse_other_layout(folder, written_as, cfg)
    stepped = written_as.get("stepped", (_OPTIMIZER, _CRITIC_OPTIMIZER))
    wanted = _sharded_state(model, optimizer, critic, cfg, written_as["format"], loading=stepped)
    if saved["world_size"] == layout.world_size:
        wanted["random"] = _sharded_random_state(layout)
    state = dist_checkpointing.load(wanted, str(folder))
    _load_weights(model, state["model"])
    with torch.no_grad():  # megatron-core copies into fp32 parameters that require gradients
        optimizer.load_state_dict(state[_OPTIMIZER])
        if critic is not None:
            _load_weights(critic.model.module, state["critic"])
            critic.optimizer.load_state_dict(state[_CRITIC_OPTIMIZER])
    if "random" in wanted:
        _set_random_state(state["random"])
    common: dict[str, Any] = state["common"]
    return common


def _refuse_other_layout(folder: Path, written_as: dict[str, Any], cfg: Config) -> None:
    """Say before anything is read what megatron-core would find out from a missing key, or not at all."""
    if written_as["trained"] != _trained(cfg):
        raise StateError(
            f"{folder} was written with {written_as['trained']}, which its optimizer's state follows; now "
            f"there is {_trained(cfg)}: set it as it was"
        )
    saved, here = written_as["parallel"], asdict(cfg.parallel)
    if saved["distributed_optimizer"] != here["distributed_optimizer"]:
        raise StateError(
            f"{folder} was written with parallel.distributed_optimizer={saved['distributed_optimizer']}, "
            f"whose state is another than that of {here['distributed_optimizer']}; set it as it was"
        )
    if not here["distributed_optimizer"] or written_as["format"] == "fully_reshardable":
        return
    if other := [key for key in _BUFFERS_FOLLOW if saved[key] != here[key]]:
        raise StateError(
            f"{folder} was written as {written_as['format']} with {_settings(saved, other)}; now they are "
            f"{_settings(here, other)}. That format follows other data- and context-parallel sizes only: "
            "resume in the saved layout, and save there with trainer.checkpoint_format=fully_reshardable to "
            "change it"
        )


def _trained(cfg: Config) -> str:
    """What tells the optimizer's parameters and groups, as text."""
    groups = [asdict(group) for group in cfg.optimizer.groups]
    return f"optimizer.frozen={cfg.optimizer.frozen} optimizer.groups={groups}"


def _settings(parallel: dict[str, Any], keys: list[str]) -> str:
    return " ".join(f"parallel.{key}={parallel[key]}" for key in keys)


def _sharded_state(
    model: PolicyModel,
    optimizer: MegatronOptimizer,
    critic: Critic | None,
    cfg: Config,
    written_as: str,
    *,
    loading: Collection[str],
) -> dict[str, Any]:
    """`loading`: the optimizers whose moments are to be loaded."""
    metadata = {"distrib_optim_sharding_type": written_as}
    # of frozen layers there are no moments, which leaves holes in tensors that hold all layers
    moments_of = _sharded_weights(model, by_layer=bool(cfg.optimizer.frozen))
    state = {
        "model": _sharded_weights(model),
        _OPTIMIZER: optimizer.sharded_state_dict(
            moments_of, is_loading=_OPTIMIZER in loading, metadata=metadata
        ),
    }
    if critic is not None:
        state["critic"] = weights = _sharded_weights(critic.model.module, "critic.")
        state[_CRITIC_OPTIMIZER] = moments = critic.optimizer.sharded_state_dict(
            weights, is_loading=_CRITIC_OPTIMIZER in loading, metadata=metadata
        )
        if cfg.parallel.distributed_optimizer and written_as == "dp_reshardable":
            # its buffers are named by their number, as the policy's are
            add_prefix_for_sharding(moments, "critic.")
    return state


def _stepped(optimizer: MegatronOptimizer, critic: Critic | None) -> list[str]:
    """The optimizers that have moments: with fp16 all steps so far may have been skipped."""
    given = {_OPTIMIZER: optimizer} | ({_CRITIC_OPTIMIZER: critic.optimizer} if critic else {})
    return [
        name for name, one in given.items() if any(part.optimizer.state for part in one.chained_optimizers)
    ]


def _sharded_weights(model: PolicyModel, prefix: str = "", *, by_layer: bool = False) -> dict[str, Any]:
    """The tensors of all of this rank's chunks; `prefix` is put before their names in the checkpoint, which
    holds one tensor of all layers or one a layer."""
    metadata = {"non_homogeneous_layers": True, "singleton_local_shards": True} if by_layer else None
    return {
        f"{number}.{name.removeprefix(prefix)}": tensor
        for number, chunk in enumerate(model.chunks)
        for name, tensor in chunk.sharded_state_dict(prefix=prefix, metadata=metadata).items()
    }


def _load_weights(model: PolicyModel, weights: dict[str, Any]) -> None:
    for number, chunk in enumerate(model.chunks):
        own = f"{number}."
        chunk.load_state_dict({n.removeprefix(own): t for n, t in weights.items() if n.startswith(own)})


def _sharded_random_state(layout: Layout) -> ShardedObject:
    return ShardedObject("random", _random_state(), (layout.world_size,), (layout.rank,))


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
