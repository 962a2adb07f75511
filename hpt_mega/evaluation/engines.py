"""Which rollout engine answers an evaluation: one line of ENGINES each, open for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hpt_mega.config import Config, ModelConfig, TrainerConfig
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.sample import Respondent
from hpt_mega.megatron.runtime import Layout


def job_config(cfg: EvalConfig) -> Config:
    """The evaluation's settings as those of a job: what the runtime and the model read of a config."""
    return Config(
        model=ModelConfig(path=cfg.model),
        parallel=cfg.parallel,
        precision=cfg.precision,
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
    model = build_model(shape, cfg.parallel, layout, DTYPES[cfg.precision.dtype])
    load_hf(model, checkpoint, family, shape, layout)
    yield MegatronEngine(model, layout, vocab_size=shape.vocab_size, max_sequences=cfg.max_sequences)


ENGINES: dict[str, Callable[[EvalConfig, Layout], AbstractContextManager[Respondent]]] = {
    "megatron": _megatron
}
