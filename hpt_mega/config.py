"""The typed config tree (the schema of conf/) and how a config is composed, saved and loaded.

Whether a config makes sense is checked in validation/.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from hpt_mega.files import write_atomically
from hpt_mega.suggestion import did_you_mean

T = TypeVar("T")

SHOWN_CHARACTERS = 80  # of a value, in messages


class ConfigError(ValueError):
    """A config that cannot be used; the message says what was given, what was expected, what to change."""


@dataclass
class ModelConfig:
    path: str = "models/smollm2-135m-instruct"  # a Hugging Face folder, or a Megatron checkpoint
    hf: str = ""  # folder of config and tokenizer, for a Megatron checkpoint that brings none along
    rope_theta: float = 0.0  # in place of the folder's; 0: as it is. LUFFY trains Qwen2.5-Math with 40000
    max_positions: int = 0  # likewise; LUFFY: 16384
    published: str = ""  # its config.json as a file of conf/, for `hpt dryrun` where the folder is not there


@dataclass
class ParallelConfig:
    tp: int = 1
    pp: int = 2
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    cp: int = 1  # context: the tokens of each sequence over ranks
    vpp: int = 1  # interleaved pipeline: model chunks a stage
    ep: int = 1  # experts over tensor, context and data ranks
    etp: int = 1  # tensor parallelism inside an expert
    stage_layers: list[int] = field(default_factory=list)  # of each of pp x vpp chunks; empty: evenly
    recompute: str = "none"  # none | selective | full: which activations the backward pass computes again
    overlap: bool = False  # reduce gradients while the backward pass goes on

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def product(self) -> str:
        """The number of processes as a sentence's subject."""
        return (
            f"parallel.tp x cp x pp x dp = {self.tp} x {self.cp} x {self.pp} x {self.dp} = {self.world_size}"
        )


@dataclass
class Fp8Config:
    """FP8 in the linear layers of transformer layers; all else stays in precision.dtype.

    The defaults of the last four are Transformer Engine's.
    """

    recipe: str = ""  # delayed | tensorwise | blockwise | mxfp8; empty: no FP8
    format: str = "e4m3"  # e4m3 | hybrid (gradients in e5m2)
    first_layers: int = 0  # so many of the first and last layers stay in precision.dtype
    last_layers: int = 0
    param_gather: bool = False  # the distributed optimizer gathers weights in FP8
    margin: int = 0  # delayed: scales are lowered by 2^margin
    amax_history: int = 1024  # delayed: micro-batches remembered
    amax_algorithm: str = "max"  # delayed: max | most_recent of the history


@dataclass
class PrecisionConfig:
    dtype: str = "bf16"  # bf16 | fp16 | fp32
    # fp16: the loss is multiplied by this at first; by half of it after a gradient that is not finite, whose
    # step is skipped, and by twice of it after so many steps without one
    loss_scale: float = 65536.0
    loss_scale_window: int = 1000
    fp8: Fp8Config = field(default_factory=Fp8Config)


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
class ColumnsConfig:
    """Which column of the data holds what; a dot reaches into a nested one: reward_model.ground_truth.

    A text may also be a list of chat messages {role, content}. Columns of the default names may be absent,
    except prompt's; one that is named here must be in every row.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    demonstration: str = "demonstration"  # the preferred response of a pair
    rejected: str = "rejected"
    task: str = "task"
    choices: str = ""  # of a multiple-choice question: a list of texts, or {text: [...], label: [...]}
    incorrect: list[str] = field(default_factory=list)  # columns of wrong choices, mixed with the answer


@dataclass
class SourceConfig:
    """One file of a mixture."""

    file: str
    weight: float = 1.0  # how often it is drawn from, in proportion; its epochs are its own
    questions: int = 1000
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass
class DataConfig:
    tasks: list[TaskConfig] = field(default_factory=list)
    train_file: str = ""  # .jsonl, .json, .parquet, hf:OWNER/NAME or a folder of tools/prepare_data.py
    heldout_file: str = ""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)  # of the training file
    heldout_columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    mixture: list[SourceConfig] = field(
        default_factory=list
    )  # several training files, in place of train_file
    keep_solved: float = 1.0  # share of its draws at which a question whose rollouts were all right is asked
    reader: str = "torch"  # torch | dali: how the tokens of prepared folders are read
    keep_system: bool = True  # whether a file's own system messages are used
    template: str = "chat"  # the tokenizer's, or qwen_math, llama_base, plain
    train_questions: int = 2000
    heldout_questions: int = 192
    max_prompt_tokens: int = 256
    max_demonstration_tokens: int = 96  # longer ones could not be reproduced within rollout.max_new_tokens
    instruction: str = ""  # the system message; empty: the chat template's own
    seed: int = 17


@dataclass
class RewardConfig:
    kind: str = "math"  # math | choice | exact | format, or the dotted path of a function
    workers: int = 1
    deadline_s: float = 5.0
    memory_mib: int = 1024  # of a worker's address space


@dataclass
class ServerConfig:
    """The servers of engine=vllm and sglang; each data-parallel replica owns its own."""

    engines: int = 1  # a replica's servers; the prompts of one that dies go to the others
    # servers of `hpt serve` elsewhere, in place of started ones, dealt over the replicas; their key is in the
    # environment variable HPT_ROLLOUT_KEY: [http://node7:30000, http://node8:30000]
    urls: list[str] = field(default_factory=list)
    tp: int = 1  # tensor parallelism inside a server
    kv_cache_gib: int = 1  # on CPU
    gpu_memory_share: float = 0.5  # on GPU: of its memory, for weights and KV cache
    sleep: bool = False  # on GPU: that memory is the trainer's while it trains
    bucket_mib: int = 256  # new weights travel in buckets of this size, two at a time
    # mean |log-probability by engine - by trainer| on known texts after an update; 0: the dtype's
    probe_bound: float = 0.0
    start_deadline_s: float = 300.0
    request_deadline_s: float = 600.0  # of a prompt with all its samples
    update_deadline_s: float = 120.0  # of each step of a weight update: a bucket, the verification
    answer_deadline_s: float = 30.0  # of anything else; a server that is silent for longer is started anew


@dataclass
class RolloutConfig:
    engine: str = "megatron"  # megatron | vllm | sglang
    rollouts_per_question: int = 8
    max_new_tokens: int = 96
    temperature: float = 1.0  # also of the log-probabilities that are trained on, demonstrations' too
    top_p: float = 1.0
    max_sequences: int = 128  # decoded together
    staleness: int = 0  # optimizer steps that samples may lag behind; above 0 servers work during training
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass
class EvaluationConfig:
    """How held-out questions are asked in training; the authors take 8 samples at 0.6 and top-p 0.95."""

    samples: int = 1
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0


@dataclass
class ParameterGroup:
    """Parameters of the policy that learn otherwise than the others."""

    match: str  # a pattern as in optimizer.frozen
    lr_scale: float = 1.0  # times the learning rate of each step
    weight_decay: float | None = None  # of all it matches; null: optimizer.weight_decay, on matrices only


@dataclass
class OptimizerConfig:
    lr: float = 2e-5
    warmup_steps: int = 2
    schedule: str = "cosine"  # constant | cosine | linear
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # beside the root of the squared gradient: it scales as the loss does
    clip_grad: float = 1.0
    # share of Adam's state and work that a GPU leaves to the CPU: handed to megatron-core, never run here
    cpu_offload: float = 0.0
    # parameters of the policy that stay as they are: Megatron's names, with layers counted over the whole
    # model, or modules, either with wildcards: [embedding, "decoder.layers.?"]
    frozen: list[str] = field(default_factory=list)
    groups: list[ParameterGroup] = field(default_factory=list)


@dataclass
class CriticConfig:
    """The value model of algorithms with advantage gae (PPO)."""

    lr: float = 2e-5
    clip: float = 0.2  # how far a value may move from the old one before its gradient stops


@dataclass
class TrainerConfig:
    steps: int = 30
    questions_per_step: int = 16
    updates_per_step: int = 1  # optimizer steps on a step's trajectories, which are dealt out among them
    tokens_per_microbatch: int = 1024
    eval_every: int = 0  # 0: only before the first and after the last step
    save_every: int = 10
    keep_checkpoints: int = 2
    async_save: bool = False  # train while the last checkpoint is written, from a copy in the host's memory
    # of the distributed optimizer's state: dp_reshardable loads at another dp and cp; fully_reshardable at
    # any layout, and every rank holds the whole state while it is saved
    checkpoint_format: str = "dp_reshardable"
    deterministic: bool = False  # the same bits in every run; on GPUs at the price of slower algorithms
    export_hf: bool = True
    deadline_s: float = 600.0  # longest wait for another rank in one phase; grading may take half of it


@dataclass
class DebugConfig:
    save: str = ""  # a file that every step's trajectories are written to, as JSON lines
    replay: str = ""  # such a file: train on its trajectories, sample none


@dataclass
class TelemetryConfig:
    """Beside metrics.jsonl, which every run writes."""

    loggers: list[str] = field(default_factory=list)  # tensorboard, wandb (offline), mlflow
    prometheus_port: int = 0  # 127.0.0.1:PORT/metrics of rank 0; 0: none
    trace: bool = False  # phases of every rank in Chrome's format: logs/trace_rank*.json


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    run_dir: str = "runs/latest"
    resume: str = "never"  # never | auto
    seed: int = 1234


def conf_dir() -> Path:
    """The folder conf/ beside the package. Raises ConfigError where there is none."""
    folder = Path(__file__).resolve().parent.parent / "conf"
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} holds no config.yaml. The configs live in the repository, beside the package: "
            "clone it and install it with `pip install -e .`"
        )
    return folder


def compose(overrides: Iterable[str]) -> Config:
    """The config of conf/config.yaml with Hydra overrides such as "experiment=demo" or "parallel.pp=3".

    Options of the algorithm and the gate may be named directly: "algorithm.clip_high=0.28" stands for
    "algorithm.options.clip_high=0.28". Raises ConfigError for unknown keys, choices and wrong types.
    """
    checked = [_checked_override(override) for override in overrides]
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("native_dtype", native_dtype, replace=True)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="hpt"):
            composed = hydra_compose("config", overrides=checked)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, Config)
    return config


def native_dtype() -> str:
    """bf16 where the GPU, or without one this processor, multiplies it; else fp32.

    Without such instructions torch's products in bf16 take several times as long as in fp32.
    """
    import torch  # heavy, and few configs ask

    known = torch.cpu.get_capabilities()
    return (
        "bf16" if torch.cuda.is_available() or any(known[one] for one in known if "bf16" in one) else "fp32"
    )


def save(config: Any, path: Path) -> None:
    """Write a config (any dataclass) as YAML; the file is complete whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config)))))


def _escaped(node: Any) -> Any:
    """The values such that reading them gives their texts back, "${" and the backslashes before it too."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def load(path: Path) -> Config:
    """The config in a file that `save` wrote. Raises ConfigError where it is absent or does not fit."""
    return fit(Config, str(path), read_yaml(path, "the config.yaml of a run folder"))


def read_yaml(path: Path, expected: str) -> DictConfig:
    """The keys and values of a file, which is `expected`. Raises ConfigError where there are none."""
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; expected {expected}") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; expected {expected}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path} holds a list; expected {expected}")
    return given


def parse_settings(settings: Iterable[str]) -> DictConfig:
    """The keys and values of KEY=VALUE settings. Raises ConfigError where a value cannot be read.

    A value is YAML's, but that KEY= is the empty text; null is written out.
    """
    given = OmegaConf.create()
    for setting in settings:
        try:
            key, _, value = setting.partition("=")
            given.merge_with_dotlist([setting if value else f"{key}=''"])
        except (OmegaConfBaseException, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"cannot read {setting!r}: {reason}; quote a value with special characters: 'key=\"a: b\"'"
            ) from error
    return given


def fit(schema: type[T], where: str, *given: DictConfig) -> T:
    """The schema's defaults under what is given, the last on top. Raises ConfigError that names the key."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_explain(error, schema)}") from error
    assert isinstance(config, schema)
    return config


_OPTION_SECTIONS = ("algorithm", "gate")  # their options depend on their name; validation/ checks them


def _checked_override(override: str) -> str:
    """The override as Hydra wants it, once its key and, for a group, its choice are known to exist."""
    if override.startswith(("+", "~")):
        raise ConfigError(
            f"got {override!r}, expected KEY=VALUE without a + or ~ before it: keys are set, none "
            "is added or removed"
        )
    match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", override, flags=re.DOTALL)
    if not match:
        raise ConfigError(
            f"got {override!r}, expected KEY=VALUE, for instance parallel.pp=3 or experiment=demo"
        )
    key, value = match.groups()
    choices = _choices(key)
    if choices is not None:
        if key not in (groups := _groups()):
            raise ConfigError(
                f"{override}: conf/{key} is another command's; groups to choose from: {', '.join(groups)}"
            )
        if value == "null":
            raise ConfigError(
                f"{override}: a group cannot be empty; leave it out for the default, or choose from: "
                f"{', '.join(choices)}"
            )
        if value not in choices:
            raise ConfigError(
                f"{key}={value}: no such choice{did_you_mean(value, choices)}; known: {', '.join(choices)}"
            )
        return override
    section, _, rest = key.partition(".")
    if section in _OPTION_SECTIONS and rest == "name":
        raise ConfigError(
            f"got {override!r}; a name comes with its options, so choose it by {section}={value}"
        )
    if section in _OPTION_SECTIONS and rest and rest.partition(".")[0] != "options":
        return f"++{section}.options.{rest}={value}"
    expected = _type_at(key)
    if is_dataclass(expected):
        names = ", ".join(f"{key}.{f.name}" for f in fields(expected))
        raise ConfigError(f"{key}={value}: {key} is a section, expected one of its keys: {names}")
    return f"++{override}" if section in _OPTION_SECTIONS else override


def _groups() -> list[str]:
    """The groups of which a config has a choice."""
    defaults = OmegaConf.load(conf_dir() / "config.yaml").defaults
    return [str(group) for one in defaults if isinstance(one, DictConfig) for group in one]


def _choices(group: str) -> list[str] | None:
    """What can be chosen for a group of conf/; None where it is no group."""
    if "." in group or not (conf_dir() / group).is_dir():
        return None
    folder = conf_dir() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _type_at(key: str, schema: Any = Config) -> Any:
    """The declared type at a dotted key of a tree, Config's. Raises ConfigError for an unknown key."""
    node = schema
    for part in key.split("."):
        if get_origin(node) in (dict, list):
            node = get_args(node)[-1]
            continue
        if not is_dataclass(node):
            raise ConfigError(f"unknown key {key}: nothing lies below {key.rpartition('.')[0]}")
        hints = get_type_hints(node)
        if part not in hints:
            near = did_you_mean(key, [*_groups(), *leaves(Config)])
            raise ConfigError(f"unknown key {key}{near or '; hpt_mega/config.py lists them all'}")
        node = hints[part]
    return node


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(node).items():
        if is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def flattened(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config's nested mappings with their dotted keys."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changes(earlier: Any, now: Any, free: Collection[str] = ()) -> list[str]:
    """What differs between two configs of a kind, "KEY was X, is Y", but for keys and sections in `free`."""
    was, given = (dict(flattened(asdict(one))) for one in (earlier, now))
    return [
        f"{key} was {_shown(was.get(key))}, is {_shown(given.get(key))}"
        for key in sorted(was | given)
        if was.get(key) != given.get(key) and key.partition(".")[0] not in free
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _explain(error: BaseException, schema: Any = Config) -> str:
    """A sentence from what Hydra or OmegaConf raised, in the terms of the schema where it names a key."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override.lstrip("+"), str(error).splitlines()[0])
    if swept := re.match(r"(?:Ambiguous|Sweep) .*? '\+*(.*?)'(?:\n1\. To| requires)", str(error), re.DOTALL):
        return (
            f"{swept[1]}: several values, expected one; quote a text with commas: '{_quoted(swept[1])}', put "
            "a list in brackets, or sweep with slurm/ablation.sh"
        )
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())  # with the file and the line
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    what = str(cause or error).splitlines()[0].rstrip(".")
    key = getattr(cause, "full_key", None)
    if not key:
        return what
    holder: Any = getattr(cause, "object_type", None)
    if isinstance(cause, ConfigKeyError) and is_dataclass(holder) and holder is not schema:
        return _unknown_key(key, what, holder, schema)
    path = key.replace("[", ".").replace("]", "")
    if path.partition(".")[0] not in get_type_hints(schema):
        schema = holder or schema  # of a list's element only its own key is told
    try:
        declared = _type_at(path, schema)
    except ConfigError:
        return f"{key}: {what}{did_you_mean(key, leaves(schema)) if is_dataclass(schema) else ''}"
    if nested := re.match("Cannot convert '(?:dict|list|DictConfig|ListConfig)' to string: '(.*)'", what):
        return f"{key}: got {nested[1]}, expected a text; quote it twice: '{key}=\"a: b\"'"
    return f"{key}: {what}; expected {_describe(declared)}"


def _unreadable(given: str, reason: str) -> str:
    if reason.startswith("LexerNoViableAlt"):  # which says no more than its name
        reason = "a character that only a quoted value may hold"
    return f"cannot read {given!r}: {reason}; quote a value with special characters: '{_quoted(given)}'"


def _quoted(override: str) -> str:
    """The override with its value in quotes; an example where the value would need more than these."""
    key, _, value = override.partition("=")
    return 'key="a=b"' if value[:1] in ("[", "{") or '"' in value else f'{key}="{value}"'


def _unknown_key(key: str, what: str, holder: Any, schema: Any) -> str:
    """What to say of a key that a section, whose keys `holder` declares, does not have."""
    parent, _, name = key.rpartition(".")
    where = parent or next((path for path, hint in _lists(schema) if get_args(hint)[0] is holder), "")
    known = [one.name for one in fields(holder)]
    near = did_you_mean(name, known)
    return f"{where + '.' if where else ''}{name}: {what}{near}; known: {', '.join(known)}"


def _lists(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that hold lists, and their types."""
    for name, hint in get_type_hints(node).items():
        if is_dataclass(hint):
            yield from _lists(hint, f"{prefix}{name}.")
        elif get_origin(hint) is list:
            yield prefix + name, hint


def _describe(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_describe(one) for one in get_args(hint))
    if get_origin(hint) is list:
        return "a list: [..., ...]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    words |= {type(None): "null"}
    return words.get(hint) or ("a section with keys" if is_dataclass(hint) else str(hint))
