"""Checkpoints laid out as Megatron-LM lays them out convert, and none of them runs code.

Megatron-LM is on no package index. What its save_checkpoint puts together (megatron/training/checkpointing.py
of core_v0.16.1: generate_state_dict, get_rng_state, get_checkpoint_name) is put together here and handed to
megatron-core's own writer, or to torch.save for the legacy format. Read from its source, not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.convert import megatron_to_hf
from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.config import Config, OptimizerConfig, ParallelConfig, PrecisionConfig
from hpt_mega.resharding.mapping import family_for
from tests.checkpoint.families import save_model
from tests.checkpoint.jobs import Job, build_chunks, start
from tests.ranks import run_ranks

MODEL = "qwen2"
PADDED_VOCABULARY = 256  # Megatron-LM rounds 101 up to a multiple of 128 x TP


def silent(done: int, total: int) -> None: ...


def save_as_megatron_lm(tp: int, sharding: str | None, hf: Path, out: Path) -> None:
    """A checkpoint of each format; `sharding` is the distributed optimizer's, if there is one."""
    layout = start(Job(tp=tp))
    from hpt_mega.checkpoint.weights import fill
    from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel

    checkpoint = HFCheckpoint(hf)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)

    def tensors_of(entry: Any) -> list[Tensor]:
        tensors = [checkpoint.tensor(name) for name in entry.hf]
        if entry.megatron in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rest = torch.full((PADDED_VOCABULARY - len(tensors[0]), shape.hidden_size), 7.0)
            return [torch.cat([tensors[0], rest.to(tensors[0].dtype)])]
        return tensors

    shape = replace(shape, vocab_size=PADDED_VOCABULARY)
    (model,) = build_chunks(shape, Job(tp=tp), torch.bfloat16)
    fill(model, tensors_of, family, shape, layout)
    cfg = Config(
        parallel=ParallelConfig(tp=tp, distributed_optimizer=sharding is not None),
        precision=PrecisionConfig("bf16"),
        optimizer=OptimizerConfig(weight_decay=0.0),
    )
    wrapped = wrap_data_parallel(model, cfg)
    optimizer = build_optimizer(wrapped, cfg)
    for parameter in model.parameters():
        parameter.main_grad.zero_()
    optimizer.step()  # now it has a state, and the weights are what they were
    save_torch_dist(model, optimizer, sharding, out)
    save_legacy(model, optimizer, tp, out.with_name("legacy"))


def common_state() -> dict[str, Any]:
    from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

    arguments = argparse.Namespace(
        tensor_model_parallel_size=2,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        cuda_graph_scope=[CudaGraphScope.attn],
        exit_signal=signal.SIGTERM,
        data_path=["a", "b"],
        consumed_train_samples=56,
    )
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "opt_param_scheduler": {"max_lr": 1e-4, "lr_decay_style": "cosine", "num_steps": 56},
        "num_floating_point_operations_so_far": 1e15,
    }


def random_states() -> list[dict[str, Any]]:
    from megatron.core import tensor_parallel

    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]


def save_torch_dist(model: Any, optimizer: Any, sharding: str | None, out: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.rerun_state_machine import RerunMode, RerunState

    about: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if sharding is not None:
        about["distrib_optim_sharding_type"] = sharding
    data_parallel = ps.get_data_parallel_group(with_context_parallel=True)
    metadata = {**about, "dp_cp_group": data_parallel}
    state = {**common_state(), "model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    state["rng_state"] = ShardedObject(
        "rng_state",
        random_states(),
        (1, ps.get_tensor_model_parallel_world_size()),
        (0, ps.get_tensor_model_parallel_rank()),
        replica_id=data_parallel.rank(),
    )
    state["rerun_state_machine"] = {"mode": RerunMode.DISABLED, "state": RerunState.INITIAL_RUN}
    folder = out / "iter_0000007"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    # megatron-core's writer starts a process
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"), data_parallel, False
    )
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=about)


def save_legacy(model: Any, optimizer: Any, tp: int, out: Path) -> None:
    from megatron.core import parallel_state as ps

    if ps.get_data_parallel_rank() != 0:
        return
    folder = out / "iter_0000007" / f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    folder.mkdir(parents=True)
    (out / "latest_checkpointed_iteration.txt").write_text("7")
    state = {
        **common_state(),
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
        "rng_state": random_states(),
    }
    torch.save(state, folder / "model_optim_rng.pt")


@pytest.mark.parametrize(("tp", "sharding"), [(2, None), (1, "dp_reshardable")])
def test_a_training_checkpoint_in_megatron_lms_layout_converts_to_the_same_bits(
    tp: int, sharding: str | None, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    save_model(MODEL, hf, torch.bfloat16)
    run_ranks(save_as_megatron_lm, 2, tmp_path, tp, sharding, hf, tmp_path / "torch_dist")
    for kind in ("torch_dist", "legacy"):
        megatron_to_hf(tmp_path / kind, tmp_path / f"{kind}_hf", hf, silent)
        exported = (tmp_path / f"{kind}_hf" / "model.safetensors").read_bytes()
        assert exported == (hf / "model.safetensors").read_bytes(), kind


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def through_a_module(path: Path) -> bytes:
    """A pickle that reaches io.FileIO(path, "w") through the names that another module holds."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    found = text("torch.distributed.checkpoint.filesystem") + text("io.FileIO") + b"\x93"
    return b"\x80\x04" + found + text(str(path)) + text("w") + b"\x86R."


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """A model's Hugging Face folder and a checkpoint of it."""
    from hpt_mega.checkpoint.convert import hf_to_megatron
    from hpt_mega.checkpoint.layout import TargetLayout

    save_model(MODEL, tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", TargetLayout(), silent)
    return tmp_path / "hf", tmp_path / "megatron"


def must_be_refused(megatron: Path, hf: Path, harm: Path) -> None:
    out = harm.with_name("out")
    with pytest.raises(ValueError, match=r"asks for|cannot be read|damaged"):
        megatron_to_hf(megatron, out, hf, silent)
    assert not harm.exists() and not out.exists()


def test_a_description_that_would_run_code_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = converted
    harm = tmp_path / "harm"
    for attack in (pickle.dumps(Attack(harm)), through_a_module(harm)):
        (megatron / "release" / ".metadata").write_bytes(attack)
        must_be_refused(megatron, hf, harm)


def test_a_tensor_that_would_run_code_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = converted
    harm = tmp_path / "harm"
    file = megatron / "release" / "__0_0.distcp"
    size = file.stat().st_size
    torch.save([Attack(harm)], file)
    os.truncate(file, max(size, file.stat().st_size))
    must_be_refused(megatron, hf, harm)


def test_a_legacy_file_that_would_run_code_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = converted
    harm = tmp_path / "harm"
    path = tmp_path / "legacy" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": {"weight": torch.zeros(1)}, "args": Attack(harm)}, path)
    must_be_refused(path.parent.parent, hf, harm)


def test_what_is_beside_the_weights_is_never_opened(converted: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = converted
    harm = tmp_path / "harm"
    torch.save({"args": Attack(harm)}, megatron / "release" / "common.pt")
    megatron_to_hf(megatron, tmp_path / "out", hf, silent)
    assert not harm.exists()
