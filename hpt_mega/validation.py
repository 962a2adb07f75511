"""The checks of a config made before any process starts: does the model fit the layout, do the parts fit.

What a key may hold by its type alone is settled by config.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from hpt_mega.config import Config, ConfigError, Fp8Config
from hpt_mega.data.demonstrations import WRITERS
from hpt_mega.data.files import HUB, is_data
from hpt_mega.data.readers import READERS
from hpt_mega.data.store import is_prepared
from hpt_mega.data.templates import TEMPLATES
from hpt_mega.megatron.fp8 import AMAX_ALGORITHMS, FORMATS, RECIPES, align_of
from hpt_mega.objective import Row, algorithm
from hpt_mega.replay import read_batches
from hpt_mega.rewards.function import load_function
from hpt_mega.rewards.pool import KINDS, is_kind
from hpt_mega.scheduler import gate
from hpt_mega.telemetry.loggers import problems as logger_problems

ENGINES = ("megatron", "vllm", "sglang")
PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("constant", "cosine", "linear")
RESUME = ("never", "auto")
RECOMPUTE = ("none", "selective", "full")

Problems = Iterator[str]


def validate(cfg: Config) -> None:
    """Raise one ConfigError that lists every problem of the config; return where there is none.

    Reads the model's config.json, the run folder and the environment (torchrun, SLURM, number of GPUs).
    """
    shape, problems = _read_model(Path(cfg.model.path))
    found = [*problems, *_files(cfg), *contradictions(cfg, shape), *_processes(cfg), *_run_folder(cfg)]
    if found:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(found, start=1))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"{count} in the config; nothing was started\n{listed}")


def missing_here(cfg: Config) -> list[str]:
    """What the config names and this machine does not have: the model's folder, data files, an engine."""
    return [*_read_model(Path(cfg.model.path))[1], *_files(cfg)]


def contradictions(cfg: Config, shape: Mapping[str, Any]) -> list[str]:
    """What is wrong with the config on any machine. `shape` is the model's config.json, or empty."""
    checks = chain(
        _numbers(cfg),
        _names(cfg),
        _layout(cfg, shape),
        _fp8(cfg, shape),
        _pipeline(cfg, shape),
        _experts(cfg, shape),
        _batch(cfg),
        _lengths(cfg, shape),
        _objective(cfg),
        _servers(cfg, shape),
    )
    return list(checks)


def _read_model(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The model's config.json (empty where unreadable) and what is wrong with the folder."""
    how = (
        "set model.path to a Hugging Face folder; the demo's is made by "
        f"`python tools/prepare_demo_model.py --out {folder}`"
    )
    if not folder.is_dir():
        return {}, [f"model.path={folder}: no such folder (looked for {folder.absolute()}); {how}"]
    problems = []
    if not any(folder.glob("*.safetensors")):
        problems.append(f"model.path={folder} holds no *.safetensors; {how}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append(f"model.path={folder} holds no tokenizer.json; {how}")
    try:
        shape = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}, [*problems, f"model.path={folder} holds no config.json; {how}"]
    except ValueError as error:
        return {}, [*problems, f"{folder}/config.json is no JSON: {error}; {how}"]
    return shape, problems


def _numbers(cfg: Config) -> Problems:
    above_zero = (
        "parallel.tp parallel.cp parallel.pp parallel.dp parallel.vpp parallel.ep parallel.etp "
        "data.train_questions data.heldout_questions "
        "data.max_prompt_tokens data.max_demonstration_tokens reward.workers reward.deadline_s "
        "reward.memory_mib evaluation.samples evaluation.top_p "
        "rollout.max_new_tokens rollout.max_sequences rollout.top_p rollout.server.tp "
        "rollout.server.kv_cache_gib rollout.server.gpu_memory_share rollout.server.bucket_mib "
        "rollout.server.start_deadline_s rollout.server.request_deadline_s rollout.server.engines "
        "rollout.server.update_deadline_s rollout.server.answer_deadline_s "
        "optimizer.lr critic.lr critic.clip trainer.steps trainer.updates_per_step "
        "trainer.questions_per_step trainer.tokens_per_microbatch trainer.keep_checkpoints "
        "trainer.deadline_s"
    )
    at_least_zero = (
        "rollout.rollouts_per_question rollout.temperature rollout.server.probe_bound rollout.staleness "
        "evaluation.temperature "
        "optimizer.warmup_steps optimizer.weight_decay "
        "optimizer.clip_grad optimizer.beta1 optimizer.beta2 optimizer.min_lr_ratio trainer.eval_every "
        "trainer.save_every"
    )
    for key in above_zero.split():
        if not (value := attrgetter(key)(cfg)) > 0:
            yield f"{key} is {value}, expected above 0"
    for key in at_least_zero.split():
        if not (value := attrgetter(key)(cfg)) >= 0:
            yield f"{key} is {value}, expected 0 or above"
    for key in ("rollout.top_p", "evaluation.top_p", "optimizer.min_lr_ratio"):
        if (value := attrgetter(key)(cfg)) > 1:
            yield f"{key} is {value}, expected at most 1"
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if (value := attrgetter(key)(cfg)) >= 1:
            yield f"{key} is {value}, expected below 1"


def _names(cfg: Config) -> Problems:
    for key, value, known in (
        ("precision.dtype", cfg.precision.dtype, PRECISIONS),
        ("rollout.engine", cfg.rollout.engine, ENGINES),
        ("data.template", cfg.data.template, TEMPLATES),
        ("data.reader", cfg.data.reader, READERS),
        ("optimizer.schedule", cfg.optimizer.schedule, SCHEDULES),
        ("resume", cfg.resume, RESUME),
        ("parallel.recompute", cfg.parallel.recompute, RECOMPUTE),
    ):
        if value not in known:
            yield f"{key} is {value!r}, expected {' or '.join(known)}"
    yield from _reward(cfg.reward.kind)
    yield from _data(cfg)
    yield from logger_problems(cfg.telemetry.loggers)


def _reward(kind: str) -> Problems:
    if kind in KINDS:
        return
    if not is_kind(kind):
        yield f"reward.kind is {kind!r}, expected {' or '.join(KINDS)}, or the dotted path of a function"
        return
    try:
        load_function(kind)
    except ValueError as error:
        yield f"reward.kind={error}"


def _data(cfg: Config) -> Problems:
    if cfg.data.mixture and cfg.data.train_file:
        yield "data.train_file and data.mixture are both given; put the file into the mixture"
    if not 0 < cfg.data.keep_solved <= 1:
        yield f"data.keep_solved is {cfg.data.keep_solved}, expected above 0 and at most 1"
    has_training = cfg.data.train_file or cfg.data.mixture
    if not cfg.data.tasks and not (has_training and cfg.data.heldout_file):
        yield "data.tasks is empty; name a task, or choose a group such as data=demo"
    for index, task in enumerate(cfg.data.tasks):
        if task.name not in WRITERS:
            yield f"data.tasks.{index}.name is {task.name!r}, expected one of {', '.join(WRITERS)}"
    weights = {f"data.tasks.{i}.weight": task.weight for i, task in enumerate(cfg.data.tasks)}
    weights |= {f"data.mixture.{i}.weight": part.weight for i, part in enumerate(cfg.data.mixture)}
    for key, weight in weights.items():
        if not weight > 0:
            yield f"{key} is {weight}, expected above 0"


def _file(key: str, file: str) -> Problems:
    if not is_data(file):
        yield (
            f"{key}={file}: expected a file .jsonl, .json or .parquet, {HUB}OWNER/NAME, or a folder of "
            "tools/prepare_data.py"
        )
    elif not file.startswith(HUB) and not Path(file).is_file():
        yield f"{key}={file}: no such file (looked for {Path(file).absolute()})"


def _files(cfg: Config) -> Problems:
    files = {"data.train_file": cfg.data.train_file, "data.heldout_file": cfg.data.heldout_file}
    files |= {f"data.mixture.{i}.file": part.file for i, part in enumerate(cfg.data.mixture)}
    for key, file in files.items():
        if file and not is_prepared(file):
            yield from _file(key, file)
    yield from _debug(cfg)
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


def _layout(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    parallel = cfg.parallel
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs tensor parallelism and parallel.tp is 1; set tp above 1"
    heads = shape.get("num_attention_heads")
    for what, count in (
        ("attention heads", heads),
        ("key/value heads", shape.get("num_key_value_heads", heads)),
        ("feed-forward rows", shape.get("intermediate_size")),
    ):
        if count and parallel.tp > 0 and count % parallel.tp:
            fitting = _divisors(count, heads)
            yield f"parallel.tp is {parallel.tp} and the model has {count} {what}; expected one of {fitting}"
    if parallel.cp > 1 and "kv_lora_rank" in shape and not torch.cuda.is_available():
        yield f"parallel.cp is {parallel.cp}; latent attention has no context parallelism on the CPU, set 1"


def _pipeline(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    parallel, layers = cfg.parallel, shape.get("num_hidden_layers")
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp is {parallel.vpp} and parallel.pp is 1; an interleaved pipeline needs pp above 1"
    if min(parallel.pp, parallel.vpp) < 1 or not layers:
        return
    chunks = parallel.pp * parallel.vpp
    if parallel.stage_layers:
        given = parallel.stage_layers
        if len(given) != chunks or sum(given) != layers or min(given) < 1:
            yield (
                f"parallel.stage_layers is {given}; expected parallel.pp x vpp = {chunks} numbers above 0 "
                f"that add up to the model's {layers} layers"
            )
    elif chunks > layers:
        yield (
            f"parallel.pp x vpp is {parallel.pp} x {parallel.vpp} = {chunks} and the model has {layers} "
            "layers; each chunk needs one"
        )


def _experts(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    parallel = cfg.parallel
    count = next((shape[key] for key in _EXPERT_COUNTS if shape.get(key)), None)
    if count is None:
        for key in ("ep", "etp"):
            if getattr(parallel, key) > 1:
                yield f"parallel.{key} is {getattr(parallel, key)} and the model has no experts; set 1"
        return
    if min(parallel.tp, parallel.cp, parallel.dp, parallel.ep, parallel.etp) < 1:
        return
    if count % parallel.ep:
        fitting = _divisors(count, count)
        yield f"parallel.ep is {parallel.ep} and the model has {count} experts; expected one of {fitting}"
    ranks, wanted = parallel.tp * parallel.cp * parallel.dp, parallel.ep * parallel.etp
    if ranks % wanted:
        yield (
            f"parallel.ep x etp is {parallel.ep} x {parallel.etp} = {wanted} and its ranks are those of tp x "
            f"cp x dp = {ranks}; expected a divisor of that"
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield (
            f"the model has experts and parallel.tp is {parallel.tp}; megatron-core trains them with tensor "
            "parallelism only together with parallel.sequence_parallel=true"
        )
    if parallel.etp > 1 and not torch.cuda.is_available():
        yield f"parallel.etp is {parallel.etp}; over gloo the experts' exchange works with etp=1 only"
    if cfg.rollout.engine == "megatron" and parallel.ep > 1 and parallel.vpp > 1:
        yield (
            f"rollout.engine=megatron cannot decode with parallel.ep={parallel.ep} and vpp={parallel.vpp}: "
            "the replicas that share experts would meet in different layers; set one of the two to 1"
        )


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of Qwen, Mixtral, DeepSeek


_TE_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def _fp8(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    fp8, key = cfg.precision.fp8, "precision.fp8"
    if not fp8.recipe:
        if fp8 != Fp8Config():
            yield f"{key} has settings and no recipe; choose a precision such as fp8_blockwise"
        return
    for name, value, known in (
        ("recipe", fp8.recipe, RECIPES),
        ("format", fp8.format, FORMATS),
        ("amax_algorithm", fp8.amax_algorithm, AMAX_ALGORITHMS),
    ):
        if value not in known:
            yield f"{key}.{name} is {value!r}, expected {' or '.join(known)}"
    if fp8.amax_history < 1 or fp8.margin < 0:
        yield f"{key}.amax_history is {fp8.amax_history} and margin {fp8.margin}; expected >= 1 and >= 0"
    kept = (fp8.first_layers, fp8.last_layers)
    per_stage = shape.get("num_hidden_layers", 0) // max(1, cfg.parallel.pp)
    if shape and not 0 <= min(kept) <= max(kept) <= per_stage:
        yield (
            f"{key}.first_layers and last_layers are {kept[0]} and {kept[1]}; megatron-core takes 0 to "
            f"{per_stage}, the layers of a pipeline stage"
        )
    yield from _fp8_recipe(cfg)
    yield from _fp8_widths(cfg, shape)


def _fp8_recipe(cfg: Config) -> Problems:
    """What a recipe does not go together with."""
    fp8, key = cfg.precision.fp8, "precision.fp8"
    if fp8.recipe == "delayed" and (fp8.first_layers or fp8.last_layers):
        yield f"{key}: delayed scaling spans all layers of a stage; set first_layers and last_layers to 0"
    if fp8.param_gather and not cfg.parallel.distributed_optimizer:
        yield f"{key}.param_gather is the distributed optimizer's; set parallel.distributed_optimizer=true"
    if fp8.param_gather and fp8.recipe == "mxfp8":
        yield f"{key}.param_gather with mxfp8 needs a shared gradient buffer, not wired here; set it to false"
    trusted = os.environ.get(_TE_TRUST) == "1"
    if fp8.recipe == "delayed" and cfg.resume == "auto" and torch.cuda.is_available() and not trusted:
        yield (
            f"{key}.recipe is 'delayed' and resume=auto: Transformer Engine keeps the amax history as a "
            f"pickle and refuses to load it; set {_TE_TRUST}=1 if run_dir is your own, or change the recipe"
        )


def _fp8_widths(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    """Transformer Engine refuses other widths; the emulation does so too, so that its runs move to GPUs."""
    recipe, tp = cfg.precision.fp8.recipe, max(1, cfg.parallel.tp)
    align = align_of(recipe)
    heads = shape.get("num_attention_heads", 0)
    head = shape.get("head_dim") or shape.get("hidden_size", 0) // max(1, heads)
    widths = {
        "hidden_size": shape.get("hidden_size", 0),
        "intermediate_size / tp": shape.get("intermediate_size", 0) / tp,
        "moe_intermediate_size": shape.get("moe_intermediate_size", 0),
        "q_lora_rank": shape.get("q_lora_rank") or 0,
        "kv_lora_rank": shape.get("kv_lora_rank", 0),
        "attention heads x channels / tp": 0 if "kv_lora_rank" in shape else heads * head / tp,
    }
    for name, width in widths.items():
        if width % align:
            yield (
                f"precision.fp8.recipe {recipe!r} takes widths that are multiples of {align} and the model's "
                f"{name} is {width:g}; change parallel.tp or the precision"
            )


def _divisors(number: int, limit: int | None) -> str:
    return ", ".join(str(d) for d in range(1, min(number, limit or number) + 1) if number % d == 0)


def _processes(cfg: Config) -> Problems:
    parallel = cfg.parallel
    wanted = parallel.product
    started = os.environ.get("WORLD_SIZE")
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    gpus = torch.cuda.device_count()
    if started is not None:
        if started != str(parallel.world_size):
            yield f"WORLD_SIZE is {started} and {wanted}; start as many processes, or change the layout"
    elif nodes != "1":
        yield f"this SLURM job has {nodes} nodes, `hpt train` starts processes on one; use srun torchrun"
    elif 0 < gpus < parallel.world_size:
        yield f"{wanted} processes are wanted and this machine has {gpus} GPUs; lower one of them"


def _batch(cfg: Config) -> Problems:
    questions, dp = cfg.trainer.questions_per_step, cfg.parallel.dp
    if dp > 0 and questions % dp:
        fitting = f"{max(1, questions // dp) * dp} or {(questions // dp + 1) * dp}"
        yield f"trainer.questions_per_step is {questions} and parallel.dp is {dp}; expected {fitting}"
    updates = cfg.trainer.updates_per_step
    if dp > 0 and questions // dp < updates:
        yield (
            f"trainer.updates_per_step is {updates} and a replica has {questions // dp} questions a step; an "
            "update needs at least one: lower updates_per_step or raise trainer.questions_per_step"
        )
    available = sum(part.questions for part in cfg.data.mixture) or cfg.data.train_questions
    if questions > available:
        yield (
            f"trainer.questions_per_step is {questions} and data.train_questions {available}; "
            "a step cannot ask more than there are"
        )


def _lengths(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    positions = cfg.model.max_positions or shape.get("max_position_embeddings")
    response = max(cfg.rollout.max_new_tokens, cfg.data.max_demonstration_tokens)
    longest = cfg.data.max_prompt_tokens + response
    if positions and longest > positions:
        yield (
            f"data.max_prompt_tokens {cfg.data.max_prompt_tokens} + the longest response {response} = "
            f"{longest} tokens and the model has {positions} positions; lower rollout.max_new_tokens, "
            "data.max_demonstration_tokens or data.max_prompt_tokens"
        )


def _objective(cfg: Config) -> Problems:
    """The algorithm, the gate, and whether the algorithm can train on what the gate sends."""
    n = cfg.rollout.rollouts_per_question
    try:
        estimator = algorithm(cfg.algorithm.name, **cfg.algorithm.options)
    except ValueError as error:
        yield f"algorithm: {error}"
        return
    try:
        weigh = gate(cfg.gate.name, **cfg.gate.options)
    except ValueError as error:
        yield f"gate: {error}"
        return
    row = estimator.row
    alpha, beta = weigh(torch.linspace(0, 1, max(n, 1) + 1, dtype=torch.float64))
    yield from _gate_fits(row, bool((alpha > 0).any()), bool((beta > 0).any()), cfg.gate.name)
    if estimator.penalises_reward and estimator.trains_on_pairs:
        yield (
            f"algorithm={row.name} compares two responses and sees no rewards: kl_in=reward has no meaning "
            "there; its beta already holds the policy near the reference model"
        )
    if n == 0 and bool(weigh(torch.zeros(1))[0]):
        yield (
            f"rollout.rollouts_per_question is 0 and gate {cfg.gate.name!r} keeps the rollouts of unsolved "
            "questions; set gate=demonstrations, or sample at least 1"
        )
    if (
        n == 1
        and bool((alpha > 0).any())
        and row.parts.advantage in ("group_mean", "group_norm", "leave_one_out", "preference")
    ):
        yield (
            f"algorithm={row.name} compares the rollouts of a question and "
            "is 1: there is nothing to compare; set at least 2"
        )


def _servers(cfg: Config, shape: Mapping[str, Any]) -> Problems:
    """What the servers of rollouts need, where there are any."""
    rollout = cfg.rollout
    if rollout.engine == "megatron":
        if rollout.staleness:
            yield (
                f"rollout.staleness is {rollout.staleness} and rollout.engine megatron, whose processes are "
                "busy with training; set rollout=vllm, or staleness 0"
            )
        return
    if cfg.parallel.ep > 1:
        yield (
            f"parallel.ep is {cfg.parallel.ep} and rollout.engine {rollout.engine}: a server is brought the "
            "weights of one replica, which lacks the others' experts; set ep=1 or rollout=megatron"
        )
    if rollout.temperature not in (0.0, 1.0) and rollout.top_p < 1:
        yield (
            f"rollout.temperature is {rollout.temperature} and top_p {rollout.top_p}: servers report "
            "log-probabilities after the truncation, which the objective cannot use; set one of them to 1"
        )
    heads = shape.get("num_attention_heads")
    if heads and heads % rollout.server.tp:
        fitting = _divisors(heads, heads)
        yield f"rollout.server.tp is {rollout.server.tp} and the model has {heads} heads; expected {fitting}"
    parallel, wanted = cfg.parallel, rollout.server.engines * rollout.server.tp
    gpus = parallel.tp * parallel.cp * parallel.pp
    if torch.cuda.is_available() and wanted > gpus:
        yield (
            f"rollout.server.engines x tp is {rollout.server.engines} x {rollout.server.tp} = {wanted} and a "
            f"replica has {gpus} GPUs, those of its ranks; lower one of them"
        )


def _gate_fits(row: Row, rollouts: bool, demonstrations: bool, gate_name: str) -> Problems:
    if demonstrations and row.offline is None and not row.any_source:
        yield (
            f"algorithm={row.name} trains on rollouts only and gate {gate_name!r} sends questions to their "
            "demonstrations; set gate=rollouts"
        )
    if rollouts and row.any_source and row.parts.advantage == "one":
        yield (
            f"algorithm={row.name} would imitate its own rollouts, right or wrong, where gate {gate_name!r} "
            "keeps them; set gate=demonstrations"
        )


def _debug(cfg: Config) -> Problems:
    if not cfg.debug.replay:
        return
    if cfg.debug.save:
        yield "debug.save and debug.replay are both set; what is replayed is in a file already: drop save"
    file = Path(cfg.debug.replay)
    if not file.is_file():
        yield f"debug.replay={file}: no such file (looked for {file.absolute()}); debug.save=FILE writes one"
        return
    try:
        steps = read_batches(file).keys()
    except ValueError as error:
        yield f"debug.replay: {error}"
        return
    if missing := [step for step in range(1, cfg.trainer.steps + 1) if step not in steps]:
        yield (
            f"debug.replay={file} holds {len(steps)} steps and no step {missing[0]}; "
            f"trainer.steps is {cfg.trainer.steps}"
        )


def _run_folder(cfg: Config) -> Problems:
    folder = Path(cfg.run_dir)
    if folder.exists() and not folder.is_dir():
        yield f"run_dir={folder} is a file; choose another folder"
    if cfg.resume == "never" and is_unfinished(folder):
        yield f"run_dir={folder} holds an unfinished run; set resume=auto to go on, or another run_dir"


def is_unfinished(run_dir: Path) -> bool:
    """Whether a run has begun there and not ended."""
    return (run_dir / "metrics.jsonl").is_file() and not (run_dir / "summary.json").is_file()
