"""The typed config tree (the schema of conf/) and the checks made before any process starts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    path: str = "models/smollm2-135m-instruct"  # a Hugging Face folder: config, safetensors, tokenizer


@dataclass
class ParallelConfig:
    tp: int = 1
    pp: int = 2
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass
class PrecisionConfig:
    dtype: str = "bf16"  # bf16 | fp32


@dataclass
class AlgorithmConfig:
    name: str = "hpt"  # a row of hpt_mega.objective.algorithms
    options: dict[str, float | int | str | bool] = field(default_factory=dict)  # e.g. {clip_high: 0.28}


@dataclass
class GateConfig:
    name: str = "switch"
    options: dict[str, float] = field(default_factory=dict)  # e.g. {threshold: 0.0}


@dataclass
class TaskConfig:
    """One reasoning-gym task of the mixture."""

    name: str
    weight: float = 1.0
    label: str = ""  # shown in reports; default: name
    options: dict[str, float | int | bool | str] = field(default_factory=dict)


@dataclass
class DataConfig:
    tasks: list[TaskConfig] = field(default_factory=list)
    train_questions: int = 2000
    heldout_questions: int = 192
    max_prompt_tokens: int = 256
    max_demonstration_tokens: int = 96  # longer ones could not be reproduced within rollout.max_new_tokens
    instruction: str = ""  # the system message; empty: the chat template's own
    seed: int = 17


@dataclass
class RewardConfig:
    kind: str = "math"
    workers: int = 1
    deadline_s: float = 5.0


@dataclass
class RolloutConfig:
    engine: str = "megatron"
    rollouts_per_question: int = 8
    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class OptimizerConfig:
    lr: float = 2e-5
    warmup_steps: int = 2
    schedule: str = "cosine"  # constant | cosine | linear
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0


@dataclass
class TrainerConfig:
    steps: int = 30
    questions_per_step: int = 16
    tokens_per_microbatch: int = 1024
    eval_every: int = 0  # 0: only before the first and after the last step
    save_every: int = 10
    keep_checkpoints: int = 2
    deterministic: bool = False
    export_hf: bool = True
    deadline_s: float = 600.0  # longest wait for another rank in one phase


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run_dir: str = "runs/latest"
    resume: str = "never"  # never | auto
    seed: int = 1234
