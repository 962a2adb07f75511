"""The fleet of a replica, from the config: which servers, where, on which devices, with which deadlines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from hpt_mega.config import Config, ConfigError
from hpt_mega.megatron.model import DTYPES
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.network import address_towards
from hpt_mega.rollout.dispatch import Fleet
from hpt_mega.rollout.external import ExternalServer, rollout_key
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.handle import EngineHandle
from hpt_mega.rollout.sglang import Launch, Settings, SGLangEngine
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import ServerSettings, VLLMServer

DEATHS = 3  # of a server in a row, without verified weights in between; then it is given up
ATTEMPTS = 3  # at a prompt, on servers that live or die
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
# Samples in a server for each that it works on: those of one prompt end at different times, and the next ones
# wait in the server until then. More would wait longer than rollout.server.request_deadline_s is meant for.
WAITING = 2
HEARTBEATS = 4  # within the longest time that a server may take for an answer


def build_fleet(cfg: Config, layout: Layout, sync: WeightSync) -> Fleet:
    """A replica's servers, which begin to start or are looked for; call it on the replica's leader."""
    engines: dict[str, EngineHandle] = {}
    if urls := cfg.rollout.server.urls[layout.dp_rank :: layout.dp_size]:
        for number, url in enumerate(urls):
            name = f"{layout.dp_rank}.{number}"
            engines[name] = _external(cfg, name, url)
    else:
        for number in range(cfg.rollout.server.engines):
            name = f"{layout.dp_rank}.{number}"
            engines[name] = _engine(cfg, name, _devices(cfg, layout, number))
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
        slots=WAITING * cfg.rollout.max_sequences,
    )


def vllm_server(cfg: Config, name: str, log: Path, environment: dict[str, str]) -> VLLMServer:
    """A server of this host, not started; `environment` names its devices where it is not to have all."""
    rollout, server = cfg.rollout, cfg.rollout.server
    settings = ServerSettings(
        model=Path(cfg.model.path),
        dtype=_dtype(cfg),
        max_model_len=_length(cfg),
        max_sequences=rollout.max_sequences,
        tp=server.tp,
        seed=cfg.seed,
        kv_cache_gib=server.kv_cache_gib,
        gpu_memory_share=server.gpu_memory_share,
        sleeps=server.sleep,
        logp_at_temperature=rollout.temperature not in (0.0, 1.0),
    )
    return VLLMServer(
        name,
        settings,
        log,
        server.request_deadline_s,
        server.update_deadline_s,
        server.answer_deadline_s,
        environment,
    )


def _engine(cfg: Config, name: str, environment: dict[str, str]) -> EngineHandle:
    """A server that we start."""
    log = _log(cfg, name)
    if cfg.rollout.engine == "vllm":
        return vllm_server(cfg, name, log, environment | _batch_invariance(cfg))
    launch = Launch(
        model=Path(cfg.model.path),
        dtype=_dtype(cfg),
        max_model_len=_length(cfg),
        max_sequences=cfg.rollout.max_sequences,
        memory_share=cfg.rollout.server.gpu_memory_share,
        sleeps=cfg.rollout.server.sleep,
        repeatable=cfg.trainer.deterministic,
        environment=environment,
    )
    return SGLangEngine(name, _sglang_settings(cfg, weights="memory"), log, launch=launch)


def _batch_invariance(cfg: Config) -> dict[str, str]:
    """A deterministic run's answers from vLLM's GPU kernels must not depend on what else it works on.

    `hpt serve` goes without: vLLM then also sets options of NCCL, and the trainer shares a group with it.
    """
    on_gpu = cfg.trainer.deterministic and torch.cuda.is_available()
    return {"VLLM_BATCH_INVARIANT": "1"} if on_gpu else {}


def _external(cfg: Config, name: str, url: str) -> EngineHandle:
    """A server that runs at a URL."""
    server, key = cfg.rollout.server, rollout_key()
    if cfg.rollout.engine == "vllm":
        return ExternalServer(
            name,
            url,
            key,
            server.tp,
            server.request_deadline_s,
            server.update_deadline_s,
            server.answer_deadline_s,
        )
    settings = replace(
        _sglang_settings(cfg, weights="broadcast"),
        group_host=address_towards(str(urlsplit(url).hostname)),
        group_backend="nccl" if torch.cuda.is_available() else "gloo",
    )
    return SGLangEngine(name, settings, _log(cfg, name), url=url, key=key)


def _sglang_settings(cfg: Config, weights: Literal["memory", "broadcast"]) -> Settings:
    server = cfg.rollout.server
    return Settings(
        tp=server.tp,
        weights=weights,
        request_s=server.request_deadline_s,
        update_s=server.update_deadline_s,
        control_s=server.answer_deadline_s,
    )


def _log(cfg: Config, name: str) -> Path:
    return Path(cfg.run_dir) / "logs" / f"engine{name}.log"


def _dtype(cfg: Config) -> str:
    return str(DTYPES[cfg.precision.dtype]).removeprefix("torch.")


def _length(cfg: Config) -> int:
    return cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens


def _devices(cfg: Config, layout: Layout, number: int) -> dict[str, str]:
    """The GPUs of a replica's server, as its environment: those of its ranks on this host, a part for each.

    Raises ConfigError where it has fewer here.
    """
    if not torch.cuda.is_available():
        return {}
    ranks, tp = dist.get_process_group_ranks(layout.replica_group), cfg.rollout.server.tp
    here = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))
    places = [rank % here for rank in ranks if rank // here == ranks[0] // here]
    mine = places[number * tp : (number + 1) * tp]
    if len(mine) < tp:
        raise ConfigError(
            f"rollout.server.engines x tp is {cfg.rollout.server.engines} x {tp} and the replica has "
            f"{len(places)} GPUs on its leader's host; lower one of them"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[p] if names != [""] else str(p) for p in mine)}
