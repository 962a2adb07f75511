"""The fleet of a replica, from the config: which servers, on which devices, with which deadlines."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from hpt_mega.config import Config
from hpt_mega.megatron.model import DTYPES
from hpt_mega.megatron.runtime import Layout
from hpt_mega.rollout.dispatch import Fleet
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.handle import EngineHandle
from hpt_mega.rollout.sglang import Launch, Settings, SGLangEngine
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import ServerSettings, VLLMServer

DEATHS = 3  # of a server in a row, without verified weights in between; then it is given up
ATTEMPTS = 3  # at a prompt, on servers that live or die
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
HEARTBEATS = 4  # within the longest time that a server may take for an answer


def build_fleet(cfg: Config, layout: Layout, sync: WeightSync) -> Fleet:
    """A replica's servers, which begin to start; call it on the replica's leader."""
    engines = {
        name: _engine(cfg, name, _devices(cfg, layout, number))
        for number in range(cfg.rollout.server.engines)
        for name in [f"{layout.dp_rank}.{number}"]
    }
    heartbeat_s = cfg.rollout.server.answer_deadline_s / HEARTBEATS
    return Fleet(
        engines, limits(cfg), heartbeat_s, introduce=lambda client: client.connect(sync.path, sync.plan)
    )


def limits(cfg: Config) -> Limits:
    """The fleet's deadlines and bounds."""
    server = cfg.rollout.server
    return Limits(
        start_s=server.start_deadline_s,
        update_s=server.update_deadline_s,
        request_s=server.request_deadline_s,
        silence_s=2 * server.answer_deadline_s,  # a look has a deadline of its own, half of it
        backoff_s=BACKOFF_S,
        backoff_max_s=LONGEST_BACKOFF_S,
        failures=DEATHS,
        updates=2,
        attempts=ATTEMPTS,
        slots=cfg.rollout.max_sequences,
    )


def _engine(cfg: Config, name: str, environment: dict[str, str]) -> EngineHandle:
    rollout, server = cfg.rollout, cfg.rollout.server
    log = Path(cfg.run_dir) / "logs" / f"engine{name}.log"
    dtype = str(DTYPES[cfg.precision.dtype]).removeprefix("torch.")
    length = cfg.data.max_prompt_tokens + rollout.max_new_tokens
    if rollout.engine == "sglang":
        launch = Launch(
            model=Path(cfg.model.path),
            dtype=dtype,
            max_model_len=length,
            max_sequences=rollout.max_sequences,
            memory_share=server.gpu_memory_share,
            sleeps=server.sleep,
            repeatable=cfg.trainer.deterministic,
            environment=environment,
        )
        settings = Settings(
            tp=server.tp,
            weights="memory",
            request_s=server.request_deadline_s,
            update_s=server.update_deadline_s,
            control_s=server.answer_deadline_s,
        )
        return SGLangEngine(name, settings, log, launch=launch)
    settings_vllm = ServerSettings(
        model=Path(cfg.model.path),
        dtype=dtype,
        max_model_len=length,
        max_sequences=rollout.max_sequences,
        tp=server.tp,
        seed=cfg.seed,
        kv_cache_gib=server.kv_cache_gib,
        gpu_memory_share=server.gpu_memory_share,
        sleeps=server.sleep,
        logp_at_temperature=rollout.temperature not in (0.0, 1.0),
    )
    return VLLMServer(
        name, settings_vllm, log, server.request_deadline_s, server.answer_deadline_s, environment
    )


def _devices(cfg: Config, layout: Layout, number: int) -> dict[str, str]:
    """The GPUs of a replica's server, as its environment: those of the replica's ranks, a part for each."""
    if not torch.cuda.is_available():
        return {}
    ranks = dist.get_process_group_ranks(layout.replica_group)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))  # a replica is on one machine
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    places = [rank % here for rank in ranks][number * cfg.rollout.server.tp :][: cfg.rollout.server.tp]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[p] if names != [""] else str(p) for p in places)}
