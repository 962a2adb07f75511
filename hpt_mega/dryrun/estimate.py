"""What a configured job needs, by arithmetic: the planner's memory of each stage, the batch as it is cut.

How the planner counts is in planning/; what a rank really holds is in rank.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpt_mega import planning
from hpt_mega.config import Config
from hpt_mega.objective import algorithm
from hpt_mega.planning import Hardware
from hpt_mega.planning.memory import GIB, RUNTIME_GIB, stage_memories
from hpt_mega.planning.rollout import kv_bytes_per_token
from hpt_mega.resharding.mapping import ModelShape
from hpt_mega.scheduler import gate


@dataclass(frozen=True)
class Stage:
    """GiB on a GPU of one pipeline stage."""

    training: planning.Memory
    engine: float  # the embedded engine's KV cache at its largest, or the share of a server on the same GPUs
    engine_stays: bool  # in memory while the trainer works
    beside: dict[str, float]  # the policy: critic and reference model, where the algorithm asks for them

    @property
    def total(self) -> float:
        """Of the fuller of the two phases; while the engine decodes, gradients and optimizer stay put."""
        training = self.training.total + (self.engine if self.engine_stays else 0.0)
        return sum(self.beside.values()) + max(training, self.training.held + RUNTIME_GIB + self.engine)

    def parts(self) -> dict[str, float]:
        return self.training.parts() | self.beside | {"engine": self.engine}


@dataclass(frozen=True)
class Served:
    """GiB on a GPU of a server of rollouts."""

    room: float  # that rollout.server.gpu_memory_share gives it
    weights: float
    sequence: float  # KV cache of the longest one


@dataclass(frozen=True)
class Batch:
    """How a step's work is cut."""

    questions: int  # of a replica
    rollouts: int  # of the job
    longest: int  # tokens of a sequence
    row: int  # tokens of a micro-batch, at most
    microbatches: int  # of a replica and update, at most
    epochs: float


def batch(cfg: Config) -> Batch:
    """At most: every sequence as long as it may be, every demonstration in the batch too."""
    trainer, rollout, parallel = cfg.trainer, cfg.rollout, cfg.parallel
    response = max(rollout.max_new_tokens, cfg.data.max_demonstration_tokens)
    longest = cfg.data.max_prompt_tokens + response
    row = max(trainer.tokens_per_microbatch, longest)
    # as Learner deals questions out over updates, and plan_microbatches sequences over all replicas
    sequences = -(-trainer.questions_per_step // trainer.updates_per_step) * _sequences_of_question(cfg)
    multiple = parallel.pp if parallel.vpp > 1 else 1
    rounds = -(-sequences // (row // longest * parallel.dp * multiple))
    return Batch(
        questions=trainer.questions_per_step // parallel.dp,
        rollouts=trainer.questions_per_step * rollout.rollouts_per_question,
        longest=longest,
        row=row,
        microbatches=(rounds + rounds // 64) * multiple,  # plan_microbatches leaves itself some play
        epochs=trainer.steps * trainer.questions_per_step / cfg.data.train_questions,
    )


def _sequences_of_question(cfg: Config) -> int:
    """At most: the gate may keep rollouts and demonstration, or one of them."""
    rollouts = cfg.rollout.rollouts_per_question
    if algorithm(cfg.algorithm.name, **cfg.algorithm.options).trains_on_pairs:
        return max(1, rollouts)
    alpha, beta = gate(cfg.gate.name, **cfg.gate.options).at_every_rate(rollouts)
    return max(1, int((rollouts * (alpha > 0) + (beta > 0)).max()))


def stages(cfg: Config, shape: ModelShape, gpu: Hardware) -> list[Stage]:
    """Memory of each pipeline stage. Raises PlanError where the layout is impossible."""
    parallel, cut = cfg.parallel, batch(cfg)
    sized = planned_shape(shape)
    multiple = parallel.tp * parallel.cp * 2
    job = planning.Job(
        gpus=parallel.world_size,
        batch=parallel.dp * parallel.pp * max(1, cut.microbatches // parallel.pp),
        seq=-(-cut.row // multiple) * multiple,
        precision=_planned_precision(cfg),
        distributed_optimizer=parallel.distributed_optimizer,
        number_bytes=_number_bytes(cfg),
    )
    layout = planning.Layout(
        **{key: getattr(parallel, key) for key in ("tp", "pp", "vpp", "cp", "ep", "etp", "recompute")}
    )
    found = stage_memories(sized, job, layout)
    beside = _beside(cfg, found, stage_memories(sized, job, layout, output=False))
    server, embedded = cfg.rollout.server, cfg.rollout.engine == "megatron"
    engine = 0.0  # on other GPUs
    if embedded:
        cached = cfg.rollout.max_sequences * cut.longest
        engine = cached * kv_bytes_per_token(sized, parallel.tp, job.number_bytes) / parallel.pp / GIB
    elif not server.urls:
        engine = server.gpu_memory_share * gpu.memory_gib
    stays = not embedded and not server.sleep
    return [Stage(training, engine, stays, models) for training, models in zip(found, beside, strict=True)]


def _beside(
    cfg: Config, policy: list[planning.Memory], critic: list[planning.Memory]
) -> list[dict[str, float]]:
    """GiB of each stage's models beside the policy.

    The critic learns before the policy does (Learner): its activations are never there with the policy's.
    """
    estimator = algorithm(cfg.algorithm.name, **cfg.algorithm.options)
    return [
        ({"critic": values.held} if estimator.needs_values else {})
        | ({"reference": trained.weights} if estimator.needs_reference_model else {})
        for trained, values in zip(policy, critic, strict=True)
    ]


def served(cfg: Config, shape: ModelShape, gpu: Hardware) -> Served | None:
    """What a server has and needs; None where the trainer's processes decode."""
    if cfg.rollout.engine == "megatron":
        return None
    sized, tp, number_bytes = planned_shape(shape), cfg.rollout.server.tp, _number_bytes(cfg)
    return Served(
        room=cfg.rollout.server.gpu_memory_share * gpu.memory_gib,
        weights=number_bytes * sized.parameters() / tp / GIB,
        sequence=kv_bytes_per_token(sized, tp, number_bytes) * batch(cfg).longest / GIB,
    )


def planned_shape(shape: ModelShape) -> planning.ModelShape:
    """The planner's sizes of a model whose config.json was read."""
    experts, latent = shape.experts, shape.latent
    sizes: dict[str, Any] = {}
    if experts is not None:
        sizes |= {
            "experts": experts.count,
            "topk": experts.top_k,
            "expert_ffn": experts.ffn_hidden_size,
            "shared_ffn": experts.shared_ffn_hidden_size or 0,
            "dense_layers": min(experts.first_layer, shape.num_layers),
        }
    if latent is not None:
        sizes |= {
            "q_rank": latent.q_lora_rank,
            "kv_rank": latent.kv_lora_rank,
            "rope_dim": latent.qk_rope_head_dim,
        }
    return planning.ModelShape(
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        heads=shape.num_attention_heads,
        ffn=0 if experts is not None and experts.first_layer == 0 else shape.ffn_hidden_size,
        vocab=shape.vocab_size,
        kv_heads=shape.num_query_groups,
        head_dim=latent.qk_head_dim if latent is not None else shape.head_dim,
        tied=shape.tied,
        qkv_bias=shape.qkv_bias,
        qk_norm=shape.qk_norm,
        **sizes,
    )


def _planned_precision(cfg: Config) -> str:
    """fp8 where a recipe is chosen, whatever it is."""
    fp8 = getattr(cfg.precision, "fp8", None)
    return "fp8" if fp8 is not None and fp8.recipe else "bf16"


def _number_bytes(cfg: Config) -> int:
    return 4 if cfg.precision.dtype == "fp32" else 2
