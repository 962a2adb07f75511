"""A Hugging Face folder in Megatron, at any layout, computes transformers' logits and exports equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.weights import export_hf, load_hf
from hpt_mega.resharding.mapping import family_for
from tests.checkpoint.families import MIXTURES, MODELS, save_model
from tests.checkpoint.jobs import Job, build_chunks, logits, start
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of every tiny model, and the logits of each by transformers."""
    folder = tmp_path_factory.mktemp("models")
    return folder, {name: save_model(name, folder / name) for name in MODELS}


def load_and_export(job: Job, names: tuple[str, ...], models: Path, out: Path) -> dict[str, Tensor]:
    layout = start(job)
    computed = {}
    for name in names:
        checkpoint = HFCheckpoint(models / name)
        family = family_for(checkpoint.config)
        shape = family.read_shape(checkpoint.config)
        chunks = build_chunks(shape, job)
        for chunk in chunks:
            load_hf(chunk, checkpoint, family, shape, layout)
        computed[name] = logits(chunks, layout, shape)
        if job.vpp is None:
            export_hf(chunks[0], family, shape, out / name, models / name, layout)
    return computed


# its 4 layers do not divide into 3 stages
THREE_LAYERS = tuple(name for name in MODELS if name != "llama_4_layers")
LAYOUTS = [
    Job(),
    Job(tp=2),
    Job(tp=4),
    Job(pp=2, first_stage=1),
    Job(pp=3),
    Job(tp=2, pp=3),
]


@pytest.mark.parametrize("job", LAYOUTS, ids=str)
def test_every_family_computes_the_logits_of_transformers_and_exports_the_same_bits(
    job: Job, models: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = models
    computed = run_ranks(load_and_export, job.world_size, tmp_path, job, THREE_LAYERS, folder, tmp_path)[-1]
    differences = {name: (computed[name] - expected[name]).abs().max().item() for name in THREE_LAYERS}
    print({name: f"{difference:.1e}" for name, difference in differences.items()})
    for name in THREE_LAYERS:
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            folder / name / "model.safetensors"
        ).read_bytes()
    assert max(differences.values()) < 1e-5 * max(x.abs().max().item() for x in expected.values())


@pytest.mark.parametrize("job", [Job(ep=2), Job(ep=2, tp=2, etp=1), Job(pp=3, ep=2)], ids=str)
def test_experts_spread_over_ranks_compute_the_same_logits_and_export_the_same_bits(
    job: Job, models: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = models
    computed = run_ranks(load_and_export, job.world_size, tmp_path, job, MIXTURES, folder, tmp_path)[-1]
    for name in MIXTURES:
        assert (computed[name] - expected[name]).abs().max().item() < 1e-4
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            folder / name / "model.safetensors"
        ).read_bytes()
