"""The demo's real weights, converted, in Megatron at several layouts: same perplexity, same files again."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.checkpoint.convert import hf_to_megatron
from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.resharding.mapping import family_for
from tests.checkpoint.jobs import Job, build_chunks, logits, start
from tests.ranks import run_ranks

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
TEXT = (
    "The ferry left the harbour at six in the morning, and the two brothers stood at the rail to watch the "
    "town grow small. The older one had packed bread, cheese and a thermos of coffee; the younger one had "
    "forgotten his coat. By the time they passed the lighthouse the wind had turned, and the captain told "
    "everyone to go inside. They sat by the window, shared the coffee, and talked about the house that their "
    "grandmother had left them on the island, which neither of them had seen since they were children."
)


def token_ids() -> Tensor:
    return torch.tensor([AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids])


def perplexity(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits_BSV[0, :-1].double(), tokens_BS[0, 1:])
    return float(loss.exp())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The converted checkpoint, cut for another layout than any it is loaded at; transformers' perplexity."""
    out = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(MODEL, out, TargetLayout(tp=3, pp=5), lambda done, total: None)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        return out, perplexity(model(token_ids()).logits, token_ids())


def live(job: Job, converted: Path, out: Path) -> float:
    """Load by megatron-core, compute in fp32, export in the stored dtype; the last stage's perplexity."""
    layout = start(job)
    from megatron.core import dist_checkpointing

    from hpt_mega.checkpoint.weights import export_hf

    checkpoint = HFCheckpoint(MODEL)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    chunks = build_chunks(shape, job)
    wanted = {"model": chunks[0].sharded_state_dict()}
    chunks[0].load_state_dict(dist_checkpointing.load(wanted, str(converted / "release"))["model"])
    given = logits(chunks, layout, shape, token_ids())
    chunks[0].to(checkpoint.dtype)
    export_hf(chunks[0], family, shape, out, MODEL, layout)
    return perplexity(given, token_ids()) if layout.is_last_stage else 0.0


@pytest.mark.parametrize("job", [Job(pp=2), Job(pp=3), Job(tp=3)], ids=str)
def test_converted_real_weights_keep_their_perplexity_and_every_bit(
    job: Job, converted: tuple[Path, float], tmp_path: Path
) -> None:
    checkpoint, expected = converted
    found = run_ranks(live, job.world_size, tmp_path, job, checkpoint, tmp_path / "hf")[-1]
    print(f"{job}: perplexity {found!r}, of transformers {expected!r}")
    assert found == pytest.approx(expected, rel=1e-5)
    names = [path.name for path in MODEL.iterdir()]
    assert filecmp.cmpfiles(MODEL, tmp_path / "hf", names, shallow=False) == (names, [], [])
