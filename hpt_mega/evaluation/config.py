"""The config of `hpt eval`, and how it is read from KEY=VALUE and kept in the run's folder.

What a benchmark is lives in benchmarks.py; what the questions are asked with in sample.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig

from hpt_mega.config import ColumnsConfig, ConfigError, changes, fit, parse_settings, read_yaml
from hpt_mega.config import leaves as key_names
from hpt_mega.suggestion import did_you_mean

LONGEST_RESPONSE = 8192  # tokens, where no number is given


@dataclass
class LayoutConfig:
    """How the model lies over processes, as in training; of engine=vllm only dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1  # replicas, which take questions in turn
    cp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    stage_layers: list[int] = field(default_factory=list)


@dataclass
class DtypeConfig:
    dtype: str = "bf16"  # bf16 | fp16 | fp32


@dataclass
class ServerConfig:
    """Each replica's server."""

    kv_cache_gib: int = 1  # on CPU
    gpu_memory_share: float = 0.5  # on GPU: of its memory, for weights and KV cache
    start_deadline_s: float = 300.0


@dataclass
class GraderConfig:
    workers: int = 1
    deadline_s: float = 5.0
    memory_mib: int = 1024  # of a worker's address space


@dataclass
class EvalConfig:
    """Sampling is the paper's: temperature 0.6, top-p 0.95, at most 8,192 tokens."""

    model: str = ""  # a Hugging Face folder: config, safetensors, tokenizer
    # names of conf/benchmark, data files, hf:OWNER/NAME, reasoning_gym:TASK
    benchmarks: list[str] = field(default_factory=list)
    k: int = 0  # samples a question; 0: each benchmark's own number
    greedy: bool = True  # one greedy response a question besides
    temperature: float = 0.6
    top_p: float = 0.95
    # null: what the longest prompt leaves of the model's positions, at most LONGEST_RESPONSE
    max_new_tokens: int | None = None
    questions: int = 0  # of each benchmark, the first ones; 0: all
    template: str = "chat"  # the tokenizer's, or qwen_math, llama_base, plain
    instruction: str = ""  # the system message
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)  # of benchmarks given as files or datasets
    split: str = "test"  # of benchmarks given as datasets
    kind: str = (
        "auto"  # of benchmarks given as files: math, choice, exact; auto: choice where all are letters
    )
    training_data: list[str] = field(default_factory=list)  # compared with the benchmarks by 13-grams
    training_columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    published: str = "qwen2_5_math_7b"  # whose published rows stand beside; "": none
    engine: str = "megatron"  # megatron | vllm
    server: ServerConfig = field(default_factory=ServerConfig)  # of engine=vllm
    parallel: LayoutConfig = field(default_factory=LayoutConfig)
    precision: DtypeConfig = field(default_factory=DtypeConfig)
    reward: GraderConfig = field(default_factory=GraderConfig)
    max_sequences: int = 128  # decoded together
    questions_per_batch: int = 16  # asked together, then kept: what a kill can cost
    level: float = 0.95  # of the confidence intervals
    seed: int = 1234
    deadline_s: float = 3600.0  # longest wait for another rank in one phase
    run_dir: str = "runs/eval"


CONFIG, RESPONSES = "config.yaml", "responses.jsonl"  # in run_dir
# What may differ between a run and its resumption without changing a response.
FREE_TO_CHANGE = ("run_dir", "deadline_s", "level", "published", "training_data", "training_columns")
# Sections that were the trainer's own once; an evaluation read no more of them than they hold now.
SHORTENED = ("server", "parallel", "precision", "reward")


def compose(settings: Sequence[str]) -> EvalConfig:
    """The config of KEY=VALUE settings such as k=32 or columns.prompt=problem. Raises ConfigError."""
    known = list(key_names(EvalConfig))
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ConfigError(f"got {setting!r}, expected KEY=VALUE, for instance k=32")
        if key not in known:
            near = did_you_mean(key, known)
            raise ConfigError(f"unknown key {key}{near or '; known: ' + ', '.join(known)}")
    cfg = fit(EvalConfig, "hpt eval", parse_settings(settings))
    for key, expected in (("model", "model=FOLDER"), ("benchmarks", "benchmarks=[aime24,math500]")):
        if not getattr(cfg, key):
            raise ConfigError(f"no {key} given; expected {expected}")
    return cfg


def load(path: Path) -> EvalConfig:
    """The config that a run kept, also of before the sections were shortened. Raises ConfigError."""
    given, known = read_yaml(path, "the config.yaml of an evaluation"), set(key_names(EvalConfig))
    for section in SHORTENED:
        if isinstance(part := given.get(section), DictConfig):
            for key in [key for key in part if f"{section}.{key!s}" not in known]:
                del part[key]
    return fit(EvalConfig, str(path), given)


def check_folder(cfg: EvalConfig) -> None:
    """Raise ConfigError unless run_dir is free, the same evaluation's, or one's without a response yet."""
    if not cfg.run_dir:
        raise ConfigError("run_dir is empty; expected a folder of the evaluation's own, such as runs/eval")
    folder = Path(cfg.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is a file; choose another folder")
    if not (folder / CONFIG).is_file():
        # beside what other ranks have just begun to write
        if folder.is_dir() and any(one.name != "logs" and one.name[0] != "." for one in folder.iterdir()):
            raise ConfigError(
                f"run_dir={folder} holds files of no evaluation; choose a new folder, such as {folder}/eval"
            )
        return
    if "trainer" in read_yaml(folder / CONFIG, "the config.yaml of an evaluation"):
        raise ConfigError(
            f"run_dir={folder} holds a run of hpt train; choose another folder, such as {folder}/eval"
        )
    earlier = load(folder / CONFIG)
    if (responses := folder / RESPONSES).is_file() and responses.stat().st_size:
        check_resumable(cfg, earlier)


def check_resumable(cfg: EvalConfig, earlier: EvalConfig) -> None:
    """Raise ConfigError where a folder's responses were made with settings that would give others."""
    if cfg.max_new_tokens is None and earlier.max_new_tokens == LONGEST_RESPONSE:
        earlier = replace(earlier, max_new_tokens=None)  # the default of before
    if changed := changes(earlier, cfg, FREE_TO_CHANGE):
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds responses of another evaluation ({'; '.join(changed)}); "
            "set another run_dir, or the same settings to go on with it"
        )
