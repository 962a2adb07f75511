"""What a single key may hold: numbers within bounds, one of the known names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from operator import attrgetter

from hpt_mega.config import Config, flattened
from hpt_mega.data.readers import READERS
from hpt_mega.data.templates import TEMPLATES
from hpt_mega.rewards.function import load_function
from hpt_mega.rewards.pool import KINDS, is_kind
from hpt_mega.telemetry.loggers import problems as logger_problems

PRECISIONS = ("bf16", "fp16", "fp32")
SCHEDULES = ("constant", "cosine", "linear")
RESUME = ("never", "auto")
ENGINES = ("megatron", "vllm", "sglang")
CHECKPOINT_FORMATS = ("dp_reshardable", "fully_reshardable")
SIZES = ("tp", "cp", "pp", "dp", "vpp", "ep", "etp")  # of parallel
OPTIONS = ("algorithm.options.", "gate.options.")  # whose bounds the algorithm and the gate know
RECOMPUTE = ("none", "selective", "full")


def numbers(cfg: Config) -> Iterator[str]:
    """Numbers outside their bounds."""
    above_zero = (
        "data.train_questions data.heldout_questions "
        "data.max_prompt_tokens data.max_demonstration_tokens reward.workers reward.deadline_s "
        "reward.memory_mib evaluation.samples evaluation.top_p "
        "rollout.max_new_tokens rollout.max_sequences rollout.top_p rollout.server.tp "
        "rollout.server.kv_cache_gib rollout.server.gpu_memory_share rollout.server.bucket_mib "
        "rollout.server.start_deadline_s rollout.server.request_deadline_s rollout.server.engines "
        "rollout.server.update_deadline_s rollout.server.answer_deadline_s "
        "optimizer.lr optimizer.eps critic.lr critic.clip trainer.steps trainer.updates_per_step "
        "trainer.questions_per_step trainer.tokens_per_microbatch trainer.keep_checkpoints "
        "trainer.deadline_s precision.loss_scale_window"
    )
    at_least_zero = (
        "rollout.rollouts_per_question rollout.temperature rollout.server.probe_bound rollout.staleness "
        "evaluation.temperature "
        "optimizer.warmup_steps optimizer.weight_decay "
        "optimizer.clip_grad optimizer.beta1 optimizer.beta2 optimizer.min_lr_ratio trainer.eval_every "
        "trainer.save_every"
    )
    for key in [*(f"parallel.{size}" for size in SIZES), *above_zero.split()]:
        if not (value := attrgetter(key)(cfg)) > 0:
            yield f"{key} is {value}, expected above 0"
    for key in at_least_zero.split():
        if not (value := attrgetter(key)(cfg)) >= 0:
            yield f"{key} is {value}, expected 0 or above"
    yield from _at_most(cfg)


def _at_most(cfg: Config) -> Iterator[str]:
    """Numbers above their bounds."""
    for key, value in flattened(asdict(cfg)):
        if value == math.inf and not key.startswith(OPTIONS):
            yield f"{key} is {value}, expected a finite number"
    for key, most in (("seed", 2**32 - 1), ("telemetry.prometheus_port", 65535)):
        if not 0 <= (value := attrgetter(key)(cfg)) <= most:
            yield f"{key} is {value}, expected 0 to {most}"
    for key in ("rollout.top_p", "evaluation.top_p", "optimizer.min_lr_ratio"):
        if (value := attrgetter(key)(cfg)) > 1:
            yield f"{key} is {value}, expected at most 1"
    if not cfg.precision.loss_scale >= 1:
        yield f"precision.loss_scale is {cfg.precision.loss_scale}, expected 1 or above"
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if (value := attrgetter(key)(cfg)) >= 1:
            yield f"{key} is {value}, expected below 1"


def names(cfg: Config) -> Iterator[str]:
    """Names that nothing is known by."""
    for key, value, known in (
        ("precision.dtype", cfg.precision.dtype, PRECISIONS),
        ("rollout.engine", cfg.rollout.engine, ENGINES),
        ("data.template", cfg.data.template, TEMPLATES),
        ("data.reader", cfg.data.reader, READERS),
        ("optimizer.schedule", cfg.optimizer.schedule, SCHEDULES),
        ("resume", cfg.resume, RESUME),
        ("trainer.checkpoint_format", cfg.trainer.checkpoint_format, CHECKPOINT_FORMATS),
        ("parallel.recompute", cfg.parallel.recompute, RECOMPUTE),
    ):
        if value not in known:
            yield f"{key} is {value!r}, expected {' or '.join(known)}"
    yield from _reward(cfg.reward.kind)
    yield from logger_problems(cfg.telemetry.loggers)


def _reward(kind: str) -> Iterator[str]:
    if kind in KINDS:
        return
    if not is_kind(kind):
        yield f"reward.kind is {kind!r}, expected {' or '.join(KINDS)}, or the dotted path of a function"
        return
    try:
        load_function(kind)
    except ValueError as error:
        yield f"reward.kind={error}"
