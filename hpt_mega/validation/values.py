"""What a single key may hold: numbers within bounds, one of the known names."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from hpt_mega.config import Config
from hpt_mega.data.readers import READERS
from hpt_mega.data.templates import TEMPLATES
from hpt_mega.rewards.function import load_function
from hpt_mega.rewards.pool import KINDS, is_kind
from hpt_mega.telemetry.loggers import problems as logger_problems
from hpt_mega.validation.bounds import infinite, outside

PRECISIONS = ("bf16", "fp16", "fp32")
SCHEDULES = ("constant", "cosine", "linear")
RESUME = ("never", "auto")
ENGINES = ("megatron", "vllm", "sglang")
CHECKPOINT_FORMATS = ("dp_reshardable", "fully_reshardable")
SIZES = ("tp", "cp", "pp", "dp", "vpp", "ep", "etp")  # of parallel
OPTIONS = ("algorithm.options.", "gate.options.")  # whose bounds the algorithm and the gate know
RECOMPUTE = ("none", "selective", "full")
BOUNDS = {
    "above 0": """
data.train_questions data.heldout_questions data.max_prompt_tokens data.max_demonstration_tokens
reward.workers reward.deadline_s reward.memory_mib evaluation.samples evaluation.top_p
rollout.max_new_tokens rollout.max_sequences rollout.top_p
rollout.server.tp rollout.server.engines rollout.server.kv_cache_gib rollout.server.gpu_memory_share
rollout.server.bucket_mib rollout.server.start_deadline_s rollout.server.request_deadline_s
rollout.server.update_deadline_s rollout.server.answer_deadline_s
optimizer.lr optimizer.eps critic.lr critic.clip
trainer.steps trainer.updates_per_step trainer.questions_per_step trainer.tokens_per_microbatch
trainer.keep_checkpoints trainer.deadline_s precision.loss_scale_window
""",
    "0 or above": """
rollout.rollouts_per_question rollout.temperature rollout.staleness rollout.server.probe_bound
evaluation.temperature trainer.eval_every trainer.save_every
optimizer.warmup_steps optimizer.weight_decay optimizer.clip_grad optimizer.beta1 optimizer.beta2
optimizer.min_lr_ratio
""",
    "1 or above": "precision.loss_scale",
    "below 1": "optimizer.beta1 optimizer.beta2",
    "at most 1": "rollout.top_p evaluation.top_p optimizer.min_lr_ratio",
}


def numbers(cfg: Config) -> Iterator[str]:
    """Numbers outside their bounds."""
    yield from outside(cfg, {"above 0": " ".join(f"parallel.{size}" for size in SIZES)})
    yield from outside(cfg, BOUNDS)
    yield from infinite(cfg, but=OPTIONS)
    for key, most in (("seed", 2**32 - 1), ("telemetry.prometheus_port", 65535)):
        if not 0 <= (value := attrgetter(key)(cfg)) <= most:
            yield f"{key} is {value}, expected 0 to {most}"


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
