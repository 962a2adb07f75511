"""A Hugging Face folder in Megatron, at any layout, computes transformers' logits and exports equal bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
        load_hf(chunks[0], checkpoint, family, shape, layout)
        computed[name] = logits(chunks, layout, shape)
        export_hf(chunks[0], family, shape, out / name, models / name, layout)
    return computed


def packed_and_alone(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Hidden states of two sequences in a packed row, and of each by itself."""
    from hpt_mega.megatron.attention import PackedRow

    layout = start(Job())
    checkpoint = HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    (chunk,) = build_chunks(shape, Job())
    load_hf(chunk, checkpoint, family, shape, layout)
    sequences = [torch.arange(2, 9)[None], torch.arange(5, 16)[None]]
    places = [torch.arange(tokens.shape[1])[None] for tokens in sequences]
    bounds = torch.tensor([0, 7, 18], dtype=torch.int32)
    given = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": 11, "max_seqlen_kv": 11}
    row = PackedRow(qkv_format="thd", prompts=[0, 1], **given)
    with torch.no_grad():
        packed = chunk(torch.cat(sequences, 1), torch.cat(places, 1), None, packed_seq_params=row)
        alone = [chunk(tokens, at, None) for tokens, at in zip(sequences, places, strict=True)]
    return list(zip(packed.split([7, 11]), alone, strict=True))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_yarn"])
def test_latent_attention_counts_positions_from_the_start_of_each_packed_sequence(
    name: str, models: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    (found,) = run_ranks(packed_and_alone, 1, tmp_path, models[0] / name)
    for packed, alone in found:
        assert (packed - alone).abs().max() < 1e-5 * alone.abs().max()


def load_with_further_token_layer(folder: Path) -> dict[str, Tensor]:
    layout = start(Job())
    checkpoint = HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    chunks = build_chunks(shape, Job())
    load_hf(chunks[0], checkpoint, family, shape, layout)
    return {"logits": logits(chunks, layout, shape)}


def test_a_layer_that_predicts_further_tokens_is_left_in_the_folder(tmp_path: Path) -> None:
    expected = save_model("deepseek_v3", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(weights) | {"model.layers.3.eh_proj.weight": torch.ones(48, 96)}, weights)
    (computed,) = run_ranks(load_with_further_token_layer, 1, tmp_path, tmp_path / "hf")
    assert (computed["logits"] - expected).abs().max().item() < 1e-4


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


SPREAD = [
    (Job(ep=2), MIXTURES),
    (Job(ep=2, tp=2, etp=1), MIXTURES),
    (Job(ep=2, tp=4, etp=1), ("qwen3_moe",)),  # two copies of the experts within one replica
    (Job(pp=3, ep=2), MIXTURES),
    (Job(pp=2, vpp=2), ("llama_4_layers",)),
    (Job(pp=2, cp=2), ("llama_4_layers",)),
    (Job(pp=3, cp=2, ep=2), ("qwen3_moe",)),
]


@pytest.mark.parametrize(
    ("job", "names"), SPREAD, ids=lambda value: str(value) if isinstance(value, Job) else ""
)
def test_experts_and_interleaved_stages_spread_over_ranks_do_so_too(
    job: Job, names: tuple[str, ...], models: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = models
    computed = run_ranks(load_and_export, job.world_size, tmp_path, job, names, folder, tmp_path)[-1]
    for name in names:
        assert (computed[name] - expected[name]).abs().max().item() < 1e-4
        exported = (tmp_path / name / "model.safetensors").read_bytes()
        assert exported == (folder / name / "model.safetensors").read_bytes()
