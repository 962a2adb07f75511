"""The servers of rollouts, where there are any."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from hpt_mega.checkpoint.megatron_folder import is_megatron
from hpt_mega.config import Config, ConfigError
from hpt_mega.rollout.external import rollout_key
from hpt_mega.validation.layout import divisors


def engine(cfg: Config) -> Iterator[str]:
    """Whether the chosen engine is installed, or the key is there for one that runs elsewhere."""
    if cfg.rollout.server.urls:
        try:
            rollout_key()
        except ConfigError as error:
            yield f"rollout.server.urls names servers, and {error}"
        return
    yield from installed(cfg)


def installed(cfg: Config) -> Iterator[str]:
    """Whether the chosen engine is installed."""
    if cfg.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield (
            "rollout.engine is vllm, which is not installed; on GPUs `pip install -e '.[vllm]'`, without one "
            "`make .venv/.vllm`, or set rollout=megatron"
        )
    if cfg.rollout.engine == "sglang" and not torch.cuda.is_available():
        yield (
            "rollout.engine is sglang, whose kernels need a GPU, and torch sees none here; set rollout=vllm, "
            "which has a CPU build, or rollout=megatron"
        )
    elif cfg.rollout.engine == "sglang" and importlib.util.find_spec("sglang") is None:
        yield "rollout.engine is sglang, which is not installed; `pip install -e '.[sglang]'`"


def serves(cfg: Config) -> Iterator[str]:
    """Whether `hpt serve` can start what the config names."""
    if cfg.rollout.engine != "vllm":
        yield (
            f"rollout.engine is {cfg.rollout.engine} and `hpt serve` starts vLLM; set rollout=vllm (SGLang "
            "is served by its own `python -m sglang.launch_server`)"
        )
    yield from installed(cfg)


def servers(cfg: Config, shape: Mapping[str, Any], on_gpu: bool) -> Iterator[str]:
    """What the servers of rollouts need, where there are any."""
    rollout = cfg.rollout
    yield from _urls(cfg)
    if rollout.engine == "megatron":
        yield from _embedded(cfg, on_gpu)
        return
    if rollout.server.sleep and not on_gpu:
        yield (
            "rollout.server.sleep frees a server's GPU memory during training, and torch sees no GPU here; "
            "set it to false"
        )
    if rollout.server.sleep and rollout.staleness:
        yield (
            f"rollout.server.sleep is true and rollout.staleness {rollout.staleness}, for which servers work "
            "during training; set one to 0 or false"
        )
    parallel = cfg.parallel
    if parallel.ep * parallel.etp > parallel.tp * parallel.cp:
        yield (
            f"parallel.ep x etp is {parallel.ep * parallel.etp} and a replica has "
            f"{parallel.tp * parallel.cp} ranks a stage (tp x cp): a server is brought the weights of "
            "one replica, which lacks the others' experts; lower ep, raise tp, or set rollout=megatron"
        )
    if is_megatron(Path(cfg.model.path)):
        yield (
            f"model.path={cfg.model.path} is a Megatron checkpoint and rollout.engine "
            f"{rollout.engine}, which starts from a Hugging Face folder; make one by `hpt convert "
            "megatron-to-hf`, or set rollout=megatron"
        )
    if rollout.temperature not in (0.0, 1.0) and rollout.top_p < 1:
        yield (
            f"rollout.temperature is {rollout.temperature} and top_p {rollout.top_p}: servers report "
            "log-probabilities after the truncation, which the objective cannot use; set one of them to 1"
        )
    heads = shape.get("num_attention_heads")
    if heads and heads % rollout.server.tp:
        fitting = divisors(heads, heads)
        yield f"rollout.server.tp is {rollout.server.tp} and the model has {heads} heads; expected {fitting}"
    wanted = rollout.server.engines * rollout.server.tp
    gpus = parallel.tp * parallel.cp * parallel.pp
    if on_gpu and not rollout.server.urls and wanted > gpus:
        yield (
            f"rollout.server.engines x tp is {rollout.server.engines} x {rollout.server.tp} = {wanted} and a "
            f"replica has {gpus} GPUs, those of its ranks; lower one of them"
        )


def _embedded(cfg: Config, on_gpu: bool) -> Iterator[str]:
    """What the trainer's own processes cannot do."""
    if cfg.rollout.staleness:
        yield (
            f"rollout.staleness is {cfg.rollout.staleness} and rollout.engine megatron, whose processes are "
            "busy with training; set rollout=vllm, or staleness 0"
        )
    if cfg.parallel.pp > 1 and on_gpu:
        yield (
            f"parallel.pp is {cfg.parallel.pp} and rollout.engine megatron, whose pipeline of decoded tokens "
            "is written for CPUs; set rollout=vllm, or pp to 1"
        )


def _urls(cfg: Config) -> Iterator[str]:
    """Whether there is a server elsewhere for each replica."""
    urls, dp = cfg.rollout.server.urls, cfg.parallel.dp
    if not urls:
        return
    if cfg.rollout.engine == "megatron":
        yield (
            "rollout.server.urls names servers and rollout.engine is megatron, which asks none; set "
            "rollout=vllm, or leave them out"
        )
    if cfg.rollout.server.sleep:
        yield (
            "rollout.server.sleep frees memory for the trainer, and rollout.server.urls names servers whose "
            "GPUs are not the trainer's; set it to false"
        )
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
            yield f"rollout.server.urls holds {url!r}, expected http://HOST:PORT"
    if len(set(urls)) < max(len(urls), dp):
        yield (
            f"rollout.server.urls names {len(set(urls))} servers in {len(urls)} entries and parallel.dp is "
            f"{dp}; expected different ones, at least one for each replica"
        )
