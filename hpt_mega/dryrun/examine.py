"""The examination of a job: its config, its ranks' models, what they hold together, and whether it fits.

How one rank is built is in rank.py, the arithmetic in estimate.py, what is printed in command.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpt_mega.checkpoint.hf import HFCheckpoint, check_tensors, read_config
from hpt_mega.checkpoint.megatron_folder import companions_for
from hpt_mega.config import Config, ConfigError, ParallelConfig, conf_dir
from hpt_mega.dryrun.estimate import Batch, Stage, batch, planned_shape, served, stages
from hpt_mega.dryrun.rank import BuiltRank, build_rank
from hpt_mega.megatron.model import DTYPES
from hpt_mega.planning import Hardware, Layout, PlanError
from hpt_mega.planning.memory import stage_shards
from hpt_mega.resharding.mapping import Family, ModelShape, family_for
from hpt_mega.resharding.mapping.table import EMBEDDING
from hpt_mega.validation import contradictions, missing_here

_LISTED = 4


@dataclass
class Findings:
    """What came out. A job with `problems` would fail anywhere; what is `missing` is so on this machine."""

    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ranks: list[BuiltRank] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    batch: Batch | None = None
    covered: str = ""  # how many of the model's tensors were found in the ranks


def examine(cfg: Config, gpu: Hardware, chosen: Sequence[int] | None) -> Findings:
    """Look at a job; `chosen` ranks are built, or where None those that can differ in what they hold.

    Raises ConfigError where no config.json of the model is to be had, or a chosen rank is none of the job's.
    """
    found = Findings(missing=missing_here(cfg))
    config = _model_config(cfg)
    found.problems += contradictions(cfg, config, on_gpu=True)
    if found.problems:
        return found
    ranks = typical_ranks(cfg.parallel) if chosen is None else chosen
    if outside := [rank for rank in ranks if not 0 <= rank < cfg.parallel.world_size]:
        raise ConfigError(f"--ranks {outside[0]}: {cfg.parallel.product}; expected below that")
    try:
        family = family_for(config)
        shape = family.read_shape(config)
        _compare_weights(cfg, family, shape)
        found.ranks = [
            build_rank(rank, shape, family, cfg.parallel, DTYPES[cfg.precision.dtype]) for rank in ranks
        ]
    except (ValueError, AssertionError) as error:  # what megatron-core and the mapping refuse a layout with
        found.problems.append(f"the model cannot be built: {error}")
        return found
    found.problems += _coverage(found, family, shape, cfg.parallel)
    found.batch = batch(cfg)
    try:
        found.stages = stages(cfg, shape, gpu)
    except PlanError as error:
        found.problems.append(f"memory cannot be estimated: {error}")
        return found
    found.problems += [*_fit(found.stages, gpu), *_servers_fit(cfg, shape, gpu)]
    found.problems += _as_planned(cfg, found, shape)
    return found


def typical_ranks(parallel: ParallelConfig) -> list[int]:
    """One rank of each pipeline stage, and on the first stage one for each share of the experts."""
    of_stage = parallel.world_size // parallel.pp
    experts = [index * parallel.etp for index in range(parallel.ep)]
    later = [stage * of_stage + experts[stage % len(experts)] for stage in range(1, parallel.pp)]
    return [*experts, *later]


def _model_config(cfg: Config) -> Mapping[str, Any]:
    folder = companions_for(Path(cfg.model.path), cfg.model.hf)
    if (folder / "config.json").exists():
        try:
            return read_config(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
    published = conf_dir() / cfg.model.published
    if published.is_file():
        config: Mapping[str, Any] = json.loads(published.read_text())
        return config
    raise ConfigError(
        f"model.path={cfg.model.path} holds no config.json and model.published is {cfg.model.published!r}; "
        "one of them must tell the model's shape: give a folder, or choose a model such as model=llama3_1_70b"
    )


def _compare_weights(cfg: Config, family: Family, shape: ModelShape) -> None:
    """Where the weights are here: do their names and shapes fit the table? Raises MappingError."""
    folder = Path(cfg.model.path)
    if not any(folder.glob("*.safetensors")):
        return
    check_tensors(HFCheckpoint(folder), family, shape)


def _coverage(found: Findings, family: Family, shape: ModelShape, parallel: ParallelConfig) -> Iterator[str]:
    """Is every tensor of the model on exactly one stage, as far as the built ranks can tell?"""
    seen_stages = {built.stage for built in found.ranks}
    share = shape.experts.count // parallel.ep if shape.experts else 1
    seen_shares = {
        (built.stage, entry.expert // share)
        for built in found.ranks
        for entry in built.entries.values()
        if entry.expert is not None
    }
    stage_of: dict[str, set[int]] = {}
    for built in found.ranks:
        for name in built.entries:
            stage_of.setdefault(name, set()).add(built.stage)
    stage_of_layer = {layer: built.stage for built in found.ranks for layer in built.layers}
    expected = [
        entry
        for entry in family.entries(shape)
        if entry.expert is None
        or (stage_of_layer.get(entry.layer or 0), entry.expert // share) in seen_shares
    ]
    complete = seen_stages == set(range(parallel.pp))
    homeless = [entry.megatron for entry in expected if entry.megatron not in stage_of]
    if complete and homeless:
        yield f"{_some(homeless)}: in the table, and on no stage; a Hugging Face tensor would be lost"
    twice = [name for name, where in stage_of.items() if len(where) > 1 and name != EMBEDDING]
    if twice:
        yield f"{_some(twice)}: on several stages; one of the copies would never be exported"
    hf_names = {name for built in found.ranks for entry in built.entries.values() for name in entry.hf}
    found.covered = f"{len(stage_of)} Megatron parameters, filled from {len(hf_names)} Hugging Face tensors"
    if complete:
        found.covered += f"; {sum(1 for _ in family.entries(shape)) - len(expected)} more like them not built"


def _fit(found: Sequence[Stage], gpu: Hardware) -> Iterator[str]:
    fullest = max(range(len(found)), key=lambda stage: found[stage].total)
    stage = found[fullest]
    if stage.total <= gpu.memory_gib:
        return
    parts = stage.parts()
    largest = max(parts, key=lambda part: parts[part])
    advice = {
        "activations": "set parallel.recompute=full, or raise parallel.tp or cp",
        "critic": "set parallel.distributed_optimizer=true, or raise parallel.tp or pp",
        "engine": "lower rollout.max_sequences, or of a server rollout.server.gpu_memory_share",
        "logits": "lower trainer.tokens_per_microbatch or raise parallel.tp",
        "optimizer": "set parallel.distributed_optimizer=true, or raise parallel.tp or pp",
    }.get(largest, "raise parallel.tp, pp or ep")
    yield (
        f"stage {fullest} needs {stage.total:.1f} GiB and {gpu.name} has {gpu.memory_gib:.1f}; the largest "
        f"part is {largest} with {parts[largest]:.1f} GiB: {advice}"
    )


def _servers_fit(cfg: Config, shape: ModelShape, gpu: Hardware) -> Iterator[str]:
    server = served(cfg, shape, gpu)
    if server is not None and server.weights + server.sequence > server.room:
        yield (
            f"a server has {server.room:.1f} GiB of each GPU and needs {server.weights:.1f} for weights "
            f"and {server.sequence:.1f} for the longest sequence: raise rollout.server.tp, gpu_memory_share, "
            "or let nodes of their own serve (rollout.server.urls; ROLLOUT_NODES of slurm/common.sh)"
        )


def _as_planned(cfg: Config, found: Findings, shape: ModelShape) -> Iterator[str]:
    """The estimate stands on the planner's own count of parameters: it must be that of the built ranks."""
    layout = Layout(cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.vpp, 1, cfg.parallel.ep, cfg.parallel.etp)
    planned = stage_shards(planned_shape(shape), layout)
    for built in found.ranks:
        expected = planned[built.stage].dense + planned[built.stage].experts
        if abs(built.parameters - expected) > 0.03 * expected:
            yield (
                f"rank {built.rank} holds {built.parameters:,} parameters and the planner counts "
                f"{expected:,.0f}: its memory estimate does not hold for this split"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
