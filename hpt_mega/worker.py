"""One training process: joins the job, builds the trainer's parts, runs it, and says where it failed.

Started once per rank by launch.py (or srun) as `python -m hpt_mega.worker RUN_DIR/config.yaml`.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*")

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from hpt_mega.checkpoint.hf import HFCheckpoint, read_config, with_context  # noqa: E402
from hpt_mega.checkpoint.megatron_folder import companions_for, is_megatron  # noqa: E402
from hpt_mega.checkpoint.store import CheckpointStore  # noqa: E402
from hpt_mega.checkpoint.weights import export_hf, load_hf, load_megatron  # noqa: E402
from hpt_mega.config import Config, load  # noqa: E402
from hpt_mega.data.loader import QuestionLoader  # noqa: E402
from hpt_mega.data.questions import check_complete, load_questions  # noqa: E402
from hpt_mega.files import write_atomically  # noqa: E402
from hpt_mega.interruption import STOPPED_CODE, Interruption  # noqa: E402
from hpt_mega.megatron import runtime  # noqa: E402
from hpt_mega.megatron.critic import Critic, ValueModel, build_critic  # noqa: E402
from hpt_mega.megatron.learner import Learner  # noqa: E402
from hpt_mega.megatron.model import DTYPES, PolicyModel, build_model  # noqa: E402
from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel  # noqa: E402
from hpt_mega.megatron.runtime import Layout  # noqa: E402
from hpt_mega.objective import algorithm  # noqa: E402
from hpt_mega.resharding.mapping import Family, ModelShape, family_for  # noqa: E402
from hpt_mega.rewards.pool import COMPARING, RewardPool  # noqa: E402
from hpt_mega.rollout.engine import RolloutEngine  # noqa: E402
from hpt_mega.rollout.megatron import MegatronEngine  # noqa: E402
from hpt_mega.rollout.served import Probe, ServedEngine  # noqa: E402
from hpt_mega.rollout.servers import build_fleet  # noqa: E402
from hpt_mega.rollout.sync import WeightSync  # noqa: E402
from hpt_mega.scheduler.gate import gate as make_gate  # noqa: E402
from hpt_mega.telemetry.health import Health, stop_watching  # noqa: E402
from hpt_mega.telemetry.metrics import PhaseTimer  # noqa: E402
from hpt_mega.telemetry.run import RunLog  # noqa: E402
from hpt_mega.telemetry.trace import Trace  # noqa: E402
from hpt_mega.trainer import Trainer  # noqa: E402
from hpt_mega.trajectory import Question, Source, Trajectory  # noqa: E402

PROBE_TEXTS = 2  # texts that trainer and servers both score after every update
GRADING_SHARE = 0.5  # of trainer.deadline_s; the rest is for replicas that were done with sampling earlier
PROBE_BOUND = {"bf16": 0.15, "fp16": 0.05, "fp32": 1e-3}  # mean gap of their log-probabilities


def main(config_path: str) -> int:
    cfg = load(Path(config_path))
    timer, interruption = PhaseTimer(), Interruption()
    layout = runtime.initialize(cfg)
    try:
        finished = train(cfg, layout, timer, interruption)
    except BaseException as error:
        report_failure(Path(cfg.run_dir), layout, timer, error)
        raise
    runtime.shutdown()
    return 0 if finished else STOPPED_CODE


def train(cfg: Config, layout: Layout, timer: PhaseTimer, interruption: Interruption) -> bool:
    """A whole run: build, resume where asked, train, export, summarise. False where it was stopped."""
    run_dir = Path(cfg.run_dir)
    if cfg.telemetry.trace:
        timer.trace = Trace(run_dir / "logs" / f"trace_rank{layout.rank}.json", layout.rank)
    store = CheckpointStore(run_dir, cfg.trainer.keep_checkpoints, cfg.trainer.deadline_s)
    resume_step = store.latest_whole() if cfg.resume == "auto" else None
    store.set_aside(after=-1 if resume_step is None else resume_step)
    with RunLog(cfg, layout, resume_step) as log:
        trainer = build_trainer(cfg, layout, store, log, timer, interruption)
        try:
            if resume_step is not None:
                trainer.resume(resume_step)
            if not trainer.run():
                print(f"stopped at step {trainer.step}, as asked; resume=auto goes on", flush=True)
                return False
            if cfg.trainer.export_hf:
                with timer.phase("export"):
                    export(cfg, layout, trainer)
            log.finish(timer.take())
            return True
        finally:
            stop_watching()
            trainer.engine.close()
            if trainer.rewards:
                trainer.rewards.close()


def build_trainer(
    cfg: Config,
    layout: Layout,
    store: CheckpointStore,
    log: RunLog,
    timer: PhaseTimer,
    interruption: Interruption,
) -> Trainer:
    """Every part of the training step, from the config."""
    weights, companions = Path(cfg.model.path), companions_for(Path(cfg.model.path), cfg.model.hf)
    config = read_config(companions)
    family = family_for(config)
    shape = family.read_shape(with_context(config, **_context(cfg)))
    dtype = DTYPES[cfg.precision.dtype]
    model = build_model(shape, cfg.parallel, layout, dtype, fp8=cfg.precision.fp8)
    if is_megatron(weights):
        load_megatron(model, weights, family, shape, layout)
    else:
        load_hf(model, HFCheckpoint(weights), family, shape, layout)
    tokenizer = AutoTokenizer.from_pretrained(companions)
    questions = load_questions(cfg.data, tokenizer)
    gate, rollouts = make_gate(cfg.gate.name, **cfg.gate.options), cfg.rollout.rollouts_per_question
    check_complete(
        questions,
        graded=cfg.reward.kind in COMPARING,
        sampled=rollouts > 0,
        demonstrated=bool((gate.at_every_rate(rollouts)[1] > 0).any()),
    )
    rewards = build_rewards(cfg) if layout.is_leader else None
    learner = build_learner(cfg, layout, model, shape)
    return Trainer(
        cfg=cfg,
        layout=layout,
        learner=learner,
        engine=build_engine(cfg, layout, learner, family, shape, questions.train),
        gate=gate,
        loader=QuestionLoader(
            questions.train,
            cfg.trainer.questions_per_step,
            layout.dp_rank,
            layout.dp_size,
            cfg.seed,
            sizes=questions.sizes,
            weights=questions.weights,
            keep_solved=cfg.data.keep_solved,
            reader=cfg.data.reader,
        ),
        heldout=questions.heldout,
        rewards=rewards,
        tokenizer=tokenizer,
        store=store,
        log=log,
        timer=timer,
        interruption=interruption,
        health=Health(Path(cfg.run_dir)),
    )


def build_rewards(cfg: Config) -> RewardPool:
    """The graders of a replica, which are done before its other ranks would give up waiting."""
    reward, budget_s = cfg.reward, GRADING_SHARE * cfg.trainer.deadline_s
    return RewardPool(reward.kind, reward.workers, reward.deadline_s, reward.memory_mib, budget_s)


def build_engine(
    cfg: Config,
    layout: Layout,
    learner: Learner,
    family: Family,
    shape: ModelShape,
    questions: Sequence[Question],
) -> RolloutEngine:
    """The engine that rollout.engine names. Servers are started, and serve the policy, when this returns."""
    rollout = cfg.rollout
    model = learner.policy.module
    if rollout.engine == "megatron":
        return MegatronEngine(model, layout, vocab_size=shape.vocab_size, max_sequences=rollout.max_sequences)
    texts = list(islice(_probe_texts(questions, rollout.max_new_tokens), PROBE_TEXTS))
    sync = WeightSync(model, family, shape, layout, rollout.server.bucket_mib << 20)
    engine = ServedEngine(
        build_fleet(cfg, layout, sync) if layout.is_leader else None,
        sync,
        layout,
        Probe(
            texts,
            lambda: learner.logprobs(texts),
            rollout.server.probe_bound or PROBE_BOUND[cfg.precision.dtype],
        ),
        sleeps=rollout.server.sleep,
    )
    engine.update_weights(policy_version=0)
    return engine


def _probe_texts(questions: Sequence[Question], longest: int) -> Iterator[Trajectory]:
    """Questions with their demonstrations; where there is none, a prompt's first half with its second.

    A response is cut to less than `longest` tokens, but not below one: a server takes no text of the length
    of the longest prompt with the longest response, for it could sample nothing more.
    """
    for index, question in enumerate(questions):
        prompt, response = question.prompt_tokens, question.demonstration_tokens
        if not response:
            half = len(prompt) // 2
            prompt, response = prompt[:half], prompt[half:]
        if prompt:
            yield Trajectory(prompt, response[: max(1, longest - 1)], index, Source.OFFLINE, 0)


def build_learner(cfg: Config, layout: Layout, model: PolicyModel, shape: ModelShape) -> Learner:
    """The optimizer around the policy and, where the algorithm asks for them, reference model and critic."""
    # Dr.GRPO's constant length is the longest response there can be
    options = {"length": cfg.rollout.max_new_tokens, **cfg.algorithm.options}
    estimator = algorithm(cfg.algorithm.name, **options)
    dtype = DTYPES[cfg.precision.dtype]
    reference: PolicyModel | None = None
    critic: Critic | None = None
    if estimator.needs_reference_model:
        reference = build_model(shape, cfg.parallel, layout, dtype, fp8=cfg.precision.fp8)
        for frozen, trained in zip(reference.chunks, model.chunks, strict=True):
            frozen.load_state_dict(trained.state_dict())
    if estimator.needs_values:
        # the output layer of a tied model is its embedding, which the critic's head is not
        untied = replace(shape, tied=False)
        value_model = build_model(untied, cfg.parallel, layout, dtype, kind=ValueModel, fp8=cfg.precision.fp8)
        critic = build_critic(value_model, model, cfg, layout)
    wrapped = wrap_data_parallel(model, cfg)
    return Learner(
        cfg=cfg,
        layout=layout,
        policy=wrapped,
        optimizer=build_optimizer(wrapped, cfg),
        estimator=estimator,
        vocab_size=shape.vocab_size,
        reference=reference,
        critic=critic,
    )


def export(cfg: Config, layout: Layout, trainer: Trainer) -> None:
    """The trained policy as a Hugging Face folder, RUN_DIR/hf."""
    source = companions_for(Path(cfg.model.path), cfg.model.hf)
    config = read_config(source)
    family = family_for(config)
    export_hf(
        trainer.learner.policy.module,
        family,
        family.read_shape(config),
        Path(cfg.run_dir) / "hf",
        source,
        layout,
        **_context(cfg),
    )


def _context(cfg: Config) -> dict[str, Any]:
    return {"rope_theta": cfg.model.rope_theta, "max_positions": cfg.model.max_positions}


def report_failure(run_dir: Path, layout: Layout, timer: PhaseTimer, error: BaseException) -> None:
    """Leave a file that launch.py merges into one report: which rank failed, when, in which phase."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    report = {
        "rank": layout.rank,
        "phase": timer.current or "start-up",
        "time": timer.now(),
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exc(),
    }
    # torchrun may kill this process while it writes
    write_atomically(logs / f"failure_rank{layout.rank}.json", json.dumps(report))


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    sys.exit(main(sys.argv[1]))
