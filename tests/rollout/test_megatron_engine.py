"""The embedded engine's samples beside transformers, and the same in every layout, wave and batch.

The reference runs one sequence at a time, without cache or padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hpt_mega.config import ParallelConfig
from hpt_mega.rewards.verdict import Verdict
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.trajectory import Question
from tests.megatron.tiny import (
    VOCABULARY,
    build_policy,
    config,
    leave_job,
    load_llama,
    load_mixture,
    save_llama,
    save_mixture,
)
from tests.ranks import run_ranks
from tests.repeatable import OnlyRepeatable

LAYOUTS = {
    "tp1pp1": ParallelConfig(1, 1, 1),
    "tp2": ParallelConfig(2, 1, 1),
    "tp2 sequence parallel": ParallelConfig(2, 1, 1, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2, 1),
    "tp3": ParallelConfig(3, 1, 1),
    "pp3": ParallelConfig(1, 3, 1),
    "tp2 pp2 interleaved": ParallelConfig(2, 2, 1, vpp=3, sequence_parallel=True),
    "pp2 uneven": ParallelConfig(1, 2, 1, stage_layers=[4, 2]),
    "cp2": ParallelConfig(1, 1, 1, cp=2),
}
EXPERTS = {
    "replicas share experts": ParallelConfig(1, 1, 2, ep=2),
    "tensor ranks share experts": ParallelConfig(2, 1, 1, sequence_parallel=True, ep=2),
    "replicas of two stages": ParallelConfig(1, 2, 2, ep=2),
    "experts cut over tensor ranks": ParallelConfig(2, 1, 1, sequence_parallel=True, etp=2),
    "experts cut over replicas": ParallelConfig(1, 1, 2, etp=2),
}
PROMPT_LENGTHS = (5, 1, 12, 3, 8)
NEW_TOKENS = 14
STOP = (3, 17, 29, 41, 55, 60, 71)  # many, so that sequences end at different steps
GREEDY = SamplingParams(n=1, max_new_tokens=NEW_TOKENS, temperature=0.0, stop_tokens=STOP)
SAMPLED = SamplingParams(n=3, max_new_tokens=NEW_TOKENS, temperature=0.7, stop_tokens=STOP, seed=23)
NUCLEUS = dataclasses.replace(SAMPLED, top_p=0.6, seed=31)
VERSION = 6

pytestmark = pytest.mark.timeout(600)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of generate."""

    sampling: SamplingParams
    max_sequences: int = 64
    prompts: int = len(PROMPT_LENGTHS)
    compact_below: float | None = None


CASES = {
    "greedy": Case(GREEDY),
    "sampled": Case(SAMPLED),
    "nucleus": Case(NUCLEUS),
    "waves": Case(SAMPLED, max_sequences=7),  # two prompts at a time
    "one by one": Case(SAMPLED, max_sequences=1),  # fewer than n
    "never compacted": Case(SAMPLED, compact_below=0.0),
    "compacted at once": Case(SAMPLED, compact_below=1.1),
    "one prompt": Case(SAMPLED, prompts=1),
}
Samples = list[list[dict[str, Any]]]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def generate(layouts: list[str], folder: Path) -> dict[str, Any]:
    """Every case's samples as plain data, by layout; and how often a batch was compacted."""
    from hpt_mega.rollout import megatron as engines

    results: dict[str, Any] = {}
    compact = engines._Group._compact
    for name in layouts:
        policy = build_policy(folder, config(LAYOUTS[name]), train=False)
        results[name] = {}
        for key, case in CASES.items():
            count = 0

            def counted(group: Any) -> None:
                nonlocal count
                count += 1
                compact(group)

            engines._Group._compact = counted  # type: ignore[method-assign]
            default = engines._COMPACT_BELOW
            if case.compact_below is not None:
                engines._COMPACT_BELOW = case.compact_below
            engine = engines.MegatronEngine(
                policy.model, policy.layout, vocab_size=VOCABULARY, max_sequences=case.max_sequences
            )
            engine.update_weights(VERSION)
            with OnlyRepeatable():
                samples = engine.generate(prompts()[: case.prompts], case.sampling)
            engines._COMPACT_BELOW = default
            plain = [[dataclasses.asdict(sample) for sample in group] for group in samples]
            results[name][key] = {"samples": plain, "compacted": count}
            assert all(layer.cache is None for layer in policy.model.core_attentions())
        leave_job()
    return results


def graded(texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    return [Verdict(1.0, "", text) for text in texts]


def generate_with_experts(layouts: list[str], folder: Path) -> dict[str, Any]:
    """This replica's number and greedy tokens; the second replica has one prompt, the first all others.

    Then an evaluation of one question, in which the second replica has none.
    """
    from hpt_mega.evaluation.sample import respond
    from hpt_mega.rollout.megatron import MegatronEngine

    found: dict[str, Any] = {}
    for name in layouts:
        policy = build_policy(folder, config(EXPERTS[name]), train=False)
        engine = MegatronEngine(policy.model, policy.layout, vocab_size=VOCABULARY, max_sequences=64)
        dp, rank = policy.layout.dp_size, policy.layout.dp_rank
        mine = prompts() if dp == 1 else (prompts()[1:], prompts()[:1])[rank]
        samples = engine.generate(mine, GREEDY)
        question = Question("0", "", "", "", "", tuple(prompts()[0]), ())
        answered = respond(engine, [] if rank else [question], GREEDY, graded, str)
        found[name] = {
            "rank": rank,
            "tokens": [list(sample.tokens) for (sample,) in samples],
            "evaluated": [response.text for (response,) in answered],
        }
        leave_job()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tied=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_llama(folder)


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for size in (1, 2, 3, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        job = run_ranks(generate, size, tmp_path_factory.mktemp("job"), names, folder)
        found |= {name: [rank[name] for rank in job] for name in names}
    return found


def tokens_of(samples: Samples) -> list[list[tuple[int, ...]]]:
    return [[tuple(sample["tokens"]) for sample in group] for group in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_a_replica_knows_the_same_samples(layout: str, ranks: dict[str, Any]) -> None:
    first, *others = ranks[layout]
    for other in others:
        for key in CASES:
            assert other[key]["samples"] == first[key]["samples"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_those_of_transformers(layout: str, ranks: dict[str, Any], model: Any) -> None:
    found = tokens_of(ranks[layout][0]["greedy"]["samples"])
    for prompt, (ours,) in zip(prompts(), found, strict=True):
        assert list(ours) == greedy(model, prompt)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What transformers answers to the prompt alone."""
    ids = torch.tensor([prompt])
    found: list[int] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(STOP),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_that_share_experts_decode_unequally_much_and_end_together(
    size: int, tmp_path: Path
) -> None:
    mixture = save_mixture(tmp_path / "mixture")
    model = load_mixture(mixture)
    names = [name for name, layout in EXPERTS.items() if layout.world_size == size]
    for rank in run_ranks(generate_with_experts, size, tmp_path, names, mixture):
        for name in names:
            mine = prompts()
            if EXPERTS[name].dp > 1:
                mine = (mine[1:], mine[:1])[rank[name]["rank"]]
            assert rank[name]["tokens"] == [greedy(model, prompt) for prompt in mine]
            asked = [] if rank[name]["rank"] else prompts()[:1]
            assert rank[name]["evaluated"] == [str(tuple(greedy(model, prompt))) for prompt in asked]


@pytest.mark.parametrize("key", ["greedy", "sampled", "nucleus", "waves"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_transformers_at_the_sampling_temperature(
    layout: str, key: str, ranks: dict[str, Any], model: Any
) -> None:
    sampling = CASES[key].sampling
    largest = 0.0
    for prompt, group in zip(prompts(), ranks[layout][0][key]["samples"], strict=True):
        for sample in group:
            tokens = list(sample["tokens"])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
            expected = logp[range(len(tokens)), tokens]
            largest = max(largest, float((expected - torch.tensor(sample["logp"])).abs().max()))
            if sampling.top_p < 1:  # what is more likely does not fill the nucleus yet
                above = (logp.exp() * (logp > expected[:, None])).sum(-1)
                assert float(above.max()) < sampling.top_p + 1e-5
    print(f"{layout} {key}: largest log-prob difference {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stop_token_ends_a_sequence_and_is_part_of_it(layout: str, ranks: dict[str, Any]) -> None:
    lengths = set()
    for key in CASES:
        for group in ranks[layout][0][key]["samples"]:
            assert len(group) == CASES[key].sampling.n
            for sample in group:
                *body, last = sample["tokens"]
                lengths.add(len(sample["tokens"]))
                assert not set(body) & set(STOP)
                assert sample["finished"] == (last in STOP)
                assert sample["finished"] or len(sample["tokens"]) == NEW_TOKENS
                assert len(sample["logp"]) == len(sample["tokens"])
                assert sample["policy_version"] == VERSION
    assert {1, NEW_TOKENS} < lengths, "the case has no sequence that stops early, or none that does not"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_depend_neither_on_the_wave_nor_on_finished_rows_leaving(
    layout: str, ranks: dict[str, Any]
) -> None:
    found = ranks[layout][0]
    expected = tokens_of(found["sampled"]["samples"])
    for key in ("waves", "one by one", "never compacted", "compacted at once"):
        assert tokens_of(found[key]["samples"]) == expected, key
    assert tokens_of(found["one prompt"]["samples"]) == expected[:1]
    assert found["never compacted"]["compacted"] == 0
    assert found["compacted at once"]["compacted"] > found["sampled"]["compacted"] > 0


def test_draws_do_not_depend_on_the_layout(ranks: dict[str, Any]) -> None:
    for key in CASES:
        expected = tokens_of(ranks["tp1pp1"][0][key]["samples"])
        for layout in LAYOUTS:
            assert tokens_of(ranks[layout][0][key]["samples"]) == expected, (layout, key)


def test_the_samples_of_a_prompt_differ_and_so_do_seeds(ranks: dict[str, Any]) -> None:
    found = ranks["tp1pp1"][0]
    sampled = tokens_of(found["sampled"]["samples"])
    assert all(len(set(group)) > 1 for group in sampled)
    assert tokens_of(found["nucleus"]["samples"]) != sampled
