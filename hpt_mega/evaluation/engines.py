"""Which rollout engine answers an evaluation: one line of ENGINES each, open for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from hpt_mega.config import Config, ModelConfig, ParallelConfig, PrecisionConfig, TrainerConfig
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.sample import Respondent
from hpt_mega.megatron.runtime import Layout


def job_config(cfg: EvalConfig) -> Config:
    """The evaluation's settings as those of a job: what the runtime and the model read of a config."""
    return Config(
        model=ModelConfig(path=cfg.model),
        parallel=ParallelConfig(**asdict(cfg.parallel)),
        precision=PrecisionConfig(dtype=cfg.precision.dtype),
        trainer=TrainerConfig(deadline_s=cfg.deadline_s),
        seed=cfg.seed,
    )


@contextmanager
def _megatron(cfg: EvalConfig, layout: Layout) -> Iterator[Respondent]:
    from hpt_mega.checkpoint.hf import HFCheckpoint
    from hpt_mega.checkpoint.weights import load_hf
    from hpt_mega.megatron.model import DTYPES, build_model
    from hpt_mega.resharding.mapping import family_for
    from hpt_mega.rollout.megatron import MegatronEngine

    checkpoint = HFCheckpoint(Path(cfg.model))
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    model = build_model(shape, job_config(cfg).parallel, layout, DTYPES[cfg.precision.dtype])
    load_hf(model, checkpoint, family, shape, layout)
    yield MegatronEngine(model, layout, vocab_size=shape.vocab_size, max_sequences=cfg.max_sequences)


@contextmanager
def _vllm(cfg: EvalConfig, layout: Layout) -> Iterator[Respondent]:
    """A server of the folder's own weights; command.py has refused what it cannot be started with."""
    from hpt_mega.checkpoint.hf import read_config
    from hpt_mega.megatron.model import DTYPES
    from hpt_mega.rollout.vllm import ServerSettings, VLLMServer

    settings = ServerSettings(
        model=Path(cfg.model),
        dtype=str(DTYPES[cfg.precision.dtype]).removeprefix("torch."),
        max_model_len=read_config(Path(cfg.model))["max_position_embeddings"],
        max_sequences=cfg.max_sequences,
        tp=1,
        seed=cfg.seed,
        kv_cache_gib=cfg.server.kv_cache_gib,
        gpu_memory_share=cfg.server.gpu_memory_share,
        logp_at_temperature=False,
    )
    log = Path(cfg.run_dir) / "logs" / f"engine{layout.dp_rank}.log"
    server = VLLMServer(str(layout.dp_rank), settings, log, cfg.deadline_s)
    try:
        server.start(cfg.server.start_deadline_s)
        yield server.client
    finally:
        server.close()


ENGINES: dict[str, Callable[[EvalConfig, Layout], AbstractContextManager[Respondent]]] = {
    "megatron": _megatron,
    "vllm": _vllm,
}
