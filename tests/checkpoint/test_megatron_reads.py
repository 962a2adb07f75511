"""Megatron itself reads converted checkpoints at any layout; what it saves at any layout converts back."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf
from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.resharding.mapping import family_for
from tests.checkpoint.families import MIXTURES, MODELS, save_model
from tests.checkpoint.jobs import Job, build_chunks, logits, start
from tests.ranks import run_ranks

VPP = ("llama_4_layers",)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Each model as folder/NAME/hf and converted, cut for an odd layout, as folder/NAME/megatron."""
    folder = tmp_path_factory.mktemp("converted")
    expected = {}
    for name in MODELS:
        expected[name] = save_model(name, folder / name / "hf")
        layout = TargetLayout(tp=4, pp=3, ep=2 if name in MIXTURES else 1)
        hf_to_megatron(folder / name / "hf", folder / name / "megatron", layout, lambda done, total: None)
    return folder, expected


def load_and_save(job: Job, names: tuple[str, ...], folder: Path, out: Path) -> dict[str, Tensor]:
    """Load by megatron-core; save by megatron-core, and in the legacy format as Megatron-LM lays it out."""
    layout = start(job)
    from megatron.core import dist_checkpointing

    # megatron-core's writer starts a process
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    computed = {}
    for name in names:
        config = HFCheckpoint(folder / name / "hf").config
        shape = family_for(config).read_shape(config)
        chunks = build_chunks(shape, job)
        sharded = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        state = dist_checkpointing.load(sharded, str(folder / name / "megatron" / "release"))
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(state[f"model{number}"])
        computed[name] = logits(chunks, layout, shape)
        torch_dist = out / name / "torch_dist"
        if dist.get_rank() == 0:
            torch_dist.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(
            {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, str(torch_dist)
        )
        save_legacy(chunks, job, out / name / "legacy")
    return computed


def save_legacy(chunks: list[Any], job: Job, folder: Path) -> None:
    from megatron.core import parallel_state as ps

    rank = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    if job.pp > 1:
        rank += f"_{ps.get_pipeline_model_parallel_rank():03d}"
    if job.ep > 1:
        rank += f"_{ps.get_expert_model_parallel_rank():03d}"
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    state = {key: chunk.state_dict() for key, chunk in zip(keys, chunks, strict=True)}
    path = folder / "iter_0000007" / rank / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = argparse.Namespace(tensor_model_parallel_size=job.tp, params_dtype=torch.float32)
    torch.save({**state, "args": arguments, "checkpoint_version": 3.0, "iteration": 7}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")


ALL = tuple(MODELS)
LAYOUTS = [
    (Job(tp=2), ALL),
    (Job(pp=2, first_stage=1), tuple(name for name in ALL if name not in VPP)),
    (Job(tp=2, pp=3), tuple(name for name in ALL if name not in VPP)),
    (Job(pp=2, vpp=2), VPP),
    (Job(ep=2), MIXTURES),
    (Job(tp=2, etp=1, ep=2), MIXTURES),
    (Job(tp=1, etp=2), MIXTURES),
]


@pytest.mark.parametrize(
    ("job", "names"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, Job) else ""
)
def test_megatron_loads_it_and_what_megatron_saves_converts_to_the_same_bits(
    job: Job, names: tuple[str, ...], converted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = converted
    computed = run_ranks(load_and_save, job.world_size, tmp_path, job, names, folder, tmp_path)[-1]
    for name in names:
        assert (computed[name] - expected[name]).abs().max().item() < 1e-5
        original = (folder / name / "hf" / "model.safetensors").read_bytes()
        kinds = ["torch_dist"] if job.etp not in (None, job.tp) else ["torch_dist", "legacy"]
        for kind in kinds:
            out = tmp_path / f"{name}_{kind}"
            megatron_to_hf(tmp_path / name / kind, out, folder / name / "hf", lambda done, total: None)
            assert (out / "model.safetensors").read_bytes() == original, (name, kind)
